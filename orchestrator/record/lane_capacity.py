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


def most_lanes(folder: Path, shape: str, place: str) -> int | None:
    """Lanes of `shape` that fit on `place`; None when nothing is known, or what is known cannot be read."""
    try:
        found = json.loads(atomic_files.unseal(file_of(folder, shape, place).read_bytes()))
        lanes = found["lanes"] if (found["shape"], found["place"]) == (shape, place) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return lanes if isinstance(lanes, int) and lanes >= 1 else None


def remember(folder: Path, shape: str, place: str, lanes: int, tried: int) -> Path:
    """`tried` lanes at once had not enough memory, so there are to be no more than `lanes`; what is known to
    be less stays. Returns the file. Raises OSError when the disk refuses."""
    path = file_of(folder, shape, place)
    known = most_lanes(folder, shape, place)
    if known is None or lanes < known:
        folder.mkdir(parents=True, exist_ok=True)
        data = {"shape": shape, "place": place, "lanes": lanes, "tried": tried}
        atomic_files.replace(path, atomic_files.seal(json.dumps(data, indent=1)))
    return path


def file_of(folder: Path, shape: str, place: str) -> Path:
    """Where that is kept, if it is."""
    name = hashlib.sha256(f"{shape} {place}".encode()).hexdigest()[:24]
    return folder / f"{name}.json"
