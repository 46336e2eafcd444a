"""Lane capacities: how many lanes of a group key train at once on a device.

    root/lane_capacity/<hash of both keys>.json    {"group_key", "device_key", "lanes", "tried", "measured"}

The device key has the device, its memory, a trainer's share of the device, and how the trainer uses it.
"lanes" is the limit learned from an out-of-memory error with "tried" lanes, if there was one, and holds for
every study. "measured" is the number that a trainer chose by the memory of its steps with one and
with two lanes, if it did, and holds where --lanes-per-trainer is not given. Each file has a checksum. After a
file or the folder is removed, the next trainer starts without this knowledge.
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
    """Return the number of lanes that fit, as learned from out-of-memory errors.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.

    Returns:
        The number; None if it is not known, or its file cannot be read.
    """
    lanes = _read(capacity_file(folder, group_key, device_key), group_key, device_key).get("lanes")
    return lanes if isinstance(lanes, int) and lanes >= 1 else None


def read_measured(folder: Path, group_key: str, device_key: str) -> MeasuredLanes | None:
    """Return the number of lanes that a trainer chose by measurement; None if it is not known.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device.
    """
    found = _read(capacity_file(folder, group_key, device_key), group_key, device_key)
    try:
        measured = MeasuredLanes(**found["measured"])
    except (KeyError, TypeError):
        return None
    return measured if measured.lanes >= 1 else None


def write_max_lanes(
    folder: Path, group_key: str, device_key: str, max_lanes: int, attempted_lanes: int
) -> Path:
    """Store a capacity after an out-of-memory error. A smaller stored capacity is kept.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device.
        max_lanes: The new largest number of lanes.
        attempted_lanes: The number of lanes that did not fit.

    Returns:
        The file.

    Raises:
        OSError: The disk is full or cannot be used.
    """
    previous = read_max_lanes(folder, group_key, device_key)
    if previous is None or max_lanes < previous:
        return _write(folder, group_key, device_key, {"lanes": max_lanes, "tried": attempted_lanes})
    return capacity_file(folder, group_key, device_key)


def write_measured(folder: Path, group_key: str, device_key: str, measured: MeasuredLanes) -> Path:
    """Store the number of lanes that a trainer chose by measurement, beside a limit that is known already.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device.
        measured: The number, and its reasons.

    Returns:
        The file.

    Raises:
        OSError: The disk is full or cannot be used.
    """
    return _write(folder, group_key, device_key, {"measured": asdict(measured)})


def capacity_file(folder: Path, group_key: str, device_key: str) -> Path:
    """Return the path of a capacity's file, which need not exist."""
    name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
    return folder / f"{name}.json"


def _read(path: Path, group_key: str, device_key: str) -> dict[str, Any]:
    """Return the content of a capacity's file; empty if it cannot be read or has other keys than given."""
    try:
        found = json.loads(atomic_files.verify_checksum(path.read_bytes()))
        return found if (found["group_key"], found["device_key"]) == (group_key, device_key) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(folder: Path, group_key: str, device_key: str, content: dict[str, Any]) -> Path:
    """Write a capacity's file with new content; entries that are not in `content` are kept."""
    path = capacity_file(folder, group_key, device_key)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "group_key": group_key,
        "device_key": device_key,
        **_read(path, group_key, device_key),
        **content,
    }
    atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(data, indent=1)))
    return path
