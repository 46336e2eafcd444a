"""The canonical spelling of a JSON value, from which hashes are computed."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(data: Any) -> bytes:
    """Return the one spelling of a JSON value: sorted keys, no blanks.

    Args:
        data: A value of JSON's types.

    Raises:
        ValueError: The value contains NaN or an infinite number.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
