"""Lane capacities: how many lanes of a group key train at once on a device.

    root/lane_capacity/<hash of both keys>.json    {"group_key", "device_key", "lanes", "measured"}

The device key has the device, its memory, a trainer's share of the device, and how the trainer uses it.
"lanes" is the limit learned from an out-of-memory error, if there was one, and holds for every study.
"measured" is the number that a trainer chose by the memory of its steps with one and two lanes, if it did,
and holds where --lanes-per-trainer is not given. Each file has a checksum. After a file or the folder is
removed, the next trainer starts without this knowledge.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.util import atomic_files


@dataclass(frozen=True)
class MeasuredLanes:
    """The number of lanes that a trainer chose by measurement, and the reasons."""

    lanes: int
    """The number of lanes that train at once."""
    fitting: int
    """The number of lanes that fit into memory, by linear extrapolation."""
    one_lane_bytes: int
    """The peak memory of a step with one lane."""
    two_lanes_bytes: int
    """The peak memory of a step with two lanes."""
    tokens: int
    """Mean number of tokens in a micro-batch of one lane."""

    def __str__(self) -> str:
        one, two = self.one_lane_bytes / 2**30, self.two_lanes_bytes / 2**30
        reason = "" if self.lanes == self.fitting else f", {self.tokens} tokens per lane and micro-batch"
        return f"one lane needs {one:.1f} GiB, two {two:.1f}: {self.fitting} fit{reason}"


class LaneCapacity:
    """The capacity of a device for the lanes of a group key, as the store has it.

    A damaged file counts as missing.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.
    """

    def __init__(self, folder: Path, group_key: str, device_key: str) -> None:
        name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
        self.path = folder / f"{name}.json"
        self._content: dict[str, Any] = {"group_key": group_key, "device_key": device_key}
        with suppress(OSError, ValueError):
            self._content |= json.loads(atomic_files.verify_checksum(self.path.read_bytes()))
        self.lanes: int | None = self._content.get("lanes")
        """The number of lanes that fit, as learned from out-of-memory errors; None if it is not known."""
        self.measured: int | None = self._content.get("measured", {}).get("lanes")
        """The number of lanes that a trainer chose by measurement; None if it is not known."""

    def write_max_lanes(self, max_lanes: int) -> None:
        """Store the number of lanes after an out-of-memory error. A smaller stored number is kept.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        self._write(lanes=min(self.lanes or max_lanes, max_lanes))

    def write_measured(self, measured: MeasuredLanes) -> None:
        """Store the number of lanes that a trainer chose by measurement.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        self._write(measured=asdict(measured))

    def _write(self, **content: Any) -> None:
        self._content |= content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._content, indent=1)
        atomic_files.write_atomically(self.path, atomic_files.add_checksum(text))
