"""A study: what is asked, what the store knows of it, and what is left to train.

`resolve_study` fills in and checks the options; `Study.look_up` compares the configurations with the records.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.execution import ray_cluster
from orchestrator.execution.progress import RunBudget
from orchestrator.execution.schedulers import find_settled
from orchestrator.finetune.models.catalogue import UNPREPARED, find_content, prepare_base_model
from orchestrator.finetune.resolve.option_names import ResolvedOptions, resolve_tasks
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.launch.designs import Design, DesignInput
from orchestrator.launch.experiment import Experiment
from orchestrator.record.mlflow import check_uri, resolve_uri, study_uri
from orchestrator.record.other_trackers import TensorBoardTracker, WandbTracker
from orchestrator.record.schema import FINAL_STATES, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import MakeTracker
from orchestrator.study.configuration import Configuration
from orchestrator.study.names import default_study_name, store_command
from orchestrator.study.options import StudyOptions
from orchestrator.util.atomic_files import make_folder
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import REDACTED

if TYPE_CHECKING:
    from orchestrator.execution.search import Search

TRACKERS = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}
"""Value of --tracker -> the tracker beside MLflow."""


@dataclass(kw_only=True)
class Study:
    """What is asked, what the store knows of it, and what is left to train.

    The configurations and `file` change when a search or a design adds configurations during the training.
    """

    experiment: Experiment
    options: StudyOptions
    """The options, with the defaults of the experiment."""
    command: str = ""
    """The shell command that runs the study again."""
    store: Store
    templates: tuple[Configuration, ...]
    """One configuration per task and variant, with placeholders for learning rate and seed."""
    file: StudyFile
    """Content of `study.json`."""
    console: Console
    tasks: tuple[ResolvedOptions, ...] = ()
    """Resolved options of each task."""
    design: Design | None = None
    """The rule that names the configurations; None for a search, which samples them."""
    tracking_uri: str = ""
    trackers: Mapping[str, MakeTracker] = field(default_factory=dict)
    """The trackers that --tracker names."""
    budget: RunBudget = field(default_factory=RunBudget)
    """The limits of this run."""
    search: Search | None = None
    """The search that samples further configurations; None for a design, and before `look_up`."""
    requested: list[Configuration] = field(default_factory=list)
    """All configurations that the design or the search has named so far."""
    satisfied: list[Configuration] = field(default_factory=list)
    """Those with a result in the store before this run asked for them."""
    retries_exhausted: list[Configuration] = field(default_factory=list)
    """Those that failed too often to be tried again."""
    pending: list[Configuration] = field(default_factory=list)
    """Those that this run trains."""
    expected: int = 0
    """Expected number of configurations of all stages of the design; 0 after the last stage."""
    _settled: dict[str, tuple[object, Record | None]] = field(default_factory=dict)
    """Fingerprint -> the stamps of its record files when they were read, and what `settled` found in them."""

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.file.name

    @property
    def folder(self) -> Path:
        """Folder of the study, which may not exist yet."""
        return self.file.folder

    # -- what is known

    def look_up(self) -> None:
        """Name the configurations and divide them by the records in the store."""
        if self.design is None:
            self.search = self.open_search()
            self.requested = list(self.search.configurations.values())
        else:
            self.requested = self.design.request(self.settled)
        self.satisfied, self.retries_exhausted, self.pending = [], [], []
        self._divide(self.requested)
        self.expected = len(self.design.outline()) if self.design and self.pending else 0

    def open_search(self) -> Search:
        """Open the search of the study; nothing is written."""
        from orchestrator.execution.search import open_search  # imports Optuna, which takes a second

        return open_search(
            self.folder,
            self.options.search_method,
            self.options.point_count,
            {each.task.name: each.space for each in self.tasks if each.space is not None},
            self.templates,
            self.options.replicate_count,
        )

    def _divide(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """Sort configurations by what the store knows of them, and return those that are to be trained."""
        new: list[Configuration] = []
        for each in configurations:
            record = self.settled(each.fingerprint)
            known = self.satisfied if self.has_result(each) else self.retries_exhausted
            (new if record is None else known).append(each)
        self.pending += new
        return new

    def known_fingerprints(self) -> set[str]:
        """Return the fingerprints of the configurations that this run did not have to train."""
        return {c.fingerprint for c in (*self.satisfied, *self.retries_exhausted)}

    def settled(self, fingerprint: str) -> Record | None:
        """Return the record of a configuration that the study does not train any further; else None.

        Such a configuration has finished, diverged, been stopped by the study's own early stopping, or failed
        too often. Its files are read again when one of them has changed. No design uses the curve and the
        results per item, which take most of the memory, so the record is kept without them.
        """
        stamps = [_stamp(self.store.record_path(fingerprint, kind)) for kind in ("", "stopped", "failed")]
        before, record = self._settled.get(fingerprint, (None, None))
        if before != stamps:
            record = find_settled(self.store, fingerprint, self.options.scheduler)
            record = record and replace(record, curve=(), items={})
            self._settled[fingerprint] = stamps, record
        is_retried = self.options.plan and self.options.retry_failed  # a run resets the failures instead
        return None if is_retried and record is not None and record.state == "failed" else record

    def has_result(self, configuration: Configuration) -> bool:
        """Return whether the store has a result of this configuration under the study's early stopping."""
        record = self.settled(configuration.fingerprint)
        return record is not None and record.state != "failed"

    def without_result(self) -> list[Configuration]:
        """Return the requested configurations that have no result."""
        # Parsing every record would take long.
        final = {name for name, state in self.store.states().items() if state in FINAL_STATES}
        return [c for c in self.requested if c.fingerprint not in final and not self.has_result(c)]

    # -- what is to do

    @property
    def total(self) -> int:
        """Number of configurations, including those that are not sampled or requested yet."""
        return self.search.total if self.search else max(len(self.requested), self.expected)

    @property
    def num_to_train(self) -> int:
        """Number of configurations to train, including those that are not sampled or requested yet."""
        return len(self.pending) + self.total - len(self.requested)

    def unnamed(self) -> list[Configuration]:
        """Return one template for each configuration that the search or the design has not named yet."""
        if self.search is None:
            count = self.total - len(self.requested)
            return [template for template, _ in zip(cycle(self.templates), range(count))]
        return [group.template for group in self.search.groups.values() for _ in range(group.num_remaining)]

    def max_steps(self) -> int:
        """Return the optimizer steps of `pending` and `unnamed`, if no lane ends early."""
        return sum(c.lr_schedule.steps for c in [*self.pending, *self.unnamed()])

    def name_next_stage(self) -> list[Configuration]:
        """Return the configurations that the design requests after the ends of all earlier ones."""
        present = {c.fingerprint for c in self.requested}
        requested = [] if self.design is None else self.design.request(self.settled)
        named = [c for c in requested if c.fingerprint not in present]
        if not named:
            self.expected = 0
        return named

    def add(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """Add the point of a search, or a later stage of the design, also to `study.json`.

        Returns:
            The configurations that are to be trained.
        """
        new = self._divide(configurations)
        self.requested += configurations
        added = [c.fingerprint for c in configurations]
        self.file = self.file.with_configurations(added, self.known_fingerprints())
        self.file.write(self.folder)
        return new

    # -- its words

    def describe_progress(self) -> str:
        """Return a sentence with the number of configurations done and the GPU hours of this run."""
        done = len(self.requested) - len(self.without_result())
        used = self.budget.format_usage()
        return f"{done} of {self.total} configurations are done{f', {used} used' if used else ''}"

    def orchestrator_command(self, *words: str) -> str:
        """Return a command of this program, such as `report x`, with this study's --output and --store."""
        return store_command(*words, output=self.options.output, store=self.options.store)


def resolve_study(experiment: Experiment, given: StudyOptions, command: str = "") -> Study:
    """Fill in the defaults of a study's options and check them; without --plan, prepare missing base models.

    Args:
        experiment: The experiment.
        given: The options as they were given.
        command: The shell command that runs the study again; empty for one that names study.yaml.

    Returns:
        The study, before `look_up`.

    Raises:
        UsageError: The value of an option is wrong, for example for this machine or the joined cluster.
        OSError: A folder cannot be written; the error names the folder.
    """
    console = Console(file=sys.stdout, highlight=False, markup=False)
    _require_hardware(experiment, given)
    options = experiment.fill_defaults(given)
    make_folder(f"--output {str(options.output)!r}", options.output)
    store = Store(options.store_folder)
    tracking_uri = resolve_uri(options.tracking_uri, store)
    trackers = {str(name): TRACKERS[name] for name in options.tracker if name != "none"}
    for tracker in trackers.values():
        tracker.check()
    tasks = [
        replace(each, model=model)
        for each in resolve_tasks(options, store.bases)
        for model in options.models or (each.model,)
    ]
    budget = RunBudget(options.max_hours, options.max_gpu_hours)
    if options.plan_gpu is None and ray_cluster.running_cluster_address() is None:
        _, gpus = ray_cluster.estimate_local_cluster().plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        budget.set_gpus_per_trainer(gpus * options.workers_per_trainer)
    templates = _build_templates(options, tasks, store)
    if not options.plan:
        is_missing = any(template.model.content == UNPREPARED for template in templates)
        if is_missing:
            ray_cluster.check_start()  # before a model is pretrained or fetched, which takes longer
        for each in tasks:  # of a folder, the store notes the place, because workers run elsewhere
            prepare_base_model(each.model, store.bases, console.print)
        templates = _build_templates(options, tasks, store) if is_missing else templates
    models, names = [each.model for each in tasks], list(dict.fromkeys(each.task.name for each in tasks))
    name = options.study or default_study_name(
        experiment.module,
        [f"{options.preset}.yaml"] if options.preset else names,
        models[0] if len(set(models)) == 1 else None,
        options.design_name,
    )
    folder = options.study_folder(name)
    new = StudyFile(name, experiment.question, "", experiment=experiment.name, folder=folder)
    file = StudyFile.read(folder) or new
    if options.config and options.tracking_uri is None and REDACTED in file.tracking_uri:
        check_uri(study_uri(file.tracking_uri, store))  # study.yaml has left it out, with the password
    study = Study(
        experiment=experiment,
        options=options,
        command=command or new.again(*(["--only", *options.only] if options.only else [])),
        store=store,
        templates=tuple(templates),
        file=file,
        console=console,
        tasks=tuple(tasks),
        tracking_uri=tracking_uri,
        trackers=trackers,
        budget=budget,
    )
    if options.search == "grid":
        rates = {each.task.name: tuple(each.learning_rates) for each in tasks}
        assert experiment.make_design is not None
        study.design = experiment.make_design(options, DesignInput(study.templates, rates))
        for note in study.design.notes:
            console.print(note, soft_wrap=True)
    return study


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a record file is written; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _build_templates(
    options: StudyOptions, tasks: Sequence[ResolvedOptions], store: Store
) -> list[Configuration]:
    """Build and check the templates of all tasks, with the base models that the store has.

    Raises:
        UsageError: A setting is impossible, or two tasks have the same content and data.
    """
    templates: list[Configuration] = []
    for each in tasks:
        content = find_content(each.model, store.bases) or UNPREPARED
        templates += build_configuration_templates(options, each, content, store.bases)
    names: dict[tuple[str, str], str] = {}
    for task in (template.task for template in templates if template.task.content):
        other = names.setdefault((task.content, task.revision), task.name)
        if other != task.name:
            raise UsageError(f"{other!r} and {task.name!r} have the same content; leave one of them out.")
    return templates


def _require_hardware(experiment: Experiment, options: StudyOptions) -> None:
    """Check that the full study, which needs GPUs, is not started on a machine without GPUs.

    Raises:
        UsageError: There is neither a GPU nor a Ray cluster.
    """
    named = options.preset != options.default_config and (options.task or options.data)
    if options.dry_run or options.plan or named or options.model:
        return
    has_cluster = ray_cluster.running_cluster_address() is not None
    if not has_cluster and not any(node.gpus for node in ray_cluster.estimate_local_cluster().nodes):
        raise UsageError(
            f"the full study ({' '.join(experiment.tasks)}) needs a GPU or a Ray cluster "
            "(ray up cluster.yaml, or RAY_ADDRESS) and there is none here; rehearse it with --dry-run, or "
            "take another task or your own data on this CPU."
        )
