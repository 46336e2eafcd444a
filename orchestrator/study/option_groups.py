"""The options of a study in six groups, each with a section of `--help` and a method that checks its values.

`StudyOptions` checks the rules that involve several groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.study import bounds, grids, study_name
from orchestrator.util.errors import UsageError, suggest_nearest

SCHEDULERS = ("none", "asha", "median")
SEARCHES = ("grid", "random", "qmc", "optuna")
SAMPLERS = ("tpe", "cma-es", "qmc", "random")


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Variants, task, base model, learning rates and seeds to compare."""

    dry_run: bool = False
    """Rehearse the whole study on this machine, without a GPU: a small task on a base model that is
    pretrained here once (about half a minute). Ends in a few minutes with a complete report. --task names
    another task than letters, for example reviews; tasks on downloaded models take longer. With --data, give
    --steps as well."""
    variants: tuple[str, ...] | None = None
    """Variants to compare, e.g. `lora pissa` or `LoRA,PiSSA`: names from `python -m variants`, `peft:TYPE`
    for a tuner of the PEFT library, or the path of a .py file. Default: those that --plan shows."""
    task: tuple[str, ...] | None = None
    """Task to fine-tune on: its name, or the path of a .py file that defines one. With several, every variant
    is trained on each of them."""
    preset: str | None = None
    """A grid of the published study as defaults of the other options: published-gsm8k, published-humaneval,
    published-glue, published-images or published-gsm8k-r128. Any option beside it narrows or replaces what
    the preset says. `--plan` lists its deviations from the published study."""
    select: Literal["validation", "published"] = "validation"
    """Split that chooses the learning rate: `validation`, or `published`, which repeats the survey's choice
    on the test set (for GLUE also of a run's best evaluation). Reports mark results of this choice."""
    model: str | None = None
    """Base model: a known name, a folder, or a hub name. Default: each task's own."""
    learning_rates: tuple[str, ...] | None = None
    """A list (`1e-4 1e-3`), or low:high:points-per-decade (`1e-5:1e-2:2`). Default: the task's grid."""
    seeds: int | None = None
    """Number of seeds per point; the seeds are 0, 1, ... Seed k gives every variant the same data order and
    initial noise. Default: 3 for a grid, 5 for a study of factors; a search trains each point once, with
    seed 0."""
    set: tuple[str, ...] = ()
    """Fixed values, NAME=VALUE each; names as in --space, e.g. `lora_plus.ratio=4 weight_decay=0.01`."""
    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """LoRA's alpha; the update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank)). HiRA has none."""
    dropout: float = 0.0
    """Probability that an input of an adapter is zeroed in training."""
    targets: str = "blocks"
    """Layers that get an adapter: `blocks` (every linear layer of the model's blocks), a comma-separated list
    of name endings (`q_proj,v_proj`), or `re:` and a regular expression."""

    def check_grid(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is empty or out of bounds.
        """
        if self.learning_rates is not None:
            grids.parse_learning_rates(self.learning_rates)
        if self.variants is not None and not self.variants:
            raise UsageError("--variants is empty; name at least one, for example: lora pissa.")
        if self.task is not None and not all(self.task or ("",)):
            raise UsageError("--task is empty; name one, or leave it out.")
        _check_not_empty("--model", self.model)
        bounds.check_bound("--seeds", self.seeds, bounds.MAX_POINTS)
        bounds.check_bound("--rank", self.rank, bounds.MAX_RANK)
        bounds.check_positive("--alpha", self.alpha, "16")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout:g}: must be at least 0 and below 1, for example 0.05.")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Search for points, and early stopping."""

    search: str = "grid"
    """Source of the points: `grid` (the learning rates), `random`, `qmc` (evenly spread), or `optuna`, which
    learns from earlier results. Each variant gets the same number of points."""
    sampler: str | None = None
    """Sampler of `--search optuna`: tpe (default), cma-es, qmc, random."""
    points: int | None = None
    """Points that a search gives each variant (default 16), counted over all runs of the study. With a larger
    number, the same command continues the search; a smaller number is refused."""
    space: tuple[str, ...] | None = None
    """Hyperparameters that a search varies, NAME=SPEC each. NAME: learning_rate, rank, alpha, dropout,
    weight_decay, warmup, batch_size, ..., or VARIANT.NAME for one variant alone, which may also be a setting
    that only this variant has (`lora_plus.ratio`). SPEC: `low:high`, `log:low:high`, `int:low:high`,
    `logint:low:high`, or a choice `4,8,16`. A learning rate that is not named is searched between the ends of
    --learning-rates, unless that is one rate or --set fixes it."""
    scheduler: str = "none"
    """Early stopping by validation loss, separately for each variant and task: none, asha, median (Ray
    Tune's). Stopped lanes are shown as censored; without early stopping they continue. With --evaluations 10,
    asha takes about a third of the steps (docs/early_stopping.md)."""

    def check_search(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is unknown, out of bounds, or does not go with another.
        """
        _check_choice("--search", self.search, SEARCHES)
        if self.sampler is not None:
            _check_choice("--sampler", self.sampler, SAMPLERS)
            if self.search != "optuna":
                raise UsageError(f"--sampler {self.sampler}: it is for --search optuna, not {self.search}.")
        bounds.check_bound("--points", self.points, bounds.MAX_POINTS)
        if self.scheduler == "pbt":
            raise UsageError(
                "--scheduler 'pbt': a configuration is immutable, but pbt changes hyperparameters during "
                "training, so that no record could say what was trained; take asha."
            )
        _check_choice("--scheduler", self.scheduler, SCHEDULERS)
        if self.search == "grid":
            for option, value in (("--points", self.points), ("--space", self.space)):
                if value is not None:
                    raise UsageError(f"{option} is for a search; take --search qmc, or optuna.")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training of one fine-tune."""

    steps: int | None = None
    """Optimizer steps of a fine-tune. Default: the task's."""
    epochs: float | None = None
    """Passes over the training examples, in place of --steps."""
    train_size: int | None = None
    """Number of training examples, the first ones of the task's sequence. Default: the task's."""
    test_size: int | None = None
    """Number of test examples, the first ones of the task's sequence. With more of them, smaller differences
    can be decided. Default: the task's. Another number makes other configurations."""
    evaluations: int | None = None
    """Number of evenly spaced evaluations of a fine-tune on the validation split. Default: the task's. Early
    stopping acts at evaluations only; another number makes other configurations."""
    batch_size: int | None = None
    """Examples per optimizer step. Default: the task's."""
    max_length: int | None = None
    """Longest training example in tokens. Default: the task's."""
    accumulation: int | None = None
    """Micro-batches of equal size into which a step's examples are split: less memory, the same numbers up to
    rounding (with dropout, other masks). Must divide the batch size. Default: the task's."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same numbers."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """Learning rate schedule after a linear warm-up. Default: the task's."""
    head_learning_rate: str = "same"
    """Learning rate of a classification task's head: `same` (that of all other tensors), or a number."""
    base_dropout: Literal["on", "off"] | None = None
    """Dropout of the base model itself in training: on or off (0.1 in RoBERTa, BERT, DeBERTa and GPT-2;
    Llama and Qwen have none). Default: the task's; on for GLUE's tasks, whose published runs had it."""
    dtype: Literal["float32", "bfloat16", "nf4"] | None = None
    """Data type of the frozen base; adapters are float32. `nf4` (as in QLoRA) quantizes the weights of the
    blocks' linear layers to 4 bits when the model is loaded: less memory, more time. The rest of the model
    is bfloat16. Default: the task's."""

    def check_training(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is out of bounds, or does not go with another.
        """
        bounds.check_bound("--steps", self.steps, bounds.MAX_STEPS)
        bounds.check_positive("--epochs", self.epochs, "1")
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"--epochs {self.epochs:g} and --steps {self.steps} both set the steps; take one of the two "
                "away."
            )
        bounds.check_bound("--train-size", self.train_size, bounds.MAX_EXAMPLES)
        bounds.check_bound("--test-size", self.test_size, bounds.MAX_EXAMPLES)
        bounds.check_bound("--max-length", self.max_length, bounds.MAX_LENGTH)
        bounds.check_bound("--evaluations", self.evaluations, bounds.MAX_EVALUATIONS)
        bounds.check_bound("--batch-size", self.batch_size, bounds.MAX_BATCH_SIZE)
        if self.accumulation is not None and self.accumulation < 1:
            raise UsageError(f"--accumulation {self.accumulation}: must be 1 or more.")
        if self.head_learning_rate != "same":
            example = "For example: same, or 1e-3."
            grids.parse_positive_number("--head-learning-rate", self.head_learning_rate, example)


@dataclass(frozen=True, kw_only=True)
class ResourceOptions:
    """Machines and processes of the study."""

    trainers: int | None = None
    """Number of Ray Train runs, each of which holds the base model. Default: as many as fit, adapted while
    nodes come and go. On a cluster that the study has joined, trainers beyond that number wait for nodes."""
    workers_per_trainer: int = 1
    """Workers of a trainer, which share every batch. Each holds the base model."""
    lanes_per_trainer: int | None = None
    """Number of fine-tunes (lanes) that a trainer trains at once over one copy of the base. Default: 4 on a
    CPU; on a GPU each trainer chooses up to 8 by the memory of its first steps."""
    gpus_per_worker: float | None = None
    """GPUs of a worker; a fraction lets several trainers share one. Default: 1 where there are GPUs, or where
    the cluster's autoscaler is known to start nodes with GPUs (not for --dry-run), else 0."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu`: trainers reserve their GPUs in Ray but train on CPUs, as a rehearsal of a GPU cluster."""
    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of the base's norms, rotary embeddings and gated activations: transformers' own in PyTorch, or
    `liger`, Liger's Triton kernels on GPUs (extra `gpu`): less time and memory for Qwen, Llama,
    Mistral, Gemma and others. Results differ by rounding; records name the kernels."""
    trainer_timeout: float | None = None
    """Seconds after which a study without any trainer ends. Default: 300, or 1800 where GPU nodes have to be
    started first."""

    def check_resources(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is out of bounds, or does not go with another.
        """
        bounds.check_bound("--trainers", self.trainers, bounds.MAX_TRAINERS)
        bounds.check_bound("--lanes-per-trainer", self.lanes_per_trainer, bounds.MAX_TRAINERS)
        bounds.check_bound("--workers-per-trainer", self.workers_per_trainer, bounds.MAX_TRAINERS)
        if self.gpus_per_worker is not None:
            _check_gpus_per_worker(self.gpus_per_worker)
            if self.workers_per_trainer > 1 and 0 < self.gpus_per_worker < 1:
                both = f"--workers-per-trainer {self.workers_per_trainer} with --gpus-per-worker"
                fix = "take --gpus-per-worker 1, or --workers-per-trainer 1"
                raise UsageError(
                    f"{both} {self.gpus_per_worker:g}: NCCL refuses two workers on one GPU; {fix}."
                )
        if self.kernels == "liger" and (self.device == "cpu" or self.gpus_per_worker == 0):
            other = "--device cpu" if self.device == "cpu" else "--gpus-per-worker 0"
            raise UsageError(f"--kernels liger with {other}: Liger needs GPUs; take --kernels torch.")
        bounds.check_positive("--trainer-timeout", self.trainer_timeout, "300")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files of the study, and output that is printed instead of training."""

    config: Path | None = None
    """YAML file with options, such as the study.yaml that is in the folder of every study: one NAME: VALUE a
    line, flat or grouped as here. An option on the command line replaces that of the file."""
    study: str | None = None
    """Name of the study. Default: script, task and model. The same name extends a study."""
    output: Path = field(default_factory=study_name.default_output)
    """Output folder, with the store and one folder of reports per study. Default: ORCHESTRATOR_OUTPUT, else
    `results`."""
    store: Path | None = None
    """Folder of the records, shared by all studies. Default: `store` in the output folder."""
    tracking_uri: str | None = None
    """MLflow tracking server. Default: MLFLOW_TRACKING_URI, else a SQLite file in the store."""
    tracker: tuple[str, ...] = ("none",)
    """Programs that show the runs beside MLflow: `wandb` (Weights & Biases), `tensorboard`, or both."""
    save_adapters: Literal["none", "best", "all"] = "best"
    """Trained adapters that the store keeps for the command `export`: of each variant and task the one with
    the best validation score, all, or none."""
    only: tuple[str, ...] | None = None
    """Train these configurations alone: the first digits of fingerprints that the study requests or has
    recorded, or the study of --config, for example to train a lane again in another --output."""
    plan: bool = False
    """Print what would be trained, what the store has already, tokens, and time and price as far as they were
    measured or can be guessed; start nothing."""
    plan_gpu: str | None = None
    """GPU for which --plan guesses hours, such as H100, also where there is none. Default: this machine's."""
    price_per_hour: float | None = None
    """Price in USD of one GPU for an hour, by which --plan multiplies the GPU hours."""

    def check_output_options(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is empty or invalid, or does not go with another.
        """
        _check_not_empty("--tracking-uri", self.tracking_uri)
        if self.only is not None and not all(self.only or ("",)):
            raise UsageError("--only is empty; give the first digits of a fingerprint, or leave it out.")
        if not all(self.tracker or ("",)):
            raise UsageError("--tracker is empty; name one, or leave it out.")
        if self.plan_gpu is not None and not self.plan:
            raise UsageError(f"--plan-gpu {self.plan_gpu!r}: it changes the plan only; add --plan.")
        bounds.check_positive("--price-per-hour", self.price_per_hour, "2.5")
        if self.study is not None:
            study_name.check_name(self.study)
            self.study_folder(self.study)

    @property
    def store_folder(self) -> Path:
        """The folder of the store: --store, else `store` in the output folder."""
        return self.store if self.store is not None else self.output / study_name.DEFAULT_STORE_NAME

    def study_folder(self, name: str) -> Path:
        """Return the folder of the study `name`.

        Raises:
            UsageError: The name is not allowed, or names a folder of the store.
        """
        return study_name.resolve_study_folder(name, self.output, self.store_folder)


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of a run, and training of failed configurations again."""

    max_hours: float | None = None
    """Hours after which this run ends. Lanes are saved, the report is written, and the exit code is 3. The
    same command continues the study."""
    max_gpu_hours: float | None = None
    """GPU hours after which this run ends in the same way: the hours of its trainers times the GPUs that each
    holds. Earlier runs do not count."""
    retry_failed: bool = False
    """Train configurations again that have failed three times."""

    def check_limits(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: A limit is not a finite number above 0.
        """
        bounds.check_positive("--max-hours", self.max_hours, "1.5")
        bounds.check_positive("--max-gpu-hours", self.max_gpu_hours, "1.5")


def _check_not_empty(option: str, value: str | None) -> None:
    if value == "":
        raise UsageError(f"{option} is empty; name one, or leave it out.")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value!r} is not one. {suggest_nearest(value, choices)}")


def _check_gpus_per_worker(value: float) -> None:
    if not math.isfinite(value) or value < 0:
        rule = "must be 0 or more, for example 1, or 0.5 for two trainers a GPU"
    elif value > 1 and value != int(value):
        rule = f"must be a fraction below 1 or a whole number; take {int(value)}"
    elif value > 1:
        rule = "a worker holds its base on one GPU; take 1 and more --trainers"
    else:
        return
    raise UsageError(f"--gpus-per-worker {value:g}: {rule}.")
