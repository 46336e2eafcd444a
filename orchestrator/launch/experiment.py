"""An experiment: a question, and how a study answers it. The files in `experiments/` have one each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.record.study_file import AnalysisSettings, StudyKind
from orchestrator.study.options import StudyOptions

if TYPE_CHECKING:
    from orchestrator.launch.designs import Design, DesignInput

BASELINE = AnalysisSettings().baseline
"""The variant that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the options and the defaults of its study, and its design.

    Its functions import what is heavy when they are called, so that --help is fast.
    """

    name: str
    """Name of the command."""
    description: str
    """The text above the options in `--help`. Its first line is the question."""
    options_class: type[StudyOptions]
    make_design: Callable[[Any, DesignInput], Design]
    """Makes the design from the options, unless a search chooses the points."""
    complete: Callable[[Any], StudyOptions] = lambda options: options
    """Returns the options with further defaults of this experiment. They have variants and tasks already."""
    kind: StudyKind = "curve"
    variants: tuple[str, ...]
    """Default of --variants."""
    tasks: tuple[str, ...]
    """Default of --task."""
    dry_run_variants: tuple[str, ...]
    """Default of --variants with --dry-run."""
    dry_run_tasks: tuple[str, ...]
    """Default of --task with --dry-run."""

    @property
    def question(self) -> str:
        """The first line of the description."""
        return self.description.partition("\n")[0]

    @property
    def module(self) -> str:
        """Name of the file without `.py`; with the task and the model it is the default name of a study."""
        return inspect.getmodulename(inspect.getfile(self.options_class)) or ""

    def fill_defaults(self, options: StudyOptions) -> StudyOptions:
        """Return the options with the variants and tasks of this experiment, and its other defaults."""
        variants = options.variants or (self.dry_run_variants if options.dry_run else self.variants)
        tasks = options.task or (self.dry_run_tasks if options.dry_run else self.tasks)
        return self.complete(replace(options, variants=variants, task=None if options.data else tasks))

    def settings(self, options: StudyOptions) -> AnalysisSettings:
        """Return the settings of the analysis."""
        names = ("margin", "select", "expected", "by", "factor", "links")
        chosen = {name: getattr(options, name, None) for name in names}
        given = {name: value for name, value in chosen.items() if value is not None}
        return AnalysisSettings(kind=self.kind, **given)
