"""AdamW on the head alone."""

from __future__ import annotations

from parity import Reference

REFERENCE = Reference(None, models=("headed",))
