"""Question of an experiment script, and its defaults of options that all scripts share."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.record.study_file import AnalysisSettings


@dataclass(frozen=True)
class Experiment:
    """Question, defaults and analysis of an experiment script."""

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

    def default_tasks(self, dry_run: bool) -> tuple[str, ...]:
        """Return the default of --task."""
        return self.dry_run_tasks if dry_run else self.tasks

    def default_variants(self, dry_run: bool) -> tuple[str, ...]:
        """Return the default of --variants."""
        return (self.dry_run_variants if dry_run else ()) or self.variants
