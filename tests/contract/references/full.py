"""AdamW on the model itself."""

from __future__ import annotations

from parity import Reference

REFERENCE = Reference(None)
