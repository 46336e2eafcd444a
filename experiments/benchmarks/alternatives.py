"""The study of `makespan.py` as a hand-written training loop with PEFT, without this project.

    python alternatives.py {processes,actors} STUDY.json SCORES.json --processes 2

processes  a pool of processes without Ray; each process trains one run after another
actors     a Ray Tune class trainable with `reuse_actors`: each actor loads the base model once

A study is a JSON file: the base model's folder, the tokenized rows of each split, and the runs. The data
order, the steps and the evaluations are those of this project; the adapters are PEFT's, and so are their
initial values, so scores agree only as far as two seeds agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from orchestrator.finetune.data.batches import shuffled_indices

IGNORED = -100
RANK, ALPHA, WARMUP = 8, 16, 0.05
EVALUATION_ROWS = 64
LORA_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
"""Variant -> arguments of PEFT's LoraConfig."""


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    variant: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """The name of the run in the results."""
        return f"{self.variant} {self.rate:g} {self.seed}"


@dataclass(frozen=True)
class Study:
    """The runs and everything that they have in common."""

    base: str
    """The folder of the base model."""
    rows: Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]]
    """Split -> token ids and labels of each row. Labels are shifted: label i belongs to the prediction after
    token i."""
    runs: Sequence[Run]
    steps: int
    evaluations: int
    batch_size: int

    @classmethod
    def read(cls, file: Path) -> Study:
        """Read a study from its file."""
        data = json.loads(file.read_text())
        return cls(**{**data, "runs": [Run(**run) for run in data["runs"]]})

    @cached_property
    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Split -> token ids and labels, (rows, length); all rows of `letters` have one length."""
        return {
            split: (torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]))
            for split, rows in self.rows.items()
        }

    @property
    def evaluation_steps(self) -> list[int]:
        """The steps after which the validation split is scored."""
        return [round(self.steps * n / self.evaluations) for n in range(1, self.evaluations + 1)]

    def batch_rows(self, seed: int, step: int) -> list[int]:
        """Return the training rows of a step."""
        rows = len(self.rows["train"])
        return shuffled_indices(seed, rows, step * self.batch_size, self.batch_size)

    def load_base(self) -> Any:
        """Load the base model."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()


def peft_config(variant: str) -> PeftConfig:
    """Return PEFT's configuration of a variant on all linear layers of the blocks."""
    if variant == "hira":
        return HiraConfig(r=RANK, target_modules="all-linear")
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **LORA_OPTIONS[variant])


class FineTune:
    """A fine-tune that stops after every evaluation.

    Args:
        study: The study.
        base: The loaded base model; it stays as it is.
        run: What to train.
    """

    def __init__(self, study: Study, base: Any, run: Run) -> None:
        self.study, self.run, self.step = study, run, 0
        torch.manual_seed(run.seed)
        # A copy, because PiSSA changes the weights. The base model of `letters` has 1 MB.
        self.model = get_peft_model(copy.deepcopy(base), peft_config(run.variant))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.rate, weight_decay=0.0, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, math.ceil(WARMUP * study.steps), study.steps
        )

    def train_to(self, step: int) -> dict[str, float]:
        """Train to a step. Returns the validation scores, and after the last step the test scores too."""
        ids, labels = self.study.tensors["train"]
        while self.step < step:
            rows = self.study.batch_rows(self.run.seed, self.step)
            loss = compute_loss(self.model(input_ids=ids[rows], use_cache=False).logits, labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.step += 1
        splits = ["validation", "test"] if self.step == self.study.steps else ["validation"]
        return {f"{split} {k}": v for split in splits for k, v in self.score(split).items()}

    @torch.no_grad()
    def score(self, split: str) -> dict[str, float]:
        """Return the loss and the share of rows all of whose labels are predicted."""
        ids, labels = self.study.tensors[split]
        losses, correct = 0.0, 0
        for rows in torch.arange(len(ids)).split(EVALUATION_ROWS):
            logits = self.model(input_ids=ids[rows], use_cache=False).logits
            losses += compute_loss(logits, labels[rows]).item() * len(rows)
            correct += int(count_correct(logits, labels[rows]))
        return {"loss": losses / len(ids), "exact_match": correct / len(ids)}

    def train(self) -> dict[str, float]:
        """Train to the end. Returns the last scores."""
        return [self.train_to(step) for step in self.study.evaluation_steps][-1]


def compute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that count.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length); `IGNORED` does not count.
    """
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of rows in which every label that counts is predicted.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length); `IGNORED` does not count.
    """
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).sum()


_STATE: dict[str, Any] = {}
"""The study and the base model of this process."""


def start_process(file: Path) -> None:
    """Load the study and the base model once for all runs of this process."""
    torch.set_num_threads(1)
    _STATE["study"] = Study.read(file)
    _STATE["base"] = _STATE["study"].load_base()


def train_in_pool(run: Run) -> tuple[str, dict[str, float]]:
    """Train a run. Return its name and its scores."""
    return run.key, FineTune(_STATE["study"], _STATE["base"], run).train()


def run_processes(options: argparse.Namespace) -> None:
    """Train the study in a pool of processes. Each process trains one run after another."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, start_process, (options.study,)) as pool:
        scores = dict(pool.imap_unordered(train_in_pool, Study.read(options.study).runs))
    options.scores.write_text(json.dumps(scores))


def make_trainable() -> type[Any]:
    """Return a subclass of `tune.Trainable`. Only this function imports Ray; `processes` runs without it."""
    from ray import tune

    class PeftTrainable(tune.Trainable):
        """A trial of one run. The base model stays in the process for later runs."""

        def setup(self, config: dict[str, Any]) -> None:
            """Load the study and the base model, and begin the first run."""
            torch.set_num_threads(1)
            self.study = Study.read(Path(config["study"]))
            self.base = self.study.load_base()
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            """Begin another run in the same process."""
            self.fine_tune = FineTune(self.study, self.base, Run(**new_config["run"]))
            self.evaluation_steps = iter(self.study.evaluation_steps)
            return True

        def step(self) -> dict[str, Any]:
            """Train to the next evaluation. Return its scores."""
            scores: dict[str, Any] = self.fine_tune.train_to(next(self.evaluation_steps))
            return {**scores, "run": self.fine_tune.run.key, "done": self.fine_tune.step == self.study.steps}

    return PeftTrainable


def run_actors(options: argparse.Namespace) -> None:
    """Train the study with reused actors."""
    import ray
    from ray import tune

    ray.init(num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
    runs = [asdict(each) for each in Study.read(options.study).runs]
    tuner = tune.Tuner(
        tune.with_resources(make_trainable(), {"cpu": 1}),
        param_space={"study": str(options.study.resolve()), "run": tune.grid_search(runs)},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(options.scores.parent.resolve() / "tune"),
            verbose=0,
            # By default Tune saves a class trainable at its end. This class cannot be saved, and would fail.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    scores = {
        result.metrics["run"]: {k: v for k, v in result.metrics.items() if k.startswith(("val", "test "))}
        for result in tuner.fit()
    }
    options.scores.write_text(json.dumps(scores))


def run() -> None:
    """Train the study of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=("processes", "actors"))
    parser.add_argument("study", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    {"processes": run_processes, "actors": run_actors}[options.side](options)


if __name__ == "__main__":
    run()
