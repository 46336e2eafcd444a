"""Decoding of one batch of answers, with a key-value cache of transformers.

transformers' `generate` computes every row until the last one has ended. Here rows that have ended leave the
batch, and on a GPU a decode step is a captured CUDA graph. Rows are ordered lane by lane, with an equal
number of rows for each lane, as the adapters expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.finetune.evaluation.cached_forward import CachedForward
from orchestrator.finetune.evaluation.generation_plan import MIN_ROWS
from orchestrator.finetune.evaluation.token_sampling import sample_tokens_in_chunks
from orchestrator.finetune.models.base_model import BaseModel

STOP_CHECK_INTERVAL = 8
"""The number of new tokens after which answers are searched for a stop string."""
GPU_END_CHECK_INTERVAL = 8
"""Number of new tokens between two checks whether all rows have ended. In each the host waits for the GPU."""
COMPACTION_INTERVAL = 32
"""The number of new tokens after which rows that have ended leave the batch."""


@dataclass(frozen=True)
class DecodingRules:
    """The rules by which the tokens of an answer are chosen and by which it ends."""

    max_new_tokens: int
    """The longest answer in tokens."""
    stop: Sequence[str] = ()
    """Texts that end an answer."""
    temperature: float = 0.0
    """0 for greedy decoding, else the temperature of sampling."""
    top_p: float = 1.0
    """The probability of the nucleus to sample from."""


@torch.no_grad()
def decode_answers(
    base_model: BaseModel,
    rules: DecodingRules,
    prompts: Tensor,
    prompt_mask: Tensor,
    lanes: int,
    uniforms: Tensor | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Decode the answers to prompts.

    Args:
        base_model: The base model, inside a context that activates the lanes.
        rules: The choice of tokens and the ends of answers.
        prompts: Token ids, padded on the left, (lanes * rows, length) on the device.
        prompt_mask: 0 at padding, else 1, of the same shape.
        lanes: The number of lanes, whose rows come one lane after another.
        uniforms: The numbers to sample with, (lanes * rows, max_new_tokens) on the device, if the
            temperature is not 0.
        on_progress: Called every `COMPACTION_INTERVAL` tokens.

    Returns:
        Token ids, (lanes * rows, max_new_tokens) on the device. Padding follows an end token, and the first
        check that finds a stop string.
    """
    tokenizer, row_count = base_model.tokenizer, len(prompts)
    answers = prompts.new_full((row_count, rules.max_new_tokens), tokenizer.pad_token_id)
    rows = torch.arange(row_count, device=prompts.device)  # the rows of `answers` that are still computed
    ended = torch.zeros(row_count, dtype=torch.bool, device=prompts.device)
    end_check_interval = 1 if prompts.device.type == "cpu" else GPU_END_CHECK_INTERVAL
    forward = CachedForward(base_model, prompts.shape[1] + rules.max_new_tokens)
    logits = forward.prefill(prompts, prompt_mask)
    for count in range(1, rules.max_new_tokens + 1):
        tokens = _choose_tokens(logits, rules, None if uniforms is None else uniforms[rows, count - 1])
        tokens = tokens.masked_fill(ended, tokenizer.pad_token_id)
        answers[rows, count - 1] = tokens
        ended |= tokens == tokenizer.eos_token_id
        if rules.stop and count % STOP_CHECK_INTERVAL == 0:
            ended |= _have_stop_string(answers[rows, :count], tokenizer, rules.stop)
        if count == rules.max_new_tokens or (count % end_check_interval == 0 and bool(ended.all())):
            break
        if count % COMPACTION_INTERVAL == 0:
            on_progress()
            if (kept := select_remaining_rows(ended, lanes, forward.max_kept_share)) is not None:
                rows, ended, tokens = rows[kept], ended[kept], tokens[kept]
                forward.select_rows(kept)
        logits = forward.step(tokens)
    return answers


def select_remaining_rows(ended: Tensor, lanes: int, max_kept_share: float) -> Tensor | None:
    """Select the rows that stay in the batch after some have ended.

    Every lane keeps as many rows as the lane with the most rows that have not ended, at least `MIN_ROWS`. A
    lane with fewer such rows keeps ended ones, because the adapters need an equal number for each lane.

    Args:
        ended: Whether each row has ended, (lanes * rows,), lane by lane.
        lanes: The number of lanes.
        max_kept_share: The selection is worth its cost if it keeps at most this share of the rows.

    Returns:
        The indices of the rows to keep, lane by lane; None if all rows stay.
    """
    by_lane = ended.view(lanes, -1)
    rows_per_lane = by_lane.shape[1]
    count = max(MIN_ROWS, int((~by_lane).sum(dim=1).max()))
    if count >= rows_per_lane or count > max_kept_share * rows_per_lane:
        return None
    # The order is stable, and rows that have not ended come first.
    kept = by_lane.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    first_rows = torch.arange(0, len(ended), rows_per_lane, device=ended.device)
    return (kept + first_rows[:, None]).flatten()


def _choose_tokens(logits: Tensor, rules: DecodingRules, uniforms: Tensor | None) -> Tensor:
    """Return the next token of each row, (rows,), from logits, (rows, vocabulary)."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    return sample_tokens_in_chunks(logits, uniforms, rules.temperature, rules.top_p)


def _have_stop_string(answers: Tensor, tokenizer: Any, stops: Sequence[str]) -> Tensor:
    """Return whether each answer has a stop string that ended since the last check, (rows,)."""
    # A token has at least one byte: so many tokens hold any stop string that ended since the last check.
    tail = STOP_CHECK_INTERVAL + max(len(stop.encode()) for stop in stops)
    texts = tokenizer.batch_decode(answers[:, -tail:], skip_special_tokens=True)
    found = [any(stop in text for stop in stops) for text in texts]
    return torch.tensor(found, device=answers.device)
