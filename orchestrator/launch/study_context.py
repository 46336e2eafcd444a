"""Context of one run of a study, determined before the training."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.execution.ray import autoscaler, runtime
from orchestrator.execution.run_budget import RunBudget
from orchestrator.execution.rungs import scheduler_settings
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.option_names import ResolvedOptions, resolve_tasks
from orchestrator.finetune.resolve.templates import (
    build_configuration_templates,
    check_fit,
    resolve_base_model,
)
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.designs import Design, DesignInput, MakeDesign, WideningGrid
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.study_settings import find_other_files
from orchestrator.launch.work import SettledRecords, StudyWork
from orchestrator.record.store import Store
from orchestrator.record.study_file import Source, StudyFile
from orchestrator.record.tensorboard import TensorBoardTracker
from orchestrator.record.tracker import MakeTracker
from orchestrator.record.tracking_uri import resolve_uri
from orchestrator.record.wandb import WandbTracker
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.study.study_name import (
    MAX_NAME_BYTES,
    default_study_name,
    nearest_valid_name,
    store_command,
)
from orchestrator.util.errors import UsageError, suggest_nearest
from variants import catalogue
from variants.variant_names import FILE_SUFFIX

NO_TRACKER = "none"
"""The value of --tracker for MLflow alone."""


@dataclass(frozen=True)
class StudyContext:
    """One run of a study: its options with all defaults filled in, its files and its design."""

    experiment: Experiment
    options: StudyOptions
    console: Console
    store: Store
    tracking_uri: str
    trackers: Mapping[str, MakeTracker]
    """The trackers that --tracker names."""
    budget: RunBudget
    name: str
    """Name of the study."""
    folder: Path
    """Folder of the study, which may not exist yet."""
    resolved: tuple[ResolvedOptions, ...]
    """Resolved options of each task."""
    templates: tuple[Configuration, ...]
    """One configuration per task and variant, with placeholders for learning rate and seed."""
    design: Design | None
    """The rule that names the configurations; None for a search, which samples them."""
    replicates: int = 1
    """Number of replicates: repeated tunings of each variant, each with its own seed."""

    def collect_work(self) -> StudyWork:
        """Divide the configurations of the study by the records in the store; see `StudyWork`."""
        if self.design is not None:
            requested = self.design.request(SettledRecords(self.store, self.options.scheduler))
            total = max(len(requested), len(self.design.outline()))
            return StudyWork.from_store(requested, None, self.store, self.options, total)
        from orchestrator.execution.search.budget import open_search  # imports Optuna, which takes a second

        search = open_search(
            self.folder,
            self.options.search_method,
            self.options.point_count,
            {each.task.name: each.space for each in self.resolved if each.space is not None},
            self.templates,
            self.replicates,
        )
        return StudyWork.from_store(list(search.configurations.values()), search, self.store, self.options)

    def sources(self) -> list[Source]:
        """Return the base models of the study, and its tasks and variants in users' files."""
        return _sources(self.templates)

    def request_next_stage(self, work: StudyWork) -> list[Configuration]:
        """Return the configurations that the design now requests and `work` does not have yet."""
        if self.design is None:
            return []
        requested = self.design.request(SettledRecords(self.store, self.options.scheduler))
        present = {c.fingerprint for c in work.requested}
        return [c for c in requested if c.fingerprint not in present]

    def has_result(self, configuration: Configuration) -> bool:
        """Return whether the store has a result of this configuration under the study's early stopping."""
        stopping_settings = scheduler_settings(self.options.scheduler, configuration)
        return self.store.get_reusable(configuration.fingerprint, stopping_settings) is not None

    def describe_progress(self, work: StudyWork) -> str:
        """Return a sentence with the number of configurations done and the GPU hours of this run."""
        states = self.store.states()  # Reading every record would take long.
        recorded = [c for c in work.requested if states.get(c.fingerprint) not in (None, "failed")]
        done = sum(states[c.fingerprint] != "stopped" or self.has_result(c) for c in recorded)
        used = self.budget.format_usage()
        return f"{done} of {work.total} configurations are done{f', {used} used' if used else ''}"

    def orchestrator_command(self, *words: str) -> str:
        """Return a command of this program, such as `report x`, with this study's --output and --store."""
        return store_command(*words, output=self.options.output, store=self.options.store)


def resolve_study(
    experiment: Experiment,
    options: StudyOptions,
    make_design: MakeDesign | None = None,
    replicates: int = 1,
) -> StudyContext:
    """Fill in the defaults of a study's options and check them; without --plan, prepare missing base models.

    Args:
        experiment: Question and defaults of the script.
        options: Options of the command line.
        make_design: Function that makes the design; None for the grid of learning rates, or for a search.
        replicates: Number of replicates of a study that tunes each variant several times.

    Returns:
        The context of this run.

    Raises:
        UsageError: The value of an option is wrong, for example for this machine or the joined cluster.
        OSError: A folder cannot be written; the error names the folder.
    """
    console = Console(file=sys.stdout, highlight=False, markup=False)
    _require_hardware(experiment, options)
    options = autoscaler.adapt_options(options)
    options.check_output()
    store = Store(options.store_folder)
    tracking_uri = resolve_uri(options.tracking_uri, store)
    trackers = load_trackers(options.tracker)
    defaults = experiment.default_tasks(options.dry_run), experiment.default_variants(options.dry_run)
    resolved = resolve_tasks(options, *defaults, store.bases)
    budget = _make_budget(options)
    if not options.plan:
        _check_before_pretraining(options, resolved, store)
    progress = None if options.plan else console.print
    is_search = make_design is None and options.search != "grid"
    templates = []
    for each in resolved:
        content = resolve_base_model(each.model, store.bases, progress)
        templates += build_configuration_templates(options, each, content, store.bases, checks_fit=is_search)
    _check_contents(templates)
    name = _study_name(experiment, options, resolved, _sources(templates), console)
    design = None if is_search else _make_design(options, resolved, templates, make_design)
    if design is not None:
        _check_untrained(design, options, resolved, templates, store)
    return StudyContext(
        experiment=experiment,
        options=options,
        console=console,
        store=store,
        tracking_uri=tracking_uri,
        trackers=trackers,
        budget=budget,
        name=name,
        folder=options.study_folder(name),
        resolved=tuple(resolved),
        templates=tuple(templates),
        design=design,
        replicates=replicates,
    )


def load_trackers(chosen: Sequence[str]) -> dict[str, MakeTracker]:
    """Find and check the trackers that a command names beside MLflow.

    Raises:
        UsageError: A name is unknown, a tracker's package is not installed, or a setting is missing.
    """
    known = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}
    names = [name for name in dict.fromkeys(chosen) if name != NO_TRACKER]
    if names and NO_TRACKER in chosen:
        raise UsageError(f"--tracker {' '.join(chosen)}: `none` stands alone; take it away.")
    found: dict[str, MakeTracker] = {}
    for name in names:
        if name == "mlflow":
            raise UsageError("--tracker mlflow: MLflow is always written; leave it out.")
        if name not in known:
            raise UsageError(f"--tracker {name!r} is not one. {suggest_nearest(name, [NO_TRACKER, *known])}")
        known[name].check()
        found[name] = known[name]
    return found


def _check_before_pretraining(
    options: StudyOptions, resolved: Sequence[ResolvedOptions], store: Store
) -> None:
    """Check whether Ray can start and the variants fit, for each task whose base model is not in the store.

    They come first, because such a model is then pretrained or fetched, which takes longer than the checks.

    Raises:
        UsageError: A check fails.
    """
    for each in resolved:
        if model_catalogue.find_content(each.model, store.bases) is None:
            runtime.check_start()
            build_configuration_templates(options, each, UNPREPARED, store.bases)


def _make_budget(options: StudyOptions) -> RunBudget:
    """Return the limits of the run; without a cluster, refuse more trainers than fit on this machine."""
    budget = RunBudget(options.max_hours, options.max_gpu_hours)
    if options.plan_gpu is None and runtime.running_cluster_address() is None:
        _, gpus = runtime.estimate_local_cluster().plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        budget.set_gpus_per_trainer(gpus * options.workers_per_trainer)
    return budget


def _check_contents(templates: Sequence[Configuration]) -> None:
    """Check that no two tasks have the same content and data, which would be the same configurations.

    Raises:
        UsageError: Two of them have.
    """
    names: dict[tuple[str, str], str] = {}
    for task in (template.task for template in templates if template.task.content):
        other = names.setdefault((task.content, task.revision), task.name)
        if other != task.name:
            raise UsageError(f"{other!r} and {task.name!r} have the same content; leave one of them out.")


def _sources(templates: Sequence[Configuration]) -> list[Source]:
    """Return the base models of configurations, and their tasks and variants in users' files."""
    models = []
    for model in dict.fromkeys(template.model for template in templates):
        path = str(Path(model.name).resolve()) if Path(model.name).is_dir() else ""
        models.append(Source(model.content, model.name, path))
    own_tasks = {t.task.content: (t.task, tasks.get(t.task.name)) for t in templates if t.task.content}
    own_variants = {t.variant.name for t in templates if t.variant.name.endswith(FILE_SUFFIX)}
    variants = [catalogue.get(name) for name in sorted(own_variants)]
    return [
        *models,
        *(
            Source(content, t.name, t.source, getattr(t, "title", ""), choice.revision, tuple(t.warnings))
            for content, (choice, t) in own_tasks.items()
        ),
        *(Source(variant.revision, variant.name, variant.source_path) for variant in variants),
    ]


def _study_name(
    experiment: Experiment,
    options: StudyOptions,
    resolved: Sequence[ResolvedOptions],
    sources: Sequence[Source],
    console: Console,
) -> str:
    """Return the name of the study.

    Two projects may each have a `train.csv`, and their studies must stay apart. If the study that already has
    the usual name was made from other files of the same names, a hash of this run's paths is appended.

    Raises:
        UsageError: --study names a study that was made from other files of the same names.
    """
    name = options.study or _default_name(experiment, options, resolved)
    study = StudyFile.read(options.study_folder(name))
    others = find_other_files(study, sources) if study is not None else []
    if not others:
        return name
    theirs, mine = others[0]
    if options.study:
        raise UsageError(
            f"--study {name!r} has results of {theirs.path}; {mine.path} is another file of this name: take "
            "another --study, or rename the file."
        )
    suffix = hashlib.sha256("\n".join(own.path for _, own in others).encode()).hexdigest()[:8]
    own_name = f"{nearest_valid_name(name, MAX_NAME_BYTES - len(suffix) - 1)}-{suffix}"
    line = f"The study {name} is of {theirs.path}; the study of {mine.path} is {own_name}"
    console.print(line, soft_wrap=True)
    return own_name


def _default_name(experiment: Experiment, options: StudyOptions, resolved: Sequence[ResolvedOptions]) -> str:
    models = list(dict.fromkeys(each.model for each in resolved))
    tasks = [options.preset] if options.preset else [each.task.name for each in resolved]
    return default_study_name(
        experiment.script,
        tasks,
        models[0] if len(models) == 1 else None,
        None if options.search == "grid" else options.search_method,
    )


def _make_design(
    options: StudyOptions,
    resolved: Sequence[ResolvedOptions],
    templates: Sequence[Configuration],
    make_design: MakeDesign | None,
) -> Design:
    given = DesignInput(tuple(templates), {each.task.name: tuple(each.learning_rates) for each in resolved})
    if make_design is not None:
        return make_design(given)
    return WideningGrid(given, range(options.seed_count))


def _check_untrained(
    design: Design,
    options: StudyOptions,
    resolved: Sequence[ResolvedOptions],
    templates: Sequence[Configuration],
    store: Store,
) -> None:
    """Check that Ray can start, and that the variants that the design may train fit the base model.

    Nothing is checked if nothing is left to train.
    """
    records = SettledRecords(store, options.scheduler)
    outline, requested = design.outline(), design.request(records)
    untrained = [c for c in requested if c.fingerprint not in records]
    if not untrained:
        return
    if not options.plan:
        runtime.check_start()
    if len(requested) < len(outline):
        untrained += outline
    names = {(c.task.name, c.variant.name) for c in untrained}
    for each in resolved:
        own = [
            t for t in templates if (t.task.name, t.variant.name) in names and t.task.name == each.task.name
        ]
        check_fit(own, options, each, store.bases)


def _require_hardware(experiment: Experiment, options: StudyOptions) -> None:
    """Check that the full study, which needs GPUs, is not started on a machine without GPUs.

    Raises:
        UsageError: There is neither a GPU nor a Ray cluster.
    """
    if options.dry_run or options.plan or options.task or options.data or options.model:
        return
    if runtime.running_cluster_address() is None and not any(
        node.gpus for node in runtime.estimate_local_cluster().nodes
    ):
        raise UsageError(
            f"the full study ({' '.join(experiment.tasks)}) needs a GPU or a Ray cluster "
            "(ray up cluster.yaml, or RAY_ADDRESS) and there is none here; rehearse it with --dry-run, or "
            "name a --task or --data for this CPU."
        )
