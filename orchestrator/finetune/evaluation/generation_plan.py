"""The sizes of the batches in which answers are generated, and how many lanes generate together.

On a GPU a decode step with few rows takes as long as one with many, so a batch has as many rows as the memory
for the key-value cache allows. On a CPU the time grows with the rows, and the sizes are constants. The sizes
depend on the task, the model and the device, not on the number of lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from orchestrator.finetune.data.batches import bucket_length
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup

MIN_ROWS = 8
"""Rows of a lane in a batch, unless the split has fewer. With fewer rows the CPU may select another kernel,
whose results differ in the last bits."""
MAX_GPU_ROWS = 512
"""Rows of a lane in a batch on a GPU, at most. With more the time of a decode step grows with the rows."""
MAX_CPU_ROWS = 64
CPU_PROMPT_TOKENS = 4096
CPU_CACHE_TOKENS = 8 * CPU_PROMPT_TOKENS
"""The limits of a batch on a CPU are `MAX_CPU_ROWS`, `CPU_PROMPT_TOKENS` and `CPU_CACHE_TOKENS`; see
`GenerationLimits`."""
GPU_CACHE_SHARE = 0.5
"""The part of the free memory of a GPU that the key-value cache takes."""
GPU_PROMPT_SHARE = 0.25
"""The part of the free memory of a GPU that the activations of the prompts take."""
CPU_CACHE_SHARE = 0.25
"""The part of the free memory of the machine that the cache takes; other trainers may run beside this one."""

BatchPlan = Sequence[tuple[int, Sequence[int]]]
"""The padded length of the prompts and the item numbers of each batch."""


@dataclass(frozen=True)
class GenerationLimits:
    """The limits of a batch, in rows and tokens."""

    max_rows: int
    """Rows of one lane."""
    prompt_tokens: int
    """Tokens of the padded prompts of one lane."""
    cache_tokens: int
    """Tokens of the prompts and answers of one lane."""
    group_prompt_tokens: int
    """Tokens of the padded prompts of all lanes that generate together."""
    group_cache_tokens: int
    """Tokens of the prompts and answers of all lanes that generate together."""
    mixes_lengths: bool
    """Whether prompts of different padded lengths may share a batch, which makes fewer batches."""

    @classmethod
    def from_memory(
        cls, config: Any, value_bytes: int, free_bytes: int, device_type: str, memory_share: float = 1.0
    ) -> GenerationLimits:
        """Derive the limits from a model's dimensions and the free memory.

        Args:
            config: The transformers configuration of the model.
            value_bytes: Bytes of a value of the cache and of the activations.
            free_bytes: Free memory of the device.
            device_type: "cpu" or "cuda".
            memory_share: The part of these limits to use.
        """
        shape = config.get_text_config()
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        key_value_heads = getattr(shape, "num_key_value_heads", None) or heads
        head_size = getattr(shape, "head_dim", None) or hidden // heads
        cached = shape.num_hidden_layers * 2 * key_value_heads * head_size * value_bytes
        # About what one block holds at once for a token: normed and residual states, queries, the MLP.
        inner = getattr(shape, "intermediate_size", None) or 4 * hidden
        activation = (8 * hidden + 4 * inner) * value_bytes
        on_gpu = device_type == "cuda"
        cache_share = GPU_CACHE_SHARE if on_gpu else CPU_CACHE_SHARE
        group_cache = _round_down(memory_share * cache_share * free_bytes / cached)
        group_prompt = _round_down(memory_share * GPU_PROMPT_SHARE * free_bytes / activation)
        if on_gpu:
            return cls(MAX_GPU_ROWS, group_prompt, group_cache, group_prompt, group_cache, True)
        rows, prompt, cache = (
            int(memory_share * limit) for limit in (MAX_CPU_ROWS, CPU_PROMPT_TOKENS, CPU_CACHE_TOKENS)
        )
        return cls(rows, prompt, cache, group_prompt, group_cache, False)

    @classmethod
    def measure(cls, base_model: BaseModel, process_group: ProcessGroup) -> GenerationLimits:
        """Derive the limits from the memory that is free now.

        Args:
            base_model: The base model, whose device is looked at.
            process_group: The processes that generate together. The one with the least memory decides, so
                the limits are equal in all.
        """
        state = base_model.generation.memory_share, _free_bytes(base_model)
        shares, free = zip(*process_group.all_gather(state), strict=True)
        value_bytes = base_model.model.dtype.itemsize
        return cls.from_memory(
            base_model.model.config, value_bytes, min(free), base_model.device.type, min(shares)
        )

    def rows(self, length: int, max_new_tokens: int) -> int:
        """Return the number of rows of a lane in a batch, at least `MIN_ROWS`.

        Args:
            length: The padded length of the prompts.
            max_new_tokens: The longest answer in tokens.
        """
        by_prompt = self.prompt_tokens // max(1, length)
        by_cache = self.cache_tokens // max(1, length + max_new_tokens)
        return max(MIN_ROWS, min(self.max_rows, by_prompt, by_cache))

    def lanes(self, plan: BatchPlan, max_new_tokens: int) -> int:
        """Return how many lanes fit into memory if they generate their answers together, at least 1.

        Args:
            plan: The batches in which each of the lanes generates its answers.
            max_new_tokens: The longest answer in tokens.
        """
        prompt = max(length * len(items) for length, items in plan)
        cache = max((length + max_new_tokens) * len(items) for length, items in plan)
        by_prompt, by_cache = self.group_prompt_tokens // max(1, prompt), self.group_cache_tokens // cache
        return max(1, min(by_prompt, by_cache))


def plan_generation_batches(
    lengths: Sequence[int],
    max_row_length: int,
    max_new_tokens: int,
    limits: GenerationLimits,
    workers: int = 1,
) -> list[tuple[int, list[int]]]:
    """Group prompts into batches.

    Args:
        lengths: The length of each prompt in tokens; at least one.
        max_row_length: The largest padded length, except for prompts that are longer.
        max_new_tokens: The longest answer in tokens.
        limits: The limits of a batch.
        workers: The processes that share the batches.

    Returns:
        The padded length and the prompt numbers of each batch.
    """
    by_bucket: dict[int, list[int]] = {}
    for prompt, length in enumerate(lengths):
        by_bucket.setdefault(bucket_length(length, max_row_length), []).append(prompt)
    plan: list[tuple[int, list[int]]] = []
    if not limits.mixes_lengths:
        for length, prompts in sorted(by_bucket.items()):
            # Batches of nearly equal size: a small last batch would have fewer than MIN_ROWS rows.
            batch_count = -(-len(prompts) // limits.rows(length, max_new_tokens))
            plan += [(length, part.tolist()) for part in np.array_split(prompts, batch_count)]
        return plan
    fair_share = max(MIN_ROWS, -(-len(lengths) // workers))
    waiting = [(length, prompt) for length in sorted(by_bucket, reverse=True) for prompt in by_bucket[length]]
    while waiting:
        longest = waiting[0][0]
        rows = min(fair_share, limits.rows(longest, max_new_tokens))
        plan.append((longest, [prompt for _, prompt in waiting[:rows]]))
        waiting = waiting[rows:]
    return plan


def _free_bytes(base_model: BaseModel) -> int:
    """Return the memory of the device that this process can still allocate."""
    device = base_model.device
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    return max(0, min(free + unused, int(total * base_model.memory_fraction) - allocated))


def _round_down(tokens: float) -> int:
    """Round down to three significant binary digits, so that small differences of memory do not count."""
    unit = 1 << max(0, int(tokens).bit_length() - 3)
    return int(tokens) // unit * unit
