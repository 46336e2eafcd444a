"""The question of an experiment script, and its defaults for the options that all scripts share."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.record.study_file import AnalysisSettings


@dataclass(frozen=True)
class Experiment:
    """A script's question and its defaults."""

    script: str
    """The script's name without `.py`."""
    question: str
    """The question that the study answers, one sentence."""
    variants: tuple[str, ...]
    """The variants of a run without --variants."""
    tasks: tuple[str, ...]
    """The tasks of a run without --task."""
    dry_run_tasks: tuple[str, ...]
    """The tasks of a --dry-run without --task."""
    dry_run_variants: tuple[str, ...] = ()
    """The variants of a --dry-run without --variants; empty: `variants`."""
    settings: AnalysisSettings = field(default_factory=AnalysisSettings)
    """The kind of study, and the settings of its analysis."""

    def default_tasks(self, dry_run: bool) -> tuple[str, ...]:
        """Return the tasks of a run without --task."""
        return self.dry_run_tasks if dry_run else self.tasks

    def default_variants(self, dry_run: bool) -> tuple[str, ...]:
        """Return the variants of a run without --variants."""
        return (self.dry_run_variants if dry_run else ()) or self.variants
