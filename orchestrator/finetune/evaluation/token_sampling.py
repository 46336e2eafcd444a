"""Sampling of answer tokens that depends only on a lane's seed, the item, the sample number and the position.

torch's global generator, which transformers samples with, would give a lane other tokens in another lane
group. Here numpy draws uniform numbers on the CPU in advance. A token is found by inverse transform sampling:
it is the one at which the cumulative distribution of the model's softmax, in the order of the vocabulary,
passes the uniform number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROWS_PER_CHUNK = 32
"""Rows sampled at once. A row takes 1.2 MB per float64 copy with a vocabulary of 150,000."""


def draw_uniforms(seed: int, item: int, sample: int, count: int) -> np.ndarray:
    """Draw uniform numbers from [0, 1).

    Args:
        seed: The lane's seed.
        item: The item number.
        sample: The number of the sample of that item.
        count: The number of positions.

    Returns:
        The numbers, (count,), equal for equal arguments; those of a larger count begin with them.
    """
    # RandomState, because numpy promises that its streams never change.
    return np.random.RandomState([seed % 2**32, seed // 2**32, item, sample]).random_sample(count)


def draw_uniform_table(seeds: Sequence[int], item_samples: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Draw the uniform numbers of several lanes.

    Args:
        seeds: The seed of each lane.
        item_samples: The item and sample number of each row of a lane.
        count: The number of positions.

    Returns:
        The numbers, (lanes * rows, count), lane by lane.
    """
    rows = [draw_uniforms(seed, item, sample, count) for seed in seeds for item, sample in item_samples]
    return torch.from_numpy(np.stack(rows))


def sample_tokens_in_chunks(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0
) -> Tensor:
    """Sample one token per row, `ROWS_PER_CHUNK` rows at a time; see `sample_tokens`."""
    parts = zip(logits.split(ROWS_PER_CHUNK), uniforms.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([sample_tokens(part, numbers, temperature, top_p) for part, numbers in parts])


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Sample one token per row.

    The cumulative distribution follows the order of the vocabulary, not of probability: rounding could swap
    two nearly equal probabilities, and another token would be sampled.

    Args:
        logits: The model's logits, (rows, vocabulary).
        uniforms: A number from [0, 1) per row, (rows,).
        temperature: Divides the logits.
        top_p: Below 1, sample only from the nucleus: the most probable tokens, up to the one with which their
            total probability reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751).

    Returns:
        Token ids, (rows,).
    """
    weights = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, sorted_ids = weights.sort(dim=-1, descending=True, stable=True)
        outside_nucleus = ordered.cumsum(dim=-1) - ordered >= top_p
        weights = weights.masked_fill(
            torch.zeros_like(outside_nucleus).scatter_(1, sorted_ids, outside_nucleus), 0.0
        )
    total = weights.cumsum(dim=-1)
    # right=True skips tokens of weight 0. By rounding the index may pass the last token with a weight.
    found = torch.searchsorted(total, uniforms.double()[:, None] * total[:, -1:], right=True).squeeze(1)
    last = torch.where(weights > 0, torch.arange(weights.shape[1], device=weights.device), 0).amax(dim=-1)
    return torch.minimum(found, last)
