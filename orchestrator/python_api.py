"""Studies from Python: `Study`, `plan` and `run`, which call the same functions as the command line."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from orchestrator import experiments
from orchestrator.study.config import make_options
from orchestrator.util.command import borrowed_signals

if TYPE_CHECKING:
    from orchestrator.launch.plan import Plan
    from orchestrator.launch.run import StudyResult


class Study:
    """An experiment with its options, which are checked when the object is made.

    Args:
        experiment: Name of the command: study, tuned, sensitivity or transfer.
        config: YAML file with options, as for --config. Other arguments replace what it says.
        **options: The options of the command, with underscores: `variants=["lora", "dora"]`, `rank=16`,
            `dry_run=True`. None stands for an option that is not given.

    Raises:
        UsageError: There is no such experiment or option, or an option has a wrong value.
    """

    def __init__(
        self, experiment: str = "study", *, config: str | PathLike[str] | None = None, **options: object
    ) -> None:
        self.experiment = experiments.load(experiment)
        typed = {**options, "config": config}
        given = {name: value for name, value in typed.items() if value is not None}
        options_class = self.experiment.options_class
        self.options = make_options(options_class, given, experiment, experiments.options_of)[0]

    def __repr__(self) -> str:
        words = (self.options.shown(name) for name in self.options.given())
        return f"<Study: {' '.join([self.experiment.name, *words])}>"


def plan(study: Study) -> tuple[Plan, ...]:
    """Print what a study would train, with estimates of time and price, and start nothing.

    Returns:
        One plan.

    Raises:
        UsageError: An option does not fit the task, the base model or this machine.
    """
    from orchestrator.launch.run import run_study

    found = run_study(study.experiment, replace(study.options, plan=True)).plan
    assert found is not None
    return (found,)


def run(study: Study) -> StudyResult:
    """Train what has no result yet and write the report, as the command does.

    Returns:
        The exit code and the folder of the report; `load()` gives the results as pandas frames.

    Raises:
        UsageError: An option does not fit the task, the base model or this machine. Nothing was trained.
        StudyError: Something outside the study failed, for example the cluster.
        KeyboardInterrupt: The run was interrupted. The same call continues it.
    """
    from orchestrator.launch.run import run_study

    with borrowed_signals("run(study)"):
        return run_study(study.experiment, study.options)
