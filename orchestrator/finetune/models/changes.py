"""Replace modules of a loaded base model: for lanes that must not depend on each other, and by an option.

Some base models have dropout of their own: RoBERTa, BERT, DeBERTa and GPT-2 have a rate of 0.1. In training
mode transformers draws its masks from the global random state, so a lane's numbers would depend on the other
lanes of its group. `variants.forward_context` therefore replaces the dropout modules of the model. PyTorch's
fused attention draws masks by itself, so attention with dropout is computed here.

DeBERTa (He et al. 2021, arXiv 2006.03654) projects its table of relative position embeddings once per batch.
The layers that project it carry adapters, so each lane needs its own projection. Here the table is projected
for every row, limited to the positions that the batch's length needs. With one lane the numbers equal those
of transformers. Dropout of the table has a mask per row as well.

--kernels: Liger's Triton kernels compute norms, rotary embeddings and gated activations. The linear layers
stay modules, so adapters work as before. Results differ by rounding: a record names the kernels in its
provenance.

--gradient-checkpointing: blocks are computed again in the backward pass. Training takes about a third longer
and needs the activations of one block instead of all. Numbers stay the same. transformers' own gradient
checkpointing is not used: it needs training mode, which would turn on the dropout of the frozen base model,
and it makes the output of the embeddings require gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.util.errors import UsageError, require_package
from variants.api import UnsupportedError
from variants.forward_context import TableDropout

SUPPORTED_MODEL_TYPES = ("bert", "deberta", "deberta-v2", "distilbert", "electra", "gpt2", "roberta")
"""Values of `config.model_type` of models that have dropout only in `nn.Dropout` modules and in attention."""
ATTENTION_IMPLEMENTATION = "lane_dropout"
"""The name under which `_lane_dropout_attention` is registered with transformers."""
_ORIGINAL_ATTENTION = "original_attention"
"""The attribute that keeps the name of a model's original attention function."""
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "smollm3",
)  # fmt: skip
"""The `model_type` of the decoders to which Liger's kernels are applied."""
KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
"""Liger's kernels that are used, as far as Liger has them for a model."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger's losses. They are off, because they would replace the model's `forward`. Lanes have losses of their
own, which launch the kernel of Liger's cross-entropy (`evaluation/forward.py`)."""
REMEDY = "take --kernels torch"
"""What to do where Liger cannot be used."""
CHECKPOINTING_ATTRIBUTE = "has_activation_checkpointing"
"""An attribute that is set on a model with activation checkpointing."""


def check_dropout_supported(model: Any, name: str) -> None:
    """Check that --base-dropout can be turned on for a model.

    Raises:
        UnsupportedError: The model has no dropout of its own, or its type is not supported.
    """
    model_type = model.config.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        what = f"has type {model_type!r}; must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
    elif any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return
    else:
        what = "has no dropout of its own"
    raise UnsupportedError(f"--base-dropout on: model {name!r} {what}. Use --base-dropout off.")


def enable_lane_dropout(model: Any) -> None:
    """Make the attention of a model apply the lanes' dropout masks to its probabilities.

    `variants.adapters.attach` must have been called with `base_dropout`, which gives every attention module a
    `LaneDropout`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_IMPLEMENTATION, _lane_dropout_attention)
    AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, sdpa_mask)
    # DeBERTa's attention applies an `nn.Dropout` module and does not call an attention function.
    if not model.config.model_type.startswith("deberta"):
        setattr(model, _ORIGINAL_ATTENTION, model.config._attn_implementation)
        model.config._attn_implementation = ATTENTION_IMPLEMENTATION


def disable_lane_dropout(model: Any) -> None:
    """Give a model back its original attention function."""
    if model.config._attn_implementation == ATTENTION_IMPLEMENTATION:
        model.config._attn_implementation = getattr(model, _ORIGINAL_ATTENTION)


def _lane_dropout_attention(  # noqa: PLR0913 (the signature is transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the lanes' dropout masks on its probabilities while lanes are trained.

    The signature is that of transformers' attention functions.

    Args:
        module: The attention module, with a `LaneDropout` in its attribute `lane_dropout`.
        query: (rows, heads, length, head size).
        key: (rows, heads, length, head size).
        value: (rows, heads, length, head size).
        attention_mask: Broadcasts to (rows, heads, length, length). Boolean masks are True where a token is
            attended to, others are added to the scores. None: every token is attended to, or with `is_causal`
            every earlier one.
        dropout: The dropout rate.
        scaling: The factor of the scores; by default 1 / sqrt(head size).
        is_causal: True for causal attention; by default the module's value.
        **kwargs: Passed on to transformers' attention.

    Returns:
        The output, (rows, length, heads, head size), and None in place of the probabilities.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout == 0 or not module.lane_dropout.active:  # type: ignore[union-attr]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, 0.0, scaling, is_causal, **kwargs
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(query.dtype)
    out = module.lane_dropout(probabilities, dropout) @ value  # type: ignore[operator]
    return out.transpose(1, 2).contiguous(), None


def patch_deberta_attention(model: Any) -> None:
    """Replace the attention modules of a DeBERTa model, in place."""
    replacements: dict[type, type] = {
        modeling_deberta.DisentangledSelfAttention: PerRowDisentangledSelfAttention,
        modeling_deberta_v2.DisentangledSelfAttention: PerRowDisentangledSelfAttentionV2,
    }
    for module in model.modules():
        if (replacement := replacements.get(type(module))) is not None:
            module.__class__ = replacement
            if getattr(module, "relative_attention", False):  # all rows of a batch share the position table
                module.pos_dropout = TableDropout(module.pos_dropout.p)


class PerRowDisentangledSelfAttention(modeling_deberta.DisentangledSelfAttention):
    """Attention of DeBERTa that projects relative positions for each row."""

    def disentangled_att_bias(
        self, query: Tensor, key: Tensor, relative_pos: Any, rel_embeddings: Tensor, scale_factor: int
    ) -> Any:
        """Compute the scores between contents and relative positions.

        Args:
            query: Scaled queries, (rows, heads, length, head size).
            key: Keys, (rows, heads, length, head size).
            relative_pos: Position of each query minus that of each key, (1, length, length).
            rel_embeddings: The position table, (positions, features), or with a dropout mask per row
                (rows, positions, features).
            scale_factor: The number of kinds of scores. Scores are divided by sqrt(head size * scale_factor).

        Returns:
            Scores to add to those of contents, (rows, heads, length, length).
        """
        rows, _, length, size = query.shape
        middle, span = self.max_relative_positions, min(length, self.max_relative_positions)
        table = rel_embeddings[..., middle - span : middle + span, :].expand(rows, -1, -1)
        c2p_index = _to_gather_index(relative_pos + span, 2 * span).expand(*query.shape[:2], -1, -1)
        p2c_index = _to_gather_index(span - relative_pos, 2 * span).expand(*query.shape[:2], -1, -1)
        score: Any = 0
        if "c2p" in self.pos_att_type:
            keys = self.transpose_for_scores(self.pos_proj(table))
            score = score + torch.gather(query @ keys.transpose(-1, -2), -1, c2p_index)
        if "p2c" in self.pos_att_type:
            queries = self.transpose_for_scores(self.pos_q_proj(table)) / (size * scale_factor) ** 0.5
            score = score + torch.gather(key @ queries.transpose(-1, -2), -1, p2c_index).transpose(-1, -2)
        return score


class PerRowDisentangledSelfAttentionV2(modeling_deberta_v2.DisentangledSelfAttention):
    """Attention of DeBERTa-v2 and -v3 that projects relative positions for each row."""

    def disentangled_attention_bias(
        self, query: Tensor, key: Tensor, relative_pos: Any, rel_embeddings: Tensor, scale_factor: int
    ) -> Any:
        """Compute the scores between contents and relative positions.

        Args:
            query: Queries, (rows * heads, length, head size).
            key: Keys, (rows * heads, length, head size).
            relative_pos: Position of each query minus that of each key, (1, length, length); the number of
                its bucket if the model has buckets.
            rel_embeddings: The position table, (positions, features), or with a dropout mask per row
                (rows, positions, features).
            scale_factor: The number of kinds of scores. Scores are divided by sqrt(head size * scale_factor).

        Returns:
            Scores to add to those of contents, (rows * heads, length, length).
        """
        batch_heads, length, size = query.shape
        heads, span = self.num_attention_heads, self.pos_ebd_size
        # Distances up to half the number of buckets have a bucket each. Longer ones share buckets: then the
        # whole table is needed.
        near = self.position_buckets <= 0 or length - 1 <= self.position_buckets // 2
        reach = min(length - 1, span) if near else span
        table = rel_embeddings[..., span - reach : min(span + reach + 1, 2 * span), :]
        c2p_index = _to_gather_index(relative_pos + reach, table.shape[-2]).expand(batch_heads, -1, -1)
        p2c_index = _to_gather_index(reach - relative_pos, table.shape[-2]).expand(batch_heads, -1, -1)
        rows = table.expand(batch_heads // heads, -1, -1)
        scale = (size * scale_factor) ** 0.5
        score: Any = 0
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            keys = self.transpose_for_scores(project(rows), heads)
            score = score + torch.gather(query @ keys.transpose(-1, -2), -1, c2p_index) / scale
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            queries = self.transpose_for_scores(project(rows), heads)
            p2c_score = torch.gather(key @ queries.transpose(-1, -2), -1, p2c_index) / scale
            score = score + p2c_score.transpose(-1, -2)
        return score


def _to_gather_index(positions: Tensor, size: int) -> Tensor:
    """Return indices for `torch.gather` into a table of `size` positions."""
    return positions.long().clamp(0, size - 1)


def check_liger(family: str, name: str) -> None:
    """Check that Liger and Triton are installed and that Liger supports a model.

    Liger is not imported, and no GPU is needed. `family` is the `model_type` in the model's config.json.

    Raises:
        UsageError: Liger or Triton is missing, or Liger has no kernels for the model.
    """
    if family not in FAMILIES:
        raise UsageError(
            f"--kernels liger: model {name!r} is of type {family!r}, and the kernels are for "
            f"{', '.join(FAMILIES)}; {REMEDY}."
        )
    require_package("--kernels liger", "liger_kernel", "gpu", f"or {REMEDY}")
    if find_spec("triton") is None:
        raise UsageError(
            f"--kernels liger needs triton, which is not installed: install torch for CUDA, or {REMEDY}."
        )


class KernelLaunchError(UsageError):
    """Liger's kernels cannot be compiled or launched on this machine."""

    fault = Fault.DEVICE
    """The cause is the machine and not a lane; see `classify_error`."""


def launch_kernel(device: Any) -> None:
    """Launch one of Liger's kernels on a device.

    Raises:
        KernelLaunchError: It cannot be compiled or launched.
    """
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    ones = torch.ones(1, 8, device=device)
    try:
        LigerSiLUMulFunction.apply(ones, ones)
    except Exception as error:  # the compiler, Triton and the driver raise various types
        if classify_error(error) is Fault.MEMORY:
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        remedy = f"install gcc and python3-dev (Python.h) on every node, or {REMEDY}"
        raise KernelLaunchError(
            f"--kernels liger: no kernel can be launched ({reason}): {remedy}."
        ) from error


def apply_liger(model: Any, name: str) -> str:
    """Replace the norms, the rotary embedding and the gated activation of a model by Liger's kernels.

    Args:
        model: A transformers model on a GPU, without adapters.
        name: The name that its user gave.

    Returns:
        The name of the kernels in the provenance of a record: "liger" and its version.

    Raises:
        UsageError: The model is not on a GPU, Liger is missing or has no kernels for it, or none compiles.
    """
    if model.device.type == "cpu":
        raise UsageError(f"--kernels liger: model {name!r} is on a CPU, and Liger needs a GPU; {REMEDY}.")
    check_liger(model.config.model_type, name)
    launch_kernel(model.device)
    replace_modules(model)
    return f"liger {version('liger-kernel')}"


def replace_modules(model: Any) -> None:
    """Let Liger replace the forward methods of a model's modules.

    Liger replaces names in transformers' modules as well, so models that the process loads later have the
    kernels too. A trainer has one choice of kernels for all its models.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, **KERNELS, **LOSSES)


def enable_activation_checkpointing(model: Any) -> None:
    """Make the blocks of a transformers model compute their activations again in the backward pass.

    Blocks are the modules that transformers itself can checkpoint. The change cannot be undone.

    Raises:
        UsageError: The model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"--gradient-checkpointing: {type(model).__name__} has no blocks that transformers can compute "
            "again; leave the option out."
        )
    for block in blocks:
        block.forward = _checkpoint_forward(block)
    setattr(model, CHECKPOINTING_ATTRIBUTE, True)


def _checkpoint_forward(block: Any) -> Any:
    """Return a forward method that keeps no activations and draws equal dropout masks each time."""
    forward = block.forward

    def context_fn() -> Any:
        state = next((m.adapter_state for m in block.modules() if hasattr(m, "adapter_state")), None)
        return (nullcontext(), nullcontext()) if state is None else state.checkpoint_contexts()

    @wraps(forward)
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation, generation
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    return checkpointed_forward
