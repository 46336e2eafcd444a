"""The options of a study, in sections, and the rules that involve several of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.study import names
from orchestrator.study.config import find_config, shipped_studies
from orchestrator.study.configuration import HYPERPARAMETERS, Dtype, LRScheduleName
from orchestrator.study.expected import Expected
from orchestrator.study.grids import parse_learning_rates, parse_positive_number
from orchestrator.study.option import Count, Examples, Option, Options, Positive, Text, Words, flag
from orchestrator.study.space import setting_key
from orchestrator.util.errors import UsageError

DEFAULT_LANES_PER_TRAINER = 4
"""The number on a CPU, where more lanes save little time unless they are short, and the number to expect of a
trainer that chooses it."""
SHORT_LANES_PER_TRAINER = 8
"""The number on a CPU for lanes of few tokens, which share the time of Python and of the kernels' calls."""
MAX_AUTOMATIC_LANES = 8
"""The largest number that a trainer chooses on its GPU."""
Card = Literal["L4", "A10G", "L40S", "A100", "H100", "H200", "B200", "RTX 4090"]
"""A GPU whose speed --plan knows (`launch/plan.py`)."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Options):
    """The folders of results."""

    output: Annotated[Path, Option(paths=True, saved=False)] = field(default_factory=names.default_output)
    """Output folder, with the store and a subfolder for each study. Default: ORCHESTRATOR_OUTPUT, else
    `results`."""
    store: Annotated[Path | None, Option(paths=True)] = None
    """Folder of the records, shared by all studies. Default: `store` in the output folder."""

    @property
    def store_folder(self) -> Path:
        """The folder of the store: --store, else `store` in the output folder."""
        return self.store or self.output / names.DEFAULT_STORE_NAME


@dataclass(frozen=True, kw_only=True)
class StudyOptions(StoreOptions):
    """All options of a study.

    Raises:
        UsageError: An option has a value that is wrong whatever the base model and the cluster are.
    """

    dry_run: Annotated[bool, Option(section="grid")] = False
    """Rehearse the whole study on this machine, without a GPU: a small task on a base model that is
    pretrained here once (about half a minute). Ends in a few minutes with a complete report. --task names
    another task than letters, for example reviews; tasks on downloaded models take longer. With --data, give
    --steps as well."""
    variants: Annotated[Words | None, Option("NAME", commas=True)] = None
    """Variants to compare, e.g. `lora pissa` or `LoRA,PiSSA`: names from `python -m variants`, `peft:TYPE`
    for a tuner of the PEFT library, or the path of a .py file. Default: those that --plan shows."""
    task: Annotated[Words | None, Option("NAME", commas=True)] = None
    """Task to fine-tune on: its name, or the path of a .toml or .py file that defines one. With several,
    every variant is trained on each of them."""
    select: Literal["validation", "published"] = "validation"
    """Split that chooses the learning rate: `validation`, or `published`, which repeats the survey's choice
    on the test set (for GLUE also of a run's best evaluation). Reports mark results of this choice."""
    model: Annotated[Text | None, Option("NAME", paths=True)] = None
    """Base model: a known name, a folder, or a hub name. Default: each task's own."""
    learning_rates: Annotated[Words | None, Option("RATE", commas=True, sets="learning_rate")] = None
    """A list (`1e-4 1e-3`), or low:high:points-per-decade (`1e-5:1e-2:2`). Default: the task's grid."""
    seeds: Count | None = None
    """Number of seeds per point; the seeds are 0, 1, ... Seed k gives every variant the same data order and
    initial noise. Default: 3 for a grid, 5 for a study of factors; a search trains each point once, with
    seed 0."""
    set: Annotated[tuple[Text, ...], Option("NAME=VALUE")] = ()
    """Fixed values, NAME=VALUE each; names as in --space, e.g. `lora_plus.ratio=4 weight_decay=0.01`."""
    rank: Annotated[int, HYPERPARAMETERS["rank"].bounds, Option(sets="rank")] = 8
    """Rank of the update."""
    alpha: Annotated[float, HYPERPARAMETERS["alpha"].bounds, Option(sets="alpha")] = 16.0
    """LoRA's alpha; the update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank)). HiRA has none."""
    dropout: Annotated[float, HYPERPARAMETERS["dropout"].bounds, Option(sets="dropout")] = 0.0
    """Probability that an input of an adapter is zeroed in training."""
    targets: Annotated[Text, Option("LAYERS", sets="targets")] = "blocks"
    """Layers that get an adapter: `blocks` (every linear layer of the model's blocks), a comma-separated list
    of name endings (`q_proj,v_proj`), or `re:` and a regular expression."""
    data: Annotated[Words | None, Option("PATH", section="data", paths=True, rival="task")] = None
    """Data to fine-tune on, in place of --task: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of
    images with one subfolder per class, a folder with train, validation and test files, or a dataset of the
    hub (organization/name, organization/name:subset). With several, every variant is trained on each."""
    validation_data: Annotated[Text | None, Option("PATH", paths=True, needs="data")] = None
    """File or folder with the validation rows. Default: a validation split in the data, else rows of the
    training data, chosen by a hash of their content."""
    test_data: Annotated[Text | None, Option("PATH", paths=True, needs="data")] = None
    """File or folder with the test rows. Default: as for --validation-data."""
    columns: Annotated[tuple[Text, ...], Option("ROLE=COLUMN", needs="data")] = ()
    """Columns by their role, ROLE=COLUMN each, e.g. `text=body label=folder`. Roles: prompt completion
    messages text text1 text2 label image split. Default: found by the usual names."""
    template: Annotated[Text | None, Option("TEXT", needs="data")] = None
    r"""Prompt of a row, with columns in braces and \n for a new line: `Question: {question}\nAnswer:`."""
    metric: Annotated[
        Literal[
            "exact_match", "numeric", "token_f1", "accuracy", "f1", "macro_f1", "matthews", "pearson", "loss"
        ]
        | None,
        Option("METRIC", needs="data"),
    ] = None
    """Score of the answers: exact_match, numeric (the last number or formula of a generated text) or token_f1
    for prompts; accuracy, f1, macro_f1 or matthews for labels; pearson for numbers as labels; or loss, which
    is reported as inverse_perplexity, exp(-loss): higher is better. Default: accuracy, exact_match, or loss
    for long answers."""
    max_new_tokens: Annotated[Examples | None, Option(needs="data")] = None
    """Longest generated answer in tokens, for numeric and token_f1. Default: by the longest answer."""
    search: Annotated[Literal["grid", "random", "qmc", "optuna"], Option(section="search")] = "grid"
    """Source of the points: `grid` (the learning rates), `random`, `qmc` (evenly spread), or `optuna`, which
    learns from earlier results. Each variant gets the same number of points."""
    sampler: Annotated[Literal["tpe", "cma-es", "qmc", "random"] | None, Option(needs="search")] = None
    """Sampler of `--search optuna`: tpe (default), cma-es, qmc, random."""
    points: Annotated[Count | None, Option(needs="search")] = None
    """Points that a search gives each variant (default 16), counted over all runs of the study. With a larger
    number, the same command continues the search; a smaller number is refused."""
    space: Annotated[Words | None, Option("NAME=SPEC", needs="search")] = None
    """Hyperparameters that a search varies, NAME=SPEC each. NAME: learning_rate, rank, alpha, dropout,
    weight_decay, warmup, batch_size, ..., or VARIANT.NAME for one variant alone, which may also be a setting
    that only this variant has (`lora_plus.ratio`). SPEC: `low:high`, `log:low:high`, `int:low:high`,
    `logint:low:high`, or a choice `4,8,16`. A learning rate that is not named is searched between the ends of
    --learning-rates, unless that is one rate or --set fixes it."""
    scheduler: Annotated[str, Option(registry="orchestrator.execution.schedulers:SCHEDULERS")] = "none"
    """Early stopping by validation loss, separately for each variant and task, by Ray Tune. Stopped lanes
    are shown as censored; without early stopping they continue. With --evaluations 10, asha takes about a
    third of the steps (docs/search.md)."""
    steps: Annotated[
        int | None, HYPERPARAMETERS["steps"].bounds, Option(section="training", sets="steps")
    ] = None
    """Optimizer steps of a fine-tune. Default: the task's."""
    epochs: Annotated[Positive | None, Option(sets="steps", rival="steps")] = None
    """Passes over the training examples, in place of --steps."""
    train_size: Annotated[int | None, HYPERPARAMETERS["train_size"].bounds, Option(sets="train_size")] = None
    """Number of training examples, the first ones of the task's sequence. Default: the task's."""
    test_size: Examples | None = None
    """Number of test examples, the first ones of the task's sequence. With more of them, smaller differences
    can be decided. Default: the task's. Another number makes other configurations."""
    evaluations: Annotated[int | None, Field(ge=1, le=100_000)] = None
    """Number of evenly spaced evaluations of a fine-tune on the validation split. Default: the task's. Early
    stopping acts at evaluations only; another number makes other configurations."""
    batch_size: Annotated[int | None, HYPERPARAMETERS["batch_size"].bounds, Option(sets="batch_size")] = None
    """Examples per optimizer step. Default: the task's."""
    max_length: Examples | None = None
    """Longest training example in tokens. Default: the task's."""
    accumulation: Annotated[int | None, Field(ge=1)] = None
    """Micro-batches of equal size into which a step's examples are split: less memory, the same numbers up to
    rounding (with dropout, other masks). Must divide the batch size. Default: the task's."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same numbers."""
    lr_schedule: Annotated[LRScheduleName | None, Option(sets="schedule")] = None
    """Learning rate schedule after a linear warm-up. Default: the task's."""
    head_learning_rate: Annotated[str, Option("RATE", sets="head_learning_rate")] = "same"
    """Learning rate of a classification task's head: `same` (that of all other tensors), or a number."""
    base_dropout: Literal["on", "off"] | None = None
    """Dropout of the base model itself in training: on or off (0.1 in RoBERTa, BERT, DeBERTa and GPT-2;
    Llama and Qwen have none). Default: the task's; on for GLUE's tasks, whose published runs had it."""
    dtype: Dtype | None = None
    """Data type of the frozen base; adapters are float32. `nf4` (as in QLoRA) quantizes the weights of the
    blocks' linear layers to 4 bits when the model is loaded: less memory, more time. The rest of the model
    is bfloat16. Default: the task's."""
    trainers: Annotated[Count | None, Option(section="resource")] = None
    """Number of Ray Train runs, each of which holds the base model. Default: as many as fit, adapted while
    nodes come and go. On a cluster that the study has joined, trainers beyond that number wait for nodes."""
    workers_per_trainer: Count = 1
    """Workers of a trainer, which share every batch. Each holds the base model."""
    lanes_per_trainer: Count | None = None
    """Number of fine-tunes (lanes) that a trainer trains at once over one copy of the base. Default: 4 on a
    CPU; on a GPU up to 8, as far as more save time. Half of the lanes leave when memory runs out."""
    gpus_per_worker: Annotated[float | None, Field(ge=0, le=1)] = None
    """GPUs of a worker; a fraction lets several trainers share one. Default: 1 where there are GPUs, or on a
    joined cluster for base models in bfloat16 or 4 bits (not for --dry-run), else 0."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu`: trainers reserve their GPUs in Ray but train on CPUs, as a rehearsal of a GPU cluster."""
    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of the base's norms, rotary embeddings and gated activations: transformers' own in PyTorch, or
    `liger`, Liger's Triton kernels on GPUs (extra `gpu`): less time and memory for Qwen, Llama,
    Mistral, Gemma and others. Results differ by rounding; records name the kernels."""
    trainer_timeout: Positive | None = None
    """Seconds after which a study without any trainer ends. Default: 300, or 1800 where GPU nodes have to be
    started first."""
    config: Annotated[Path | None, Option("FILE", section="output", saved=False)] = None
    """YAML file with options, such as the study.yaml in the folder of every study, or the name of a study
    that comes with the program: lr-matters-qwen3-0.6b, lr-matters-32-runs, peft-metamathqa,
    published-gsm8k-r8, published-gsm8k-r128, published-humaneval, published-glue, published-images. One
    NAME: VALUE a line, flat or grouped as here. An option on the command line replaces that of the file."""
    expected: Annotated[Expected, Option("ENTRY")] = ()
    """Published numbers with which the report compares the study's own, as a list in the file of --config:
    docs/published.md has the form of an entry."""
    study: Annotated[Text | None, Option(saved=False)] = None
    """Name of the study. Default: script, task and model. The same name extends a study."""
    tracking_uri: Annotated[Text | None, Option("ADDRESS")] = None
    """MLflow tracking server. Default: MLFLOW_TRACKING_URI, else a SQLite file in the store."""
    tracker: Annotated[
        tuple[Literal["none", "wandb", "tensorboard"], ...], Field(min_length=1), Option(commas=True)
    ] = ("none",)
    """Programs that show the runs beside MLflow: `wandb` (Weights & Biases), `tensorboard`, or both."""
    save_adapters: Literal["none", "best", "all"] = "best"
    """Trained adapters that the store keeps for the command `export`: of each variant and task the one with
    the best validation score, all, or none."""
    only: Annotated[Words | None, Option("FINGERPRINT", commas=True, saved=False)] = None
    """Train these configurations alone: the first digits of fingerprints that the study requests or has
    recorded, or the study of --config, for example to train a lane again in another --output."""
    plan: Annotated[bool, Option(saved=False)] = False
    """Print what would be trained, what the store has already, tokens, and time and price as far as they were
    measured or can be guessed; start nothing."""
    plan_gpu: Annotated[Card | None, Option(needs="plan", saved=False)] = None
    """GPU for which --plan guesses hours, also where there is none. Default: this machine's."""
    price_per_hour: Annotated[Positive | None, Option(saved=False)] = None
    """Price in USD of one GPU for an hour, by which --plan multiplies the GPU hours."""
    max_hours: Annotated[Positive | None, Option(section="limit")] = None
    """Hours after which this run ends. Lanes are saved, the report is written, and the exit code is 3. The
    same command continues the study."""
    max_gpu_hours: Positive | None = None
    """GPU hours after which this run ends in the same way: the hours of its trainers times the GPUs that each
    holds. Earlier runs do not count."""
    retry_failed: Annotated[bool, Option(saved=False)] = False
    """Train configurations again that have failed three times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rates is not None:
            parse_learning_rates(self.learning_rates)
        if self.head_learning_rate != "same":
            parse_positive_number(
                "--head-learning-rate", self.head_learning_rate, "For example: same, or 1e-3."
            )
        self._check_search()
        self._check_hyperparameters()
        self._check_resources()
        if self.batch_size is not None:
            self.check_batch_size(self.batch_size)
        if "none" in self.tracker and len(self.tracker) > 1:
            raise UsageError(f"{self.shown('tracker')}: none stands alone; take the others alone, or none.")
        if self.study is not None:
            self.study_folder(self.study)

    @property
    def preset(self) -> str | None:
        """Name of the study that comes with the program, if --config names one."""
        name = str(self.config)
        return name if find_config(name) == shipped_studies().get(name) else None

    @property
    def replicate_count(self) -> int:
        """Number of tunings of each variant, each with a seed of its own."""
        return 1

    @property
    def models(self) -> tuple[str, ...]:
        """Base models of each task, where they are what the study varies; empty for --model or the task's."""
        return ()

    @property
    def design_name(self) -> str | None:
        """The part of the default name of a study that names its design; None for a grid."""
        return None if self.search == "grid" else self.search_method

    @property
    def search_method(self) -> str:
        """Name of the sampler of a search, or `grid`."""
        return (self.sampler or "tpe") if self.search == "optuna" else self.search

    @property
    def seed_count(self) -> int:
        """Number of seeds per point."""
        return 1 if self.search != "grid" else self.seeds or 3

    @property
    def point_count(self) -> int:
        """Number of points that a search gives each variant and task."""
        return 16 if self.points is None else self.points

    def _check_search(self) -> None:
        if self.sampler is not None and self.search != "optuna":
            raise UsageError(f"{self.shown('sampler')}: it is for --search optuna, not {self.search}.")
        if self.search != "grid" and (self.seeds or 1) > 1:
            raise UsageError(
                f"--seeds {self.seeds}: a search trains each point once; take --seeds 1, or repeat whole "
                f"searches with `lora-orchestrator tuned --replicates {self.seeds}`."
            )
        if self.select == "published" and (self.search != "grid" or self.scheduler != "none"):
            raise UsageError(
                "--select published: the survey chose among the runs of a whole grid; take --search grid and "
                "--scheduler none."
            )

    def _check_hyperparameters(self) -> None:
        """Check that --set and --space name no hyperparameter that another option sets as well."""
        setters = {sets: name for name in self.given() if (sets := self.declared()[name].sets)}
        for option, words in (("--set", self.set), ("--space", self.space or ())):
            for word in words:
                key = setting_key(word)
                # Beside --space, --batch-size gives the size for which --accumulation is chosen.
                if key in setters and (option, key) != ("--space", "batch_size"):
                    both = f"{option} {word!r} and {flag(setters[key])}"
                    raise UsageError(f"{both} both set {key}; take one of the two away.")

    def _check_resources(self) -> None:
        gpus = self.gpus_per_worker
        if gpus and self.workers_per_trainer > 1 and gpus < 1:
            raise UsageError(
                f"--workers-per-trainer {self.workers_per_trainer} with --gpus-per-worker {gpus:g}: NCCL "
                "refuses two workers on one GPU; take --gpus-per-worker 1, or --workers-per-trainer 1."
            )
        if self.device == "cpu" or gpus == 0:
            cpu = "--device cpu" if self.device == "cpu" else "--gpus-per-worker 0"
            if self.kernels == "liger":
                raise UsageError(f"--kernels liger with {cpu}: Liger needs GPUs; take --kernels torch.")
            if self.plan_gpu is not None:
                raise UsageError(f"--plan-gpu {self.plan_gpu!r} with {cpu}: take one of the two away.")
        if self.max_gpu_hours is not None and gpus == 0:
            limit = self.shown("max_gpu_hours")
            raise UsageError(f"{limit} with --gpus-per-worker 0: no GPU is held; take --max-hours.")

    def check_batch_size(self, batch_size: int) -> None:
        """Check that a batch can be split into micro-batches and between workers.

        Args:
            batch_size: Examples per optimizer step: --batch-size, or the task's.

        Raises:
            UsageError: --accumulation does not divide it, or it has fewer rows than there are workers.
        """
        parts = self.accumulation or 1
        if batch_size % parts:
            divisor = max(n for n in range(1, min(parts, batch_size + 1)) if batch_size % n == 0)
            raise UsageError(
                f"--accumulation {parts}: must divide the batch size, {batch_size}; take {divisor}."
            )
        if self.workers_per_trainer > batch_size:
            rule = f"every worker needs a row of the {batch_size} in a batch; take {batch_size}"
            raise UsageError(f"--workers-per-trainer {self.workers_per_trainer}: {rule}.")

    def study_folder(self, name: str) -> Path:
        """Return the folder of the study `name`.

        Raises:
            UsageError: The name is not allowed, or names a folder of the store.
        """
        return names.resolve_study_folder(name, self.output, self.store_folder)
