"""The fixtures of tests/study/in_process.py."""

from __future__ import annotations

from in_process import restored, run

__all__ = ["restored", "run"]
