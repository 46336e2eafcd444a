"""Distributed experiment orchestration for LoRA-variant studies, on Ray.

`Study`, `plan`, `run` and `load` do in Python what the program `lora-orchestrator` does on the command line.
They are imported at their first use, so that the import of this package is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.analyze.analysis import load as load
    from orchestrator.python_api import Study as Study
    from orchestrator.python_api import plan as plan
    from orchestrator.python_api import run as run

    __version__: str

__all__ = ["Study", "__version__", "load", "plan", "run"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` at its first use."""
    if name == "load":
        from orchestrator.analyze import analysis

        return analysis.load
    if name in ("Study", "plan", "run"):
        from orchestrator import python_api

        return getattr(python_api, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lora-orchestrator")
        except PackageNotFoundError:  # a clone that is not installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
