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


def read_max_lanes(folder: Path, group_key: str, device_key: str) -> int | None:
    """Return the number of lanes that fit, as learned from out-of-memory errors; None if it is not known.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.
    """
    return _read(folder, group_key, device_key).get("lanes")


def read_measured(folder: Path, group_key: str, device_key: str) -> MeasuredLanes | None:
    """Return the number of lanes that a trainer chose by measurement; None if it is not known."""
    found = _read(folder, group_key, device_key).get("measured")
    return MeasuredLanes(**found) if found else None


def write_max_lanes(folder: Path, group_key: str, device_key: str, max_lanes: int) -> Path:
    """Store a capacity after an out-of-memory error, and return the file. A smaller stored one is kept.

    Raises:
        OSError: The disk is full or cannot be used.
    """
    known = read_max_lanes(folder, group_key, device_key) or max_lanes
    return _write(folder, group_key, device_key, lanes=min(known, max_lanes))


def write_measured(folder: Path, group_key: str, device_key: str, measured: MeasuredLanes) -> None:
    """Store the number of lanes that a trainer chose by measurement, beside a limit that is known already.

    Raises:
        OSError: The disk is full or cannot be used.
    """
    _write(folder, group_key, device_key, measured=asdict(measured))


def capacity_file(folder: Path, group_key: str, device_key: str) -> Path:
    """Return the path of a capacity's file, which need not exist."""
    name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
    return folder / f"{name}.json"


def _read(folder: Path, group_key: str, device_key: str) -> dict[str, Any]:
    """Return the content of a capacity's file; empty if there is no whole one."""
    try:
        data = capacity_file(folder, group_key, device_key).read_bytes()
        found: dict[str, Any] = json.loads(atomic_files.verify_checksum(data))
    except (OSError, ValueError):
        return {}
    return found


def _write(folder: Path, group_key: str, device_key: str, **content: Any) -> Path:
    """Write a capacity's file with new content; other entries are kept."""
    path = capacity_file(folder, group_key, device_key)
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"group_key": group_key, "device_key": device_key}
    data = {**keys, **_read(folder, group_key, device_key), **content}
    atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(data, indent=1)))
    return path
