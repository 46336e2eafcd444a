"""A real tiny model, real tasks, and a source that a test writes down in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.finetune import loop
from orchestrator.finetune.models import Bench
from orchestrator.finetune.source import Answer, Lease, Offer, Report
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.letters import WORDS, tokenizer
from orchestrator.record.schema import Provenance, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import (
    Batches,
    Configuration,
    ModelChoice,
    Optimizer,
    Schedule,
    TaskChoice,
    VariantChoice,
)

WORDS_TASK = str(Path(__file__).with_name("words_task.py"))


def tiny_bench(choice: ModelChoice) -> Bench:
    """Llama, hidden 32, 2 layers, the letters' 25 words; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=WORDS.index("<eos>"),
                pad_token_id=WORDS.index("<pad>"),
            )
        )
    model = model.eval().requires_grad_(False).to(getattr(torch, choice.dtype))
    return Bench(model, tokenizer(), torch.device("cpu"))


def configuration(
    *,
    seed: int = 0,
    rate: float = 1e-2,
    steps: int = 8,
    evaluations: int = 2,
    batch_size: int = 8,
    accumulation: int = 1,
    task: str = "letters",
    dtype: Any = "float32",
    variant: str = "lora",
    rank: int = 4,
    alpha: float | None = 8.0,
    dropout: float = 0.0,
    max_length: int | None = None,
    train_size: int = 64,
) -> Configuration:
    return Configuration(
        VariantChoice(variant, rank=rank, alpha=alpha, dropout=dropout),
        _choice(task, train_size),
        ModelChoice("tiny", "0" * 64, dtype),
        Optimizer(rate, weight_decay=0.01),
        Schedule(steps),
        Batches(batch_size, accumulation, max_length or catalogue.get(task).defaults.max_length),
        evaluations=evaluations,
        seed=seed,
    )


@cache
def _choice(task: str, train_size: int) -> TaskChoice:
    return catalogue.get(task).choice(train_size=train_size, validation_size=16, test_size=16)


@dataclass
class Script:
    """A source in one process. `start_at`: a lane is leased when the first lane has that many steps.

    `answers(report)` says what a report is answered, GO unless told otherwise; a parked lane is told GO at
    the next exchange. Everything that the loop says is kept.
    """

    leases: list[Lease]
    start_at: Mapping[str, int] = field(default_factory=dict)
    answers: Callable[[Report], Answer] = lambda report: Answer.GO
    changes: Callable[[Mapping[str, int]], Mapping[str, Answer]] = lambda steps: {}
    reports: list[Report] = field(default_factory=list)
    ended: list[tuple[str, int, str]] = field(default_factory=list)
    held: list[Mapping[str, int]] = field(default_factory=list)
    parked: set[str] = field(default_factory=set)
    steps: Mapping[str, int] = field(default_factory=dict)

    def lease(self, shape: str | None, room: int) -> Offer:
        furthest = max(self.steps.values(), default=0)
        given = []
        for lease in list(self.leases):
            ready = furthest >= self.start_at.get(lease.configuration.fingerprint, 0)
            if (
                ready
                and len(given) < room
                and lease.configuration.shape == (shape or lease.configuration.shape)
            ):
                shape = lease.configuration.shape
                given.append(lease)
                self.leases.remove(lease)
        return Offer(tuple(given), closed=not self.leases)

    def report(self, report: Report) -> Answer:
        self.reports.append(report)
        answer = self.answers(report)
        if answer is Answer.PARK:
            self.parked.add(report.fingerprint)
        return answer

    def exchange(self, steps: Mapping[str, int]) -> Mapping[str, Answer]:
        self.steps = dict(steps)
        self.held.append(self.steps)
        told = {f: Answer.GO for f in self.parked if f in steps}
        self.parked.clear()
        return {**told, **self.changes(steps)}

    def done(self, fingerprint: str, attempt: int, state: str) -> None:
        self.ended.append((fingerprint, attempt, state))


def leases(configurations: Iterable[Configuration], attempt: int = 1) -> list[Lease]:
    return [Lease(c, attempt) for c in configurations]


def provenance(device: str, **rest: Any) -> Provenance:
    return Provenance(commit="test", device=device, **rest)


def train(source: Any, store: Store, lanes: int = 8, **options: Any) -> None:
    options = {"idle_seconds": 5.0, "poll_seconds": 0.0, "load_bench": tiny_bench, **options}
    loop.run(source, store, lanes=lanes, provenance=provenance, **options)


def solo(one: Configuration, folder: Path, **options: Any) -> Record:
    """The record of a configuration that trained alone."""
    store = Store(folder / f"solo-{one.fingerprint[:12]}")
    if store.get(one.fingerprint) is None:
        train(Script(leases([one])), store, lanes=1, **options)
    record = store.get(one.fingerprint)
    assert record is not None
    return record


def numbers_of(record: Record) -> Record:
    """Without what may differ between two runs of one configuration: seconds, provenance."""
    cost = replace(record.cost, train_seconds=0.0, evaluate_seconds=0.0)
    return replace(record, cost=cost, provenance=Provenance())
