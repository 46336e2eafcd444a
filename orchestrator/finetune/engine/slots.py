"""How many lanes a trainer holds and evaluates at once. One rule: what did not fit into memory is halved.

The limits are kept in the store for the next trainer:

    root/lane_capacity/<hash of both keys>.json    {"group_key", "device_key", "training": 4, "evaluation": 2}

The device key has the device, its memory, a trainer's share of the device, and how the trainer uses it. Each
file has a checksum. After a file or the folder is removed, the next trainer starts without this knowledge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.util import atomic_files, timeouts

Work = Literal["training", "evaluation"]

MIN_USEFUL_LANES = 2
"""Number of lanes that a trainer holds if they fit, however many tokens they have."""
SATURATING_TOKENS = 9_000
"""Number of tokens in one forward pass up to which more lanes save time on a GPU, because lanes share the
time in which the host launches kernels. For Qwen3-0.6B and 2,000 tokens a lane, the default study's steps are
predicted to take 41.9, 28.2 and 20.8 hours of an H200 with 1, 2 and 4 lanes (24.8, 17.0 and 12.6 with fused
kernels); 8 lanes save nothing more. The number leaves room for rows that are a little longer."""


@dataclass
class LaneSlots:
    """The slots of a trainer: the limit of all lanes, the limits of group keys, and the parked lanes."""

    count: int
    """The largest number of lanes."""
    is_automatic: bool = False
    """If true, a group key gets no more lanes than save time; see `SATURATING_TOKENS`."""
    limits: dict[tuple[Work, str], int] = field(default_factory=dict)
    """(work, group key) -> lanes of this group key that fit into memory, as far as this trainer knows.

    An evaluation needs other memory than training: answers are generated with a cache of all their tokens."""
    parked_at: dict[str, float] = field(default_factory=dict)
    """Fingerprint -> time since which the lane has been parked, in the order of parking."""

    def limit(self, work: Work, group_key: str | None) -> int:
        """Return how many lanes of this group key may do this work at once."""
        return min(self.count, self.limits.get((work, group_key or ""), self.count))

    def useful(self, tokens: int) -> int:
        """Return how many lanes should train at once, if memory holds them.

        Args:
            tokens: Mean number of tokens in a micro-batch of one lane; read if the number is automatic.
        """
        enough = max(MIN_USEFUL_LANES, SATURATING_TOKENS // max(1, tokens))
        return min(self.count, enough) if self.is_automatic else self.count

    def list_long_parked(self, now: float) -> list[str]:
        """Return the fingerprints of the lanes parked for more than SPILL_SECONDS, the longest first.

        Args:
            now: The time of `time.monotonic`, in seconds.
        """
        return [name for name, since in self.parked_at.items() if now - since > timeouts.SPILL_SECONDS]

    def choose_leaving(self, lanes: Collection[Lane], mid_step: Sequence[Lane]) -> list[Lane]:
        """Return the lanes that leave so that no more than the limit remain.

        First lanes that have not started leave, then parked ones, then the ones that were leased last.

        Args:
            lanes: The lanes of the trainer.
            mid_step: Lanes whose optimizer step was interrupted. They leave in any case and are not returned.
        """
        eviction_priority = {LaneState.PARKED: 1, LaneState.LEASED: 2}
        staying = [lane for lane in lanes if lane not in mid_step]
        staying.sort(key=lambda lane: eviction_priority.get(lane.state, 0))
        return staying[self.limit("training", next(iter(lanes)).configuration.group_key) :]


class StoredLimits:
    """The limits of a group key on a device, as the store has them. A damaged file counts as missing.

    Args:
        folder: The store's folder of limits.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.
    """

    def __init__(self, folder: Path, group_key: str, device_key: str) -> None:
        name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
        self.path = folder / f"{name}.json"
        self._keys = {"group_key": group_key, "device_key": device_key}

    def read(self) -> dict[Work, int]:
        """Return the known limits."""
        with suppress(OSError, ValueError, TypeError):
            content = json.loads(atomic_files.verify_checksum(self.path.read_bytes()))
            works: tuple[Work, ...] = ("training", "evaluation")
            return {work: int(content[work]) for work in works if work in content}
        return {}

    def write(self, work: Work, lanes: int) -> None:
        """Store a limit. A smaller stored one is kept.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.lock_folder(self.path.parent):
            content = self.read()
            content[work] = min(content.get(work, lanes), lanes)
            text = json.dumps({**self._keys, **content}, indent=1)
            atomic_files.write_atomically(self.path, atomic_files.add_checksum(text))
