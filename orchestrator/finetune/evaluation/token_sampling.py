"""The tokens of sampled answers: a draw that depends on a lane's seed, the item, the sample and the position,
and on nothing else, whoever shares the batch.

The uniform numbers are made beforehand, on the CPU, by numpy; a token is where its number falls in the
distribution function of the model's softmax (inverse transform), over the vocabulary in its own order. Plain
greedy decoding around it then takes what was drawn. torch's global generator, which transformers' sampling
uses, is never asked: it would give a lane other tokens in another pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

ROWS_PER_CHUNK = 32
"""Rows drawn at once: float64 over a vocabulary of 150,000 is 1.2 MB a row, several times over."""


def draw_uniforms(seed: int, item: int, sample: int, count: int) -> np.ndarray:
    """(count,) in [0, 1): one a position of an answer, always the same for a seed, item and sample."""
    # RandomState, because numpy promises that its streams never change.
    return np.random.RandomState([seed % 2**32, seed // 2**32, item, sample]).random_sample(count)


class InverseTransformLogitsProcessor(LogitsProcessor):
    """Leaves one token a row: the drawn one. `numbers` (rows, positions) are its uniforms, the first of them
    for the token after a prompt of `start` tokens (padding included)."""

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float, top_p: float = 1.0) -> None:
        self.uniforms, self.prompt_length, self.temperature, self.top_p = (
            uniforms,
            prompt_length,
            temperature,
            top_p,
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step_uniforms = self.uniforms[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        parts = zip(scores.split(ROWS_PER_CHUNK), step_uniforms.split(ROWS_PER_CHUNK), strict=True)
        token = torch.cat(
            [sample_tokens(part, number, self.temperature, self.top_p) for part, number in parts]
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """(rows,) token ids from logits (rows, vocabulary) and uniforms (rows,). `top_p` below 1 keeps the most
    probable tokens that together have that probability, the one that reaches it included (nucleus sampling).

    In the order of the vocabulary, not of probability: two nearly equal ones that change places, by rounding,
    would change what is drawn."""
    weights = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, sorted_ids = weights.sort(dim=-1, descending=True, stable=True)
        outside_nucleus = ordered.cumsum(dim=-1) - ordered >= top_p
        weights = weights.masked_fill(
            torch.zeros_like(outside_nucleus).scatter_(1, sorted_ids, outside_nucleus), 0.0
        )
    total = weights.cumsum(dim=-1)
    # `right` passes over tokens without a weight; rounding may reach past the last one that has some.
    found = torch.searchsorted(total, uniforms.double()[:, None] * total[:, -1:], right=True).squeeze(1)
    last = torch.where(weights > 0, torch.arange(weights.shape[1], device=weights.device), 0).amax(dim=-1)
    return torch.minimum(found, last)


def draw_uniform_table(seeds: Sequence[int], item_samples: Sequence[tuple[int, int]], count: int) -> Tensor:
    """(lanes * places, count) uniforms, lane by lane; `places`: the (item, sample) of each row."""
    rows = [draw_uniforms(seed, item, sample, count) for seed in seeds for item, sample in item_samples]
    return torch.from_numpy(np.stack(rows))
