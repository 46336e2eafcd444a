"""Studies from Python: `Study`, `plan` and `run`, which call the same functions as the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.arguments import default_values, make_options, repeatable_command
from orchestrator.experiments.catalogue import ExperimentCommand, experiments
from orchestrator.launch.experiment import StudyRequest
from orchestrator.study.config_file import convert, field_name, option_flag, read_config
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.graceful_interrupts import PROGRAM, borrowed_signals

if TYPE_CHECKING:
    from orchestrator.analyze.study_frames import StudyFrames
    from orchestrator.launch.plan import Plan


class Study:
    """An experiment with its options, which are checked when the object is made.

    Args:
        experiment: Name of the command: study, tuned or sensitivity.
        config: YAML file with options, as for --config. Other arguments replace what it says.
        **options: The options of the command, with underscores: `variants=["lora", "dora"]`, `rank=16`,
            `dry_run=True`. None stands for the default.

    Raises:
        UsageError: There is no such experiment or option, or an option has a wrong value.
    """

    def __init__(
        self, experiment: str = "study", *, config: str | PathLike[str] | None = None, **options: object
    ) -> None:
        self.experiment = _find_experiment(experiment)
        options_class = self.experiment.options_class
        given = {}
        for key, value in options.items():
            name = field_name(key, options_class)
            if value is not None:
                given[name] = convert(name, value, options_class)
        file = read_config(Path(config), options_class) if config is not None else None
        defaults = default_values(options_class, given.get("preset"), file)
        try:
            self.options: StudyOptions = make_options({**defaults, **given}, options_class)
        except UsageError as error:
            raise (file.locate(error, [option_flag(name) for name in given]) if file else error) from None

    @property
    def command(self) -> str:
        """The shell command that does what `run` does with this study."""
        return repeatable_command(f"{PROGRAM} {self.experiment.name}", self.options)

    def __repr__(self) -> str:
        return f"<Study: {self.command}>"


@dataclass(frozen=True)
class StudyResult:
    """The exit code, the folders and the options of a run."""

    exit_code: int
    """Exit code of the command: 0 if all configurations have a result, 3 if a limit ended the run, else 1."""
    folders: Mapping[str, Path]
    """Name of each study that was run -> its folder, with report.html."""
    options: StudyOptions
    """The options of the run."""

    def load(self, name: str | None = None) -> StudyFrames:
        """Load the results of the run as pandas frames.

        Args:
            name: Name of the study; by default the first one.

        Raises:
            UsageError: There is no such study, or it has no results.
        """
        from orchestrator.analyze import study_frames

        name = next(iter(self.folders), "") if name is None else name
        return study_frames.load(name, output=self.options.output, store=self.options.store_folder)


def plan(study: Study) -> tuple[Plan, ...]:
    """Print what a study would train, with estimates of time and price, and start nothing.

    Returns:
        The plan of each study of the experiment, which has one.

    Raises:
        UsageError: An option does not fit the task, the base model or this machine.
    """
    plans: list[Plan] = []
    request = StudyRequest(study.options, study.command, plans.append)
    study.experiment.run(replace(study.options, plan=True), request)
    return tuple(plans)


def run(study: Study) -> StudyResult:
    """Train what has no result yet and write the report, as the command does.

    Returns:
        The exit code and the folders of the reports; `load()` gives the results as pandas frames.

    Raises:
        UsageError: An option does not fit the task, the base model or this machine. Nothing was trained.
        StudyError: Something outside the study failed, for example the cluster.
        KeyboardInterrupt: The run was interrupted. The same call continues it.
    """
    folders: dict[str, Path] = {}
    request = StudyRequest(study.options, study.command, on_study=folders.__setitem__)
    with borrowed_signals(study.command):
        code = study.experiment.run(study.options, request)
    return StudyResult(code, folders, study.options)


def _find_experiment(name: str) -> ExperimentCommand:
    studies: dict[str, Any] = {each.name: each for each in experiments().values() if each.trains}
    found = studies.get(name) or next((each for each in studies.values() if each.script == name), None)
    if found is None:
        raise UsageError(f"experiment {name!r}: there is none. {suggest_nearest(name, studies)}")
    return found
