"""Random seeds that depend on names and not on the order of draws."""

from __future__ import annotations

import hashlib

from torch import Generator


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*parts: int | str) -> Generator:
    """Return a new generator on the CPU, whose seed is `stable_seed(*parts)`."""
    return Generator().manual_seed(stable_seed(*parts))
