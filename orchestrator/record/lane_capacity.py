"""Lane capacities: how many lanes of a group key fit on a device, learned from out-of-memory errors.

    root/limits/<hash of group key and device key>.json    {"shape", "place", "lanes", "tried"}, with checksum

"shape" is the group key, "place" the device key: the device and its memory, a trainer's share of it, and how
it is used. After a file or the folder is removed, the next trainer tries as many lanes as its options say.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from orchestrator.util import atomic_files


def read_max_lanes(folder: Path, group_key: str, device_key: str) -> int | None:
    """Return the number of lanes that fit.

    Args:
        folder: The store's folder of capacities.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.

    Returns:
        The number; None if it is not known, or its file cannot be read.
    """
    try:
        found = json.loads(
            atomic_files.verify_checksum(capacity_file(folder, group_key, device_key).read_bytes())
        )
        lanes = found["lanes"] if (found["shape"], found["place"]) == (group_key, device_key) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return lanes if isinstance(lanes, int) and lanes >= 1 else None


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
    path = capacity_file(folder, group_key, device_key)
    previous = read_max_lanes(folder, group_key, device_key)
    if previous is None or max_lanes < previous:
        folder.mkdir(parents=True, exist_ok=True)
        data = {"shape": group_key, "place": device_key, "lanes": max_lanes, "tried": attempted_lanes}
        atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(data, indent=1)))
    return path


def capacity_file(folder: Path, group_key: str, device_key: str) -> Path:
    """Return the path of a capacity's file, which need not exist."""
    name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
    return folder / f"{name}.json"
