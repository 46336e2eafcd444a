"""The fixtures of tests/study/in_process.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "study"))

from in_process import restored, run

__all__ = ["restored", "run"]
