"""Studies whose truth is known: each record is written as a trainer leaves it, with scores from a formula.

The plan names the configurations of a study, and its command finds a record of each and trains nothing, so
that neither Ray nor a model's training takes part. Only `write_record` depends on the form of a record.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orchestrator

METRIC = "accuracy"
UNTRAINED = 0.5
"""The score of the untrained model in every record."""


@dataclass(frozen=True)
class Run:
    """What the score of a run depends on."""

    variant: str
    rate: float
    seed: int
    dropout: float
    batch_size: int

    def bell(self, optimum: float, top: float, width: float = 0.8) -> float:
        """Return `top` at the rate `optimum`, of whose gain 1/e is left `width` decades away."""
        decades = math.log10(self.rate / optimum)
        return UNTRAINED + (top - UNTRAINED) * math.exp(-((decades / width) ** 2))

    def noise(self, deviation: float, of: str = "run") -> float:
        """Return normal noise, the same each time; that of a "seed" is shared by all its runs."""
        key = f"seed {self.seed}" if of == "seed" else f"{of} {self}"
        return random.Random(key).gauss(0, deviation)


Truth = Callable[[Run], tuple[float, float] | None]
"""The scores of a run on the validation and the test split; None if it diverges."""


def own_data(folder: Path) -> dict[str, Any]:
    """Write labelled texts and a base model that can read them; return the options that name both."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

    split = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", *words])}, "<pad>"))
    split.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<eos>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {
        "data": str(folder / "own.csv"),
        "model": str(folder / "base"),
        "device": "cpu",
        "dtype": "float32",
    }


def run_of(configuration: Mapping[str, Any]) -> Run:
    """Return the run of a configuration, as it is in the record."""
    variant, batches = configuration["variant"], configuration["batches"]
    rate, seed = configuration["optimizer"]["learning_rate"], configuration["seed"]
    return Run(variant["name"], rate, seed, variant["dropout"], batches["batch_size"])


def write_record(store: Path, fingerprint: str, configuration: Mapping[str, Any], truth: Truth) -> None:
    """Write the record of a configuration with the scores that it has in truth."""
    steps = configuration["lr_schedule"]["steps"]
    scores = truth(run_of(configuration))
    evaluations = [
        {"step": steps, "split": split, "scores": {"loss": 1.0, METRIC: min(1.0, max(0.0, score))}}
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
    """Write what a study would train, and run it.

    A study of factors asks for its arms when its curve is there, so a plan may follow a plan.
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
    """Give the runs of a study other scores, and return its results as `orchestrator.load` does."""
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


def curves(run: Run) -> tuple[float, float] | None:
    """The truth of `grid`: a cliff above each optimum; LoRA's test scores recommend another rate."""
    beyond = run.rate / OPTIMA[run.variant]
    if beyond > 12:
        return None
    if beyond > 4:
        return UNTRAINED - 0.02, UNTRAINED - 0.01
    score = run.bell(OPTIMA[run.variant], 0.92 if run.variant == "pissa" else 0.9) + run.noise(0.003)
    misleading = run.variant == "lora" and run.rate == 1e-3
    return score, 0.99 if misleading else score + run.noise(0.003, of="test")


def tuned(tops: Mapping[str, float], noise: float = 0.004, optima: Mapping[str, float] = OPTIMA) -> Truth:
    """Return the truth of tunings: each variant's best score, 0.9 unless `tops` says otherwise."""

    def truth(run: Run) -> tuple[float, float]:
        score = run.bell(optima[run.variant], tops.get(run.variant, 0.9), width=1.5)
        score += run.noise(noise) + run.noise(noise, of="seed")
        return score + run.noise(noise / 4, of="validation"), score

    return truth


def factors(dropout: float = 0.01, gain: float = 0.45) -> Truth:
    """Return the truth of a study of factors: what dropout costs, and what a good learning rate gains."""

    def truth(run: Run) -> tuple[float, float]:
        score = (
            run.bell(OPTIMA[run.variant], UNTRAINED + gain) - dropout * (run.dropout > 0) + run.noise(0.002)
        )
        return score, score

    return truth


STUDIES: dict[str, tuple[str, Truth, dict[str, Any]]] = {
    "grid": ("study", curves, GRID),
    "tuned": ("tuned", tuned({"pissa": 0.95}), TUNED),
    "factors": ("sensitivity", factors(), FACTORS),
}
"""Name of each study -> the question, the truth, and the options."""


def make(folder: Path, name: str) -> None:
    """Answer the question of a study in `folder/results`."""
    experiment, truth, options = STUDIES[name]
    answer(experiment, truth, folder / "results", **own_data(folder), **options, steps=8, study=name)
