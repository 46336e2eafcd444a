"""Lane capacities: how many lanes of a group key train at once on a device.

    root/lane_capacity/<hash of both keys>.json    {"group_key", "device_key", "lanes", "measured_lanes"}

The device key has the device, its memory, a trainer's share of the device, and how the trainer uses it.
"lanes" is the limit learned from an out-of-memory error, if there was one, and holds for every study.
"measured_lanes" is the number that a trainer chose by the memory of its steps with one and two lanes, if it
did, and holds where --lanes-per-trainer is not given. Each file has a checksum. After a file or the folder is
removed, the next trainer starts without this knowledge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.util import atomic_files


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
        self._keys = {"group_key": group_key, "device_key": device_key}
        content = self._read()
        self.lanes: int | None = content.get("lanes")
        """The number of lanes that fit, as learned from out-of-memory errors; None if it is not known."""
        self.measured: int | None = content.get("measured_lanes")
        """The number of lanes that a trainer chose by measurement; None if it is not known."""

    def write_max_lanes(self, max_lanes: int) -> None:
        """Store the number of lanes after an out-of-memory error. A smaller stored number is kept.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        with self._update() as content:
            content["lanes"] = min(content.get("lanes", max_lanes), max_lanes)

    def write_measured(self, lanes: int) -> None:
        """Store the number of lanes that a trainer chose by measurement.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        with self._update() as content:
            content["measured_lanes"] = lanes

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            content = json.loads(atomic_files.verify_checksum(self.path.read_bytes()))
        return content | self._keys

    @contextmanager
    def _update(self) -> Iterator[dict[str, Any]]:
        """Yield the stored content, and write it after the block. Other trainers wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.lock_folder(self.path.parent):
            content = self._read()
            yield content
            text = json.dumps(content, indent=1)
            atomic_files.write_atomically(self.path, atomic_files.add_checksum(text))
