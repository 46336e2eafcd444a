"""The options that every study script shares, and their rules. `--help` imports nothing heavy."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from orchestrator.study import bounds, price, rates, study_name
from orchestrator.util.command import print_status
from orchestrator.util.errors import UsageError, describe_disk_error, suggest_nearest

SCHEDULERS = ("none", "asha", "median", "hyperband")
SEARCHES = ("grid", "random", "qmc", "optuna")
SAMPLERS = ("tpe", "cma-es", "qmc", "random")
DEFAULT_GRID_SEEDS, DEFAULT_POINTS = 3, 16
HYPERPARAMETER_OPTIONS = ("learning_rates", "head_learning_rate", "rank", "alpha", "dropout", "lr_schedule")
"""Options whose values --set and --space can name, too. (--batch-size may stand beside batch sizes there:
--accumulation must divide it.)"""
OPTION_OF_HYPERPARAMETER = {"learning_rate": "learning_rates", "schedule": "lr_schedule"}
DEFAULT_LANES_PER_TRAINER = 4
"""More lanes gain nothing on a CPU; on a GPU the number is a choice of memory."""
LOCAL = "here"
CLUSTER_FILE = "cluster.yaml"


def default_output() -> Path:
    """ORCHESTRATOR_OUTPUT, which a cluster's head sets to its shared storage, else `results`."""
    return Path(os.environ.get("ORCHESTRATOR_OUTPUT") or "results")


@dataclass(frozen=True)
class StudyOptions:
    dry_run: bool = False
    """Rehearse the whole study on this machine, without a GPU: a small task on a base model that is
    pretrained here once (about half a minute). Ends in a few minutes with a real report. --task names
    another: letters (the default), reviews or digits; the real ones take longer."""
    variants: tuple[str, ...] | None = None
    """Variants to compare, e.g. `lora pissa`. Default: those of the script."""
    task: str | None = None
    """What to fine-tune on: a task's name, or a path to a .py file with one."""
    model: str | None = None
    """The base model: a known name, a folder, or a hub name. Default: the task's own."""
    learning_rates: tuple[str, ...] | None = None
    """A list (`1e-4 1e-3`), or low:high:points-per-decade (`1e-5:1e-2:2`). Default: the task's grid."""
    seeds: int | None = None
    """How many seeds a point: 0, 1, ... Seed k is the same data order and initial noise for every variant.
    Default: 3 for a grid; a search trains each point once, with seed 0."""
    search: str = "grid"
    """How points are found: `grid` (the learning rates), `random`, `qmc` (evenly spread), or `optuna`, which
    learns from what it has seen. Each variant gets as many points as any other."""
    sampler: str | None = None
    """Of `--search optuna`: tpe (default), cma-es, qmc, random."""
    points: int | None = None
    """Of a search: how many points each variant gets (default 16), counted over all runs of the study: the
    same command with more goes on, with fewer is refused."""
    space: tuple[str, ...] | None = None
    """Of a search: what it varies, NAME=SPEC each. NAME: learning_rate, rank, alpha, dropout, weight_decay,
    warmup, batch_size, ..., or VARIANT.NAME for one variant alone, also for a setting of its own
    (`lora_plus.ratio`). SPEC: `low:high`, `log:low:high`, `int:low:high`, `logint:low:high`, or a choice
    `4,8,16`. The learning rate is searched between the ends of --learning-rates if it is not named, and not
    at all where that is one rate, or where --set fixes it."""
    set: tuple[str, ...] = ()
    """Fixed values, NAME=VALUE each; names as in --space, e.g. `lora_plus.ratio=4 weight_decay=0.01`."""
    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """LoRA's alpha; the update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank)). HiRA has none."""
    dropout: float = 0.0
    """Probability that an input of an adapter is zeroed in training."""
    base_dropout: Literal["on", "off"] | None = None
    """Whether the base model's own dropout is on in training (0.1 in RoBERTa, BERT, DeBERTa and GPT-2; Llama
    and Qwen have none). Default: the task's; on for GLUE's, whose published runs had it."""
    steps: int | None = None
    """Optimizer steps of a fine-tune. Default: the task's."""
    evaluations: int | None = None
    """How often a fine-tune is scored on the validation split on its way, evenly. Default: the task's. Early
    stopping looks no sooner than that; another number makes other configurations."""
    batch_size: int | None = None
    """Examples an optimizer step. Default: the task's."""
    accumulation: int | None = None
    """Parts of equal size in which a step's examples are computed, one after another: less memory, the same
    numbers up to rounding (with dropout, other masks). Must divide the batch size. Default: the task's."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, more time, the same numbers."""
    head_learning_rate: str = "same"
    """Of a classification task's head: `same` as all the rest, or a number."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """The learning rate over the steps, after a linear warm-up. Default: the task's."""
    targets: str = "blocks"
    """Which layers learn: `blocks` (every linear layer of the model's blocks), a comma-separated list of name
    endings (`q_proj,v_proj`), or `re:` and a regular expression."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the frozen base; adapters are float32. Default: the task's."""
    scheduler: str = "none"
    """Early stopping, for each variant and task by itself, on the validation loss: none, asha, median,
    hyperband (Ray Tune's). What is stopped is shown as censored; without early stopping it goes on. Extend a
    grid under asha or median: hyperband would put lanes that it has stopped into other brackets. Measured,
    with --evaluations 10: asha took 37 % of the steps at 8 rates and 35 % at 32, and chose the grid's rate
    for ten of ten variants; hyperband took half of the steps and missed two (docs/early_stopping.md)."""
    study: str | None = None
    """The study's name. Default: made of script, task and model. The same name extends a study."""
    output: Path = field(default_factory=default_output)
    """Folder for the store and, one folder a study, the reports. Default: ORCHESTRATOR_OUTPUT, else
    `results`. With --on: where the reports are brought to."""
    store: Path | None = None
    """Folder of the records, shared by all studies. Default: `store` in the output folder."""
    tracking_uri: str | None = None
    """MLflow tracking server. Default: MLFLOW_TRACKING_URI, else a SQLite file in the store."""
    save_adapters: bool = False
    """Keep every trained adapter, in PEFT's format, as an artifact of its MLflow run."""
    trainers: int | None = None
    """How many Ray Train runs hold the base model. Default: what the cluster has room for, following nodes
    that come and go. Of a cluster that was there before, more may be asked for: they wait for nodes."""
    workers_per_trainer: int = 1
    """Workers of a seat, which split every batch between them. Each holds the base model."""
    lanes_per_trainer: int | None = None
    """How many fine-tunes a seat trains at once over one copy of the base. Default: 4."""
    gpus_per_worker: float | None = None
    """GPUs of a seat's worker; a fraction lets seats share one. Default: 1 where there are GPUs, or where the
    cluster's head can start nodes with some (not for --dry-run), else 0."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu`: seats hold their GPUs in Ray's book-keeping only and train on CPUs: a rehearsal of a GPU
    cluster."""
    trainer_timeout: float | None = None
    """Seconds that a study waits while it has no seat at all. Default: 300, and 1800 where GPU nodes have to
    be started first."""
    max_hours: float | None = None
    """End the study after so many hours of this run (a script of two studies: of each), with what it has:
    lanes are saved, the report is written, exit code 3. The same command goes on."""
    max_gpu_hours: float | None = None
    """The same after so many hours of this run's seats, times the GPUs that each holds. What an earlier run
    has spent does not count."""
    retry_failed: bool = False
    """Train again what failed three times; without it, that counts as known."""
    on: str | None = None
    """Where the command runs. `cluster.yaml`, the file of a cluster that is up: on its head, with these
    options; the output is shown here, Ctrl-C lets go of it and the same command follows it again, and at
    the end the reports are brought here. `here`: on this machine. Default: a Ray that runs here or that
    RAY_ADDRESS names is joined; else you are asked where a ./cluster.yaml is up."""
    stop: bool = False
    """With --on: end the study that this command has started there. What is half done is kept."""
    plan: bool = False
    """Print what would be trained, what is known already, the estimated time and, on GPUs, hours and price;
    start nothing."""
    price_per_gpu_hour: str | None = None
    """Of --plan: USD, LOW:HIGH or one number. Default: AWS's spot and on-demand price of the GPU, from a
    small dated table."""

    def __post_init__(self) -> None:
        """Raises BadInput for whatever can be seen to be wrong without a model or a cluster."""
        if self.learning_rates is not None:
            rates.parse_learning_rates(self.learning_rates)
        if self.variants is not None and not self.variants:
            raise UsageError("--variants is empty; name at least one, for example: lora pissa.")
        for option in ("task", "model", "tracking_uri", "on"):
            if getattr(self, option) == "":
                raise UsageError(f"--{option.replace('_', '-')} is empty; name one, or leave it out.")
        bounds.check_bound("--seeds", self.seeds, bounds.MAX_POINTS)
        self._check_search()
        for name, value, most in (
            ("--rank", self.rank, bounds.MAX_RANK),
            ("--steps", self.steps, bounds.MAX_STEPS),
            ("--evaluations", self.evaluations, bounds.MAX_EVALUATIONS),
            ("--batch-size", self.batch_size, bounds.MAX_BATCH_SIZE),
            ("--trainers", self.trainers, bounds.MAX_TRAINERS),
            ("--lanes-per-trainer", self.lanes_per_trainer, bounds.MAX_TRAINERS),
            ("--workers-per-trainer", self.workers_per_trainer, bounds.MAX_TRAINERS),
        ):
            bounds.check_bound(name, value, most)
        if self.accumulation is not None and self.accumulation < 1:
            raise UsageError(f"--accumulation {self.accumulation}: must be 1 or more.")
        if self.batch_size is not None:
            self.check_batch_size(self.batch_size)
        if self.head_learning_rate != "same":
            rates.parse_positive_number(
                "--head-learning-rate", self.head_learning_rate, "For example: same, or 1e-3."
            )
        if self.scheduler == "pbt":
            raise UsageError(
                "--scheduler 'pbt': a configuration is immutable and pbt changes its hyperparameters on the "
                "way, so that no record could say what was trained; take asha."
            )
        if self.scheduler not in SCHEDULERS:
            raise UsageError(
                f"--scheduler {self.scheduler!r} is not one. {suggest_nearest(self.scheduler, SCHEDULERS)}"
            )
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise UsageError(
                f"--alpha {self.alpha}: must be a finite number above 0; the usual choice is 16."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout:g}: must be at least 0 and below 1, for example 0.05.")
        if self.gpus_per_worker is not None:
            _check_gpus_per_worker(self.gpus_per_worker)
            if self.workers_per_trainer > 1 and 0 < self.gpus_per_worker < 1:
                both = f"--workers-per-trainer {self.workers_per_trainer} with --gpus-per-worker {self.gpus_per_worker:g}"
                raise UsageError(
                    f"{both}: NCCL refuses workers on one GPU; take --gpus-per-worker 1, "
                    "or --workers-per-trainer 1."
                )
        for name, hours in (("--max-hours", self.max_hours), ("--max-gpu-hours", self.max_gpu_hours)):
            if hours is not None and not (math.isfinite(hours) and hours > 0):
                raise UsageError(f"{name} {hours:g}: must be a finite number above 0, for example 1.5.")
        if self.max_gpu_hours is not None and self.gpus_per_worker == 0:
            raise UsageError(
                f"--max-gpu-hours {self.max_gpu_hours:g} with --gpus-per-worker 0: no GPU is held; "
                "take --max-hours."
            )
        if self.price_per_gpu_hour is not None:
            price.parse_price(self.price_per_gpu_hour)
        if self.stop and (self.on in (None, LOCAL) or self.plan):
            raise UsageError(
                "--stop ends a study on a cluster: add --on cluster.yaml (here: Ctrl-C), without --plan."
            )
        if self.trainer_timeout is not None and not 0 < self.trainer_timeout < math.inf:
            raise UsageError(
                f"--trainer-timeout {self.trainer_timeout:g}: must be a finite number of seconds above 0; the "
                "default is 300."
            )
        if self.study is not None:
            study_name.check_name(self.study)
            self.study_folder(self.study)

    @property
    def search_method(self) -> str:
        """`grid`, or the sampler of a search."""
        return (self.sampler or "tpe") if self.search == "optuna" else self.search

    @property
    def seed_count(self) -> int:
        if self.search != "grid":
            return 1
        return DEFAULT_GRID_SEEDS if self.seeds is None else self.seeds

    @property
    def point_count(self) -> int:
        """Of a search: points of each variant and task."""
        return DEFAULT_POINTS if self.points is None else self.points

    def _check_search(self) -> None:
        if self.search not in SEARCHES:
            raise UsageError(f"--search {self.search!r} is not one. {suggest_nearest(self.search, SEARCHES)}")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UsageError(
                f"--sampler {self.sampler!r} is not one. {suggest_nearest(self.sampler, SAMPLERS)}"
            )
        if self.sampler is not None and self.search != "optuna":
            raise UsageError(f"--sampler {self.sampler}: it is for --search optuna, not {self.search}.")
        bounds.check_bound("--points", self.points, bounds.MAX_POINTS)
        self._check_conflicting_values()
        if self.search == "optuna" and self.scheduler == "hyperband":
            raise UsageError(
                "--scheduler hyperband with --search optuna: it compares brackets that are full, and a "
                "search that learns asks for one point after another, so that nothing is stopped; take asha."
            )
        if self.search == "grid":
            for option, given in (("--points", self.points is not None), ("--space", self.space is not None)):
                if given:
                    raise UsageError(f"{option} is for a search; take --search qmc, or optuna.")
        elif self.seed_count < (self.seeds or 1):
            raise UsageError(
                f"--seeds {self.seeds}: a search trains each point once, with seed 0, and fresh seeds "
                "confirm its choice later; take --seeds 1."
            )

    def _check_conflicting_values(self) -> None:
        """Raises BadInput where two options give one value: an option of its own (as far as it is not what it
        would be untyped) and --set or --space for all variants."""
        default = {each.name: each.default for each in fields(StudyOptions)}
        for option, words in (("--set", self.set), ("--space", self.space or ())):
            for word in words:
                name = word.partition("=")[0].replace("-", "_")
                option_name = OPTION_OF_HYPERPARAMETER.get(name, name)
                if (
                    option_name in HYPERPARAMETER_OPTIONS
                    and getattr(self, option_name) != default[option_name]
                ):
                    option_flag = f"--{option_name.replace('_', '-')}"
                    raise UsageError(
                        f"{option} {word!r} and {option_flag} both say {name}; take one of the two away."
                    )

    @property
    def store_folder(self) -> Path:
        return self.store if self.store is not None else self.output / study_name.DEFAULT_STORE_NAME

    def study_folder(self, name: str) -> Path:
        """Return the folder of the study `name`. Raises BadInput where it can have none."""
        return study_name.resolve_study_folder(name, self.output, self.store_folder)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises BadInput unless `batch_size`, typed or the task's, can be split as asked."""
        parts = self.accumulation or 1
        if batch_size % parts:
            fits = max(n for n in range(1, min(parts, batch_size + 1)) if batch_size % n == 0)
            raise UsageError(
                f"--accumulation {parts}: must divide the batch size, {batch_size}; take {fits}."
            )
        micro_batch_size = batch_size // parts
        if self.workers_per_trainer > micro_batch_size:
            raise UsageError(
                f"--workers-per-trainer {self.workers_per_trainer}: every worker needs a row of the {micro_batch_size} "
                f"computed at once (batch size {batch_size}, accumulation {parts}); take {micro_batch_size}."
            )

    def check_output(self) -> None:
        """Make the folders of results and records, and try to write there.

        Raises:
            BadInput: One of them is no folder.
            OSError: The disk is full or cannot be used, as `refused_by_disk` tells; it names the folder.
        """
        for name, folder in (("--output", self.output), ("--store", self.store_folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                error.filename = str(folder)
                if describe_disk_error(error):
                    raise
                raise UsageError(
                    f"{name} {str(folder)!r} cannot be written ({error.strerror}); name a folder that can."
                ) from None


def parse_options(description: str | None, options_class: type[StudyOptions] = StudyOptions) -> StudyOptions:
    """The command line's options, of the class `kind`, which may add a script's own. `--help` and mistakes
    end the process (0 and 2), and so does a run on a cluster (--on), with the exit code that it had there."""
    import tyro

    options = tyro.cli(options_class, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    print_status("Reading libraries, the task's data, the model and the records ...")
    if options.on is None and (options.dry_run or options.plan or not Path(CLUSTER_FILE).is_file()):
        return options  # without looking for a cluster, which takes a moment
    from orchestrator.cluster.remote.target import run_if_remote

    code = run_if_remote(options)
    if code is not None:
        sys.exit(code)
    return options


def _check_gpus_per_worker(value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise UsageError(
            f"--gpus-per-worker {value:g}: must be 0 or more, for example 1, or 0.5 for two seats a GPU."
        )
    if value > 1 and value != int(value):
        raise UsageError(
            f"--gpus-per-worker {value:g}: must be a fraction below 1 or a whole number; take {int(value)}."
        )
    if value > 1:
        raise UsageError(
            f"--gpus-per-worker {value:g}: a seat holds its base on one GPU; take 1 and more --trainers."
        )
