"""Distributed experiment orchestration for LoRA-variant studies, on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.analyze.study_frames import StudyFrames


def load(study: str, *, output: str | Path | None = None, store: str | Path | None = None) -> StudyFrames:
    """Load the results of a study as pandas frames; see `orchestrator.analyze.study_frames.load`."""
    from orchestrator.analyze import study_frames  # pandas and SciPy, which few imports of this package need

    return study_frames.load(study, output=output, store=store)


def __getattr__(name: str) -> str:
    """Return `__version__` from the metadata of the installed package; "unknown" without an installation."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lora-orchestrator")
    except PackageNotFoundError:
        return "unknown"
