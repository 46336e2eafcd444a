"""A lane's own head: initialization, independence of lanes, saving, merging and export."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
    ViTConfig,
)

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import UnsupportedError, VariantSettings
from variants.calibrate import calibrate
from variants.hooks import statistic_of
from variants.merging import merge_and_detach
from variants.peft_format import peft_method
from variants.storage import load_peft, save_peft
from variants.testing.rig import LAW_SETTINGS

SETTINGS = VariantSettings(rank=2, alpha=4.0)
IDS = torch.arange(16).view(8, 2)


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            num_labels=3,
        )  # fmt: skip
        return BertForSequenceClassification(config).to(dtype).eval()


def adapted(name: str = "lora", lanes: int = 2, dtype: torch.dtype = torch.float32) -> Adapters:
    adapters = attach(bert(dtype), catalogue.get(name), SETTINGS, heads=["classifier"])
    for lane in range(lanes):
        adapters.add_lane(str(lane), SETTINGS, seed=lane)
    return adapters


def logits(adapters: Adapters, *lanes: str) -> Tensor:
    with torch.no_grad(), adapters.activate_lanes(lanes, None, rows_per_lane=len(IDS)):
        return adapters.model(input_ids=IDS.repeat(len(lanes), 1)).logits


def perturb(adapters: Adapters) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lane in adapters.lanes:
            for parameter in adapters.trainable(lane).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))


def test_the_initial_head_depends_only_on_the_seed() -> None:
    lora, hira = adapted("lora"), adapted("hira")
    weight = lora.trainable("1")["classifier.weight"]
    assert torch.equal(weight, hira.trainable("1")["classifier.weight"])
    assert not torch.equal(weight, lora.trainable("0")["classifier.weight"])
    assert weight.detach().std().item() == pytest.approx(0.02, rel=0.3)
    assert not lora.trainable("1")["classifier.bias"].any()
    assert lora.is_head("classifier.weight")
    assert not lora.is_head("bert.encoder.layer.0.attention.self.query.A")


def test_the_base_model_uses_its_own_head_or_a_given_one() -> None:
    plain, adapters = bert(), adapted()
    with torch.no_grad():
        own = plain(input_ids=IDS).logits
        with adapters.disable_adapters():
            assert torch.equal(adapters.model(input_ids=IDS).logits, own)
        with adapters.disable_adapters(head_weights=adapters.init_heads(1)):
            given = adapters.model(input_ids=IDS).logits
    assert torch.equal(given, logits(adapters, "1"))
    assert not torch.equal(given, own)


def test_head_only_needs_a_head() -> None:
    with pytest.raises(
        UnsupportedError, match="head_only trains the task's head alone, and this task has none"
    ):
        attach(bert(), catalogue.get("head_only"), SETTINGS)


def test_heads_are_float32_over_bfloat16() -> None:
    adapters = adapted(dtype=torch.bfloat16)
    assert adapters.trainable("0")["classifier.weight"].dtype == torch.float32
    assert logits(adapters, "0").dtype == torch.float32


def test_a_head_inside_the_base_is_exported_too(tmp_path: Path) -> None:
    """If a checkpoint has no pooler, the pooler belongs to the task's head."""
    heads = ["classifier", "bert.pooler"]
    adapters = attach(bert(), catalogue.get("lora"), SETTINGS, heads=heads)
    adapters.add_lane("0", SETTINGS, seed=0)
    perturb(adapters)
    save_peft(adapters, "0", tmp_path, "bert")
    peft_model = PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(input_ids=IDS).logits, logits(adapters, "0"))
    assert torch.equal(logits(load_peft(bert(), tmp_path, lane="0"), "0"), logits(adapters, "0"))


def test_targets_that_belong_to_the_head_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="targets 'classifier': all of it is the task's head"):
        attach(bert(), catalogue.get("lora"), SETTINGS, "classifier", heads=["classifier"])


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
HEADED: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "bert": (BertConfig(**SMALL), ["bert.pooler.dense", "classifier"]),
    "roberta": (RobertaConfig(**SMALL, pad_token_id=1), ["classifier"]),  # a head of two layers
    "llama": (LlamaConfig(**SMALL, pad_token_id=0), ["score"]),
    "vit": (ViTConfig(**SMALL, image_size=8, patch_size=4), ["classifier"]),
}
"""Models and the modules of their head."""


def headed_exports() -> list[Any]:
    """Return models and variants.

    The default run has LoRA on all models and VeRA (shared tensors) on one, the slow run each variant on one.
    """
    names = [name for name in catalogue.names() if peft_method(catalogue.get(name))]
    found = []
    for i, name in enumerate(names):
        for j, model in enumerate(HEADED):
            is_first = i % len(HEADED) == j
            rest = pytest.mark.slow if is_first else pytest.mark.nightly
            is_default = name == "lora" or (name == "vera" and is_first)
            found.append(pytest.param(model, name, marks=() if is_default else rest))
    return found


@pytest.mark.parametrize(("model", "name"), headed_exports())
def test_auto_classes_load_the_head_of_an_export_and_of_a_merged_model(
    model: str, name: str, tmp_path: Path
) -> None:
    """The files of the base model have no head, or for images one of another size."""
    config, heads = HEADED[model]
    is_image = model == "vit"
    auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
    base, adapter, merged = (str(tmp_path / each) for each in ("base", "adapter", "merged"))
    whole = auto.from_config(config)
    (whole if is_image else whole.base_model).save_pretrained(base)
    labels = {"num_labels": 3, "ignore_mismatched_sizes": True}
    inputs = {"pixel_values": torch.randn(8, 3, 8, 8)} if is_image else {"input_ids": IDS + 2}

    variant = catalogue.get(name)
    settings = VariantSettings(4, 8.0, extra=LAW_SETTINGS.get(name, {}))
    adapters = attach(auto.from_pretrained(base, **labels).eval(), variant, settings, heads=heads)

    def losses() -> Generator[Tensor, None, None]:
        with adapters.disable_adapters(head_weights=adapters.init_heads(0)):
            yield adapters.model(**inputs).logits.square().mean()

    needs_data = statistic_of(variant).needs_data
    adapters.add_lane("0", settings, 0, calibrate(adapters, settings, losses) if needs_data else None)
    perturb(adapters)
    with torch.no_grad(), adapters.activate_lanes(["0"], None, rows_per_lane=len(IDS)):
        expected = adapters.model(**inputs).logits
    save_peft(adapters, "0", Path(adapter), base, None if is_image else "SEQ_CLS")
    auto_peft = AutoPeftModel if is_image else AutoPeftModelForSequenceClassification
    loaded = auto_peft.from_pretrained(adapter, **labels)
    merge_and_detach(adapters, "0")
    adapters.model.save_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        plain = auto.from_pretrained(merged)
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    back = load_peft(auto.from_pretrained(base, **labels).eval(), Path(adapter), lane="0")
    with torch.no_grad(), back.activate_lanes(["0"], None, rows_per_lane=len(IDS)):
        torch.testing.assert_close(back.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_head_has_the_dtype_of_the_model() -> None:
    model = bert(torch.bfloat16)
    model.classifier.float()  # as the loader of base models does
    adapters = attach(model, catalogue.get("lora"), SETTINGS, heads=["classifier"])
    adapters.add_lane("0", SETTINGS, seed=0)
    perturb(adapters)
    expected = logits(adapters, "0")
    merge_and_detach(adapters, "0")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits.float(), expected, rtol=0.05, atol=0.02)
