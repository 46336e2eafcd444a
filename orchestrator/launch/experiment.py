"""The question of an experiment script, and its defaults for the options that all scripts share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """A script's question and its defaults.

    `baseline`, `margin` and `tuning_study` describe a study that compares variants on fresh seeds; they are
    kept in `study.json`, see `orchestrator.record.study_file.StudyFile`.
    """

    script: str
    """The script's name without `.py`."""
    question: str
    """The question that the study answers, one sentence."""
    variants: tuple[str, ...]
    """The variants of a run without --variants."""
    task: str
    """The task of a run without --task."""
    dry_run_task: str
    """The task of a --dry-run without --task."""
    baseline: str = ""
    """The variant that the others are compared with. Empty: the study compares nothing."""
    margin: float = 0.01
    """The smallest difference of the test score that matters."""
    tuning_study: str = ""
    """The name of the study that chose the configurations."""

    def default_task(self, dry_run: bool) -> str:
        """Return the task of a run without --task."""
        return self.dry_run_task if dry_run else self.task
