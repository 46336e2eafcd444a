"""How many lanes of a shape a machine has memory for, learnt the hard way and kept beside the records.

    root/limits/<shape and place, hashed>.json    {"shape", "place", "lanes", "tried"}, sealed

The place says all that counts but the shape: the device and its memory, a seat's share of it, how it is used.

Removing a file, or the folder, makes the next seat try as many as it is told to again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from orchestrator.util import atomic_files


def read_max_lanes(folder: Path, group_key: str, device_key: str) -> int | None:
    """Lanes of `shape` that fit on `place`; None when nothing is known, or what is known cannot be read."""
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
    """`tried` lanes at once had not enough memory, so there are to be no more than `lanes`; what is known to
    be less stays. Returns the file. Raises OSError when the disk refuses."""
    path = capacity_file(folder, group_key, device_key)
    previous = read_max_lanes(folder, group_key, device_key)
    if previous is None or max_lanes < previous:
        folder.mkdir(parents=True, exist_ok=True)
        data = {"shape": group_key, "place": device_key, "lanes": max_lanes, "tried": attempted_lanes}
        atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(data, indent=1)))
    return path


def capacity_file(folder: Path, group_key: str, device_key: str) -> Path:
    """Where that is kept, if it is."""
    name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
    return folder / f"{name}.json"
