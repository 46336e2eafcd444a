"""Question of an experiment script, and its defaults of options that all scripts share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.record.study_file import AnalysisSettings
from orchestrator.study.options import StudyOptions
from orchestrator.util.graceful_interrupts import format_command


@dataclass(frozen=True)
class StudyRequest:
    """What the user has asked for, before an experiment changes any option."""

    options: StudyOptions | None = None
    """The options as they were given; None if these are the ones that `run_study` gets."""
    command: str = ""
    """The shell command that starts this study; empty for the command of this process."""
    on_plan: Callable[[Any], object] = lambda plan: None
    """Called with each `Plan` that was printed."""
    on_study: Callable[[str, Path], object] = lambda name, folder: None
    """Called with the name and the folder of each study that begins."""


@dataclass(frozen=True)
class Experiment:
    """Question, defaults and analysis of an experiment script."""

    name: str
    """The subcommand of the program: study, tuned or sensitivity."""
    script: str
    """Name of the script without `.py`."""
    question: str
    """The question that the study answers, in one sentence."""
    variants: tuple[str, ...]
    """Default of --variants."""
    tasks: tuple[str, ...]
    """Default of --task."""
    dry_run_tasks: tuple[str, ...]
    """Default of --task with --dry-run."""
    dry_run_variants: tuple[str, ...] = ()
    """Default of --variants with --dry-run; empty for the same as `variants`."""
    settings: AnalysisSettings = field(default_factory=AnalysisSettings)
    """Kind of the study and settings of its analysis."""
    request: StudyRequest = StudyRequest()
    """What the user has asked for."""

    @property
    def command(self) -> str:
        """The command of the study, as a line for a shell without secrets."""
        return self.request.command or format_command(sys.argv)

    def default_tasks(self, dry_run: bool) -> tuple[str, ...]:
        """Return the default of --task."""
        return self.dry_run_tasks if dry_run else self.tasks

    def default_variants(self, dry_run: bool) -> tuple[str, ...]:
        """Return the default of --variants."""
        return (self.dry_run_variants if dry_run else ()) or self.variants
