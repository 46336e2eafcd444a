"""The forms in which a trained lane of a variant can be exported, and why it cannot in the others.

Every lane can be saved exactly (`variants.storage.save_lane`). Other programs read an adapter in the format
of the PEFT library (`save_peft`) or a merged model (`variants.merging.merge_and_detach`).

vLLM was not run. Its rule is that of the source code in its documentation (`VLLM_RULE`, `VLLM_RANKS_SOURCE`):
it reads the tensors of LoRA alone, and refuses DoRA, `modules_to_save`, biases and ranks above 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from variants.peft_format import PeftFormat, peft_method
from variants.traits import AdaptationScope
from variants.variant_settings import VariantSettings

if TYPE_CHECKING:
    from variants.base import Variant

VLLM_RULE = "https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/"
"""Address of the class `PEFTHelper`, which checks an adapter_config.json."""
VLLM_RANKS_SOURCE = "https://docs.vllm.ai/en/v0.22.1/api/vllm/config/lora/"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's option `--max-lora-rank`."""


@dataclass(frozen=True)
class ExportForm:
    """Whether a lane can be exported in one form."""

    possible: bool
    note: str = ""
    """Why not, or a condition; empty if there is neither."""


@dataclass(frozen=True)
class ExportForms:
    """The forms in which the lanes of a variant can be exported, besides the exact file of a lane."""

    peft: ExportForm
    """An adapter in PEFT's format, for `PeftModel.from_pretrained`, and for `AutoPeftModelFor...`, which
    loads the base model too."""
    vllm: ExportForm
    """The same folder, served by vLLM; by vLLM's documented rule, not tried."""
    merged: ExportForm
    """A plain model of transformers with the update in its weights."""


def export_forms(variant: Variant) -> ExportForms:
    """Return the forms in which the lanes of a variant can be exported.

    Args:
        variant: The variant. A few conditions depend on the settings, the model or the task; they are in the
            notes.
    """
    merged = ExportForm(not variant.merge_obstacle, variant.merge_obstacle)
    if obstacle := peft_obstacle(variant):
        refused = ExportForm(False, obstacle)
        return ExportForms(refused, ExportForm(False, "not in PEFT's format"), merged)
    assert isinstance(variant, PeftFormat)
    assert variant.peft is not None
    condition = "" if variant.peft.adapts_conv1d else "not on layers of type Conv1D, as in GPT-2"
    peft = ExportForm(True, condition)
    config = variant.peft_config(variant.validate_settings(VariantSettings(rank=8)))
    refusal = vllm_obstacle(config)
    vllm = ExportForm(not refusal, refusal or "without a trained head")
    return ExportForms(peft, vllm, merged)


def peft_obstacle(variant: Variant) -> str:
    """Return why lanes of a variant cannot be exported in PEFT's format; empty if they can."""
    if peft_method(variant) is not None:
        return ""
    return {
        AdaptationScope.FULL_MODEL: "every weight of the model is trained, and there is no adapter",
        AdaptationScope.HEAD_ONLY: "only the head is trained, and there is no adapter",
    }.get(variant.adaptation_scope, getattr(variant, "peft_obstacle", PeftFormat.peft_obstacle))


def vllm_obstacle(config: Mapping[str, Any]) -> str:
    """Return the reason why vLLM refuses an adapter by its documented rule.

    The rule is about the adapter alone. vLLM must also support LoRA for the class of the model, and its
    server must be started with `--enable-lora` and the rank of `vllm_max_lora_rank`.

    Args:
        config: The content of adapter_config.json.

    Returns:
        The reason as a sentence; an empty text if vLLM loads the adapter.
    """
    if config["peft_type"] != "LORA":
        return "vLLM loads LoRA, and no other method of PEFT"
    if config.get("use_dora"):
        return "vLLM does not load DoRA"
    if config.get("modules_to_save"):
        return "vLLM loads no trained head (`modules_to_save`)"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "vLLM loads no biases"
    if config.get("rank_pattern"):
        return "vLLM loads one rank for all layers"
    if vllm_max_lora_rank(config["r"]) is None:
        return f"the adapter's rank {config['r']} is above {VLLM_RANKS[-1]}"
    return ""


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the least value of vLLM's `--max-lora-rank` for an adapter, or None if its rank is too large."""
    return next((each for each in VLLM_RANKS if each >= rank), None)
