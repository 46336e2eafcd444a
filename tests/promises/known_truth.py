"""Synthetic studies of known truth: the scores in their records come from formulas.

The plan of a study lists its configurations. A record of each is written before the study runs, so the study
trains nothing and starts no Ray. Only `write_record` depends on the format of a record.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models

import orchestrator

METRIC = "accuracy"
UNTRAINED = 0.5
"""The score of the untrained model in every record."""


@dataclass(frozen=True)
class Run:
    """The settings on which the score of a run depends."""

    variant: str
    rate: float
    seed: int
    dropout: float
    batch_size: int
    # Not in the text of a run, from which its noise follows.
    rank: int = field(default=8, repr=False)
    alpha: float = field(default=16.0, repr=False)

    def bell(self, optimum: float, top: float, width: float = 0.8) -> float:
        """Return a score that is Gaussian in the logarithm of the rate, with `top` at the rate `optimum`.

        `width` decades from the optimum, its gain over `UNTRAINED` has fallen to 1/e.
        """
        decades = math.log10(self.rate / optimum)
        return UNTRAINED + (top - UNTRAINED) * math.exp(-((decades / width) ** 2))

    def noise(self, deviation: float, of: str = "run") -> float:
        """Return normal noise that the run and the word `of` determine; for "seed", the seed alone."""
        key = f"seed {self.seed}" if of == "seed" else f"{of} {self}"
        return random.Random(key).gauss(0, deviation)


Truth = Callable[[Run], tuple[float, float] | None]
"""Function of a run that returns its validation and its test score, or None if the run diverges."""


def own_data(folder: Path) -> dict[str, Any]:
    """Write labelled texts and a base model that can read them; return the options that name both."""
    kinds = {"red": ("rose", "cherry", "brick"), "green": ("leaf", "grass", "moss")}
    words = sorted(word for kind in kinds.values() for word in kind)
    generator = random.Random(0)
    rows = ["text,label"]
    for _ in range(60):
        label = generator.choice(sorted(kinds))
        text = [
            generator.choice(kinds[label]),
            *generator.choices(words, k=2),
            generator.choice(kinds[label]),
        ]
        rows.append(f"{' '.join(text)},{label}")
    (folder / "own.csv").write_text("\n".join(rows) + "\n")
    tiny_models.llama(folder / "base", ("<pad>", "<eos>", *words))
    return {
        "data": str(folder / "own.csv"),
        "model": str(folder / "base"),
        "device": "cpu",
        "dtype": "float32",
    }


def run_of(configuration: Mapping[str, Any]) -> Run:
    """Return the run of a record's configuration."""
    variant, batches = configuration["variant"], configuration["batches"]
    rate, seed = configuration["optimizer"]["learning_rate"], configuration["seed"]
    shape = variant["rank"], variant["alpha"] or 16.0
    return Run(variant["name"], rate, seed, variant["dropout"], batches["batch_size"], *shape)


def write_record(store: Path, fingerprint: str, configuration: Mapping[str, Any], truth: Truth) -> None:
    """Write the record of a configuration with the scores of a truth."""
    steps = configuration["lr_schedule"]["steps"]
    scores = truth(run_of(configuration))
    evaluations = [
        {
            "step": steps,
            "split": split,
            "scores": {"loss": -math.log(score), METRIC: min(1.0, max(0.0, score))},
        }
        for split, score in zip(("validation", "test"), scores or (), strict=False)
    ]
    record = {
        "schema_version": 1,
        "fingerprint": fingerprint,
        "state": "finished" if scores else "diverged",
        "configuration": configuration,
        "steps": steps,
        "reason": "" if scores else "the training loss is not finite",
        "evaluations": evaluations,
        "baseline_scores": {split: {"loss": 3.0, METRIC: UNTRAINED} for split in ("validation", "test")},
    }
    body = json.dumps(record, separators=(",", ":"))[:-1]
    checksum = hashlib.sha256(body.encode()).hexdigest()
    path = store / "records" / fingerprint[:2] / f"{fingerprint}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{body},"sha256":"{checksum}"}}\n')


def answer(experiment: str, truth: Truth, output: Path, **options: Any) -> None:
    """Write the records of all configurations that a study would train, and run the study.

    The study is planned again until nothing is left to train: a study of factors asks for further
    configurations when it has those of its learning rates.
    """
    study = orchestrator.Study(experiment, output=str(output), **options)
    while True:
        (plan,) = orchestrator.plan(study)
        if not plan.num_to_train:
            break
        assert plan.pending
        for configuration in plan.pending:
            write_record(output / "store", configuration.fingerprint, configuration.to_json(), truth)
    assert orchestrator.run(study).exit_code == 0


def rewrite(output: Path, study: str, truth: Truth) -> Any:
    """Write the records of a study again with the scores of another truth; return its results."""
    fingerprints = set(orchestrator.load(study, output=output).runs["fingerprint"])
    for path in (output / "store" / "records").rglob("*.json"):
        record = json.loads(path.read_text())
        if record["fingerprint"] in fingerprints:
            write_record(output / "store", record["fingerprint"], record["configuration"], truth)
    return orchestrator.load(study, output=output)


# -- the studies

OPTIMA = {"lora": 3e-3, "pissa": 1e-3, "dora": 3e-3, "hira": 3e-2}
RATES = ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]
VARIANTS = list(OPTIMA)
GRID: dict[str, Any] = {"variants": VARIANTS, "learning_rates": RATES, "seeds": 3, "widen": 0}
TUNED: dict[str, Any] = {"variants": VARIANTS, "learning_rates": RATES[2:6], "replicates": 6}
FACTORS: dict[str, Any] = {
    "learning_rates": RATES,
    "seeds": 3,
    "factors": ["dropout", "batch_size"],
    "levels": 1,
    "variants": ["lora", "dora"],
}
TRANSFER: dict[str, Any] = {
    "variants": ["lora", "rslora"],
    "levels": [2, 4, 8, 16],
    "learning_rates": ["3.16e-4:3.16e-2:4"],
    "seeds": 3,
    "widen": 0,
}


def curves(run: Run) -> tuple[float, float] | None:
    """Return the scores of a run in the study `grid`.

    A run collapses above 4 times its variant's optimum, and diverges above 12 times. LoRA's best test score
    is not at its optimum.
    """
    beyond = run.rate / OPTIMA[run.variant]
    if beyond > 12:
        return None
    if beyond > 4:
        return UNTRAINED - 0.02, UNTRAINED - 0.01
    score = run.bell(OPTIMA[run.variant], 0.92 if run.variant == "pissa" else 0.9) + run.noise(0.003)
    misleading = run.variant == "lora" and run.rate == 1e-3
    return score, 0.99 if misleading else score + run.noise(0.003, of="test")


def tuned(tops: Mapping[str, float], noise: float = 0.004, optima: Mapping[str, float] = OPTIMA) -> Truth:
    """Return a truth for the study `tuned`: a variant's best score is that in `tops`, or else 0.9."""

    def truth(run: Run) -> tuple[float, float]:
        score = run.bell(optima[run.variant], tops.get(run.variant, 0.9), width=1.5)
        score += run.noise(noise) + run.noise(noise, of="seed")
        return score + run.noise(noise / 4, of="validation"), score

    return truth


def factors(dropout: float = 0.01, gain: float = 0.45) -> Truth:
    """Return a truth for the study `factors`.

    Args:
        dropout: Score that a run with dropout loses.
        gain: Score that a run at the best learning rate gains over the untrained model.
    """

    def truth(run: Run) -> tuple[float, float]:
        score = (
            run.bell(OPTIMA[run.variant], UNTRAINED + gain) - dropout * (run.dropout > 0) + run.noise(0.002)
        )
        return score, score

    return truth


def transfer(slope: float | None = None, optimum: float = 4e-3) -> Truth:
    """Return a truth for the study `transfer`, in which the best rate is a power of the rank.

    Args:
        slope: The power; None for those of muA (arXiv 2602.06204): the best rate is proportional to
            1 / sqrt(rank x multiplier), and the multiplier is alpha/rank, or alpha/sqrt(rank) for rsLoRA.
        optimum: The best rate at rank 8 and alpha 16.
    """

    def truth(run: Run) -> tuple[float, float]:
        relative = run.alpha / 16 * (math.sqrt(run.rank / 8) if run.variant == "rslora" else 1.0)
        moved = relative**-0.5 if slope is None else (run.rank / 8) ** slope
        shift = run.noise(0.02, of="seed") + random.Random(f"{run.seed} {run.rank}").gauss(0, 0.02)
        score = run.bell(optimum * moved * 10**shift, 0.9, width=0.6)
        return score + run.noise(0.001), score + run.noise(0.001, of="test")

    return truth


STUDIES: dict[str, tuple[str, Truth, dict[str, Any]]] = {
    "grid": ("study", curves, GRID),
    "tuned": ("tuned", tuned({"pissa": 0.95}), TUNED),
    "factors": ("sensitivity", factors(), FACTORS),
    "transfer": ("transfer", transfer(), TRANSFER),
}
"""Name of a study -> its subcommand, its truth and its options."""


def make(folder: Path, name: str) -> None:
    """Create a study of `STUDIES` in `folder/results`."""
    experiment, truth, options = STUDIES[name]
    answer(experiment, truth, folder / "results", **own_data(folder), **options, steps=8, study=name)
