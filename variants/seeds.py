"""Random seeds that depend on names and not on the order of draws."""

from __future__ import annotations

import hashlib

import torch


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def parameter_generator(generator: torch.Generator, parameter: str) -> torch.Generator:
    """Return a generator for one parameter, independent of what was drawn from `generator` before.

    Args:
        generator: The generator of one lane and layer, of which only the seed is used.
        parameter: The parameter's name.
    """
    return torch.Generator().manual_seed(stable_seed(generator.initial_seed(), parameter))
