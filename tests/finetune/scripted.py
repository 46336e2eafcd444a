"""A tiny model, real tasks, and a lane source whose leases and directives a test defines in advance."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_checkpoints import is_at_evaluation, save_promptly
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from orchestrator.finetune.engine import engine, loop
from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.finetune.engine.leasing import LaneSlots
from orchestrator.finetune.engine.tensor_files import find_newest, read_checkpoint
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks import catalogue, reviews
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.letters import VOCABULARY, tokenizer
from orchestrator.record.schema import TIME_FIELDS, Provenance, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
)
from orchestrator.util import timeouts
from variants import catalogue as variants

WORDS_TASK = str(Path(__file__).with_name("words_task.py"))

POISONED = '''
from orchestrator.finetune.tasks import letters
from orchestrator.finetune.tasks.base import EncodedExample, Example, Task


class Poisoned(Task):
    """Training example 5 has a token id that the model has no embedding for."""

    title, floor, default_model = "poisoned", 0.0, "letters-base"
    output, max_new_tokens, defaults = "teacher_forced", 6, letters.Letters.defaults
    examples = letters.Letters.examples

    def encode(self, example: Example, tokenizer: object) -> EncodedExample:
        encoded = super().encode(example, tokenizer)
        if example == self.examples("train", 6)[5]:
            return EncodedExample((999, *encoded.ids[1:]), encoded.labels, encoded.prompt_length)
        return encoded
'''


def tiny_base_model(choice: ModelChoice, task: Task | None = None) -> BaseModel:
    """Return a model with hidden size 32, two layers and always the same weights.

    For a task with a head it is a BERT with the vocabulary of `reviews`, else a Llama with the vocabulary
    of `letters`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _llama() if task is None or not task.has_head else _bert(task)
    model = model.eval().requires_grad_(False).to(getattr(torch, choice.compute_dtype))
    if task is None or not task.has_head:
        return BaseModel(model, tokenizer(), torch.device("cpu"))
    heads = ("classifier",)
    torch.nn.init.zeros_(model.classifier.weight)
    return BaseModel(model, reviews.tokenizer(), torch.device("cpu"), heads)


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=VOCABULARY.index("<eos>"),
            pad_token_id=VOCABULARY.index("<pad>"),
        )
    )


def _bert(task: Task) -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(reviews.VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
            num_labels=task.num_labels,
        )
    )


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
        VariantChoice(
            variant, rank=rank, alpha=alpha, dropout=dropout, numerics=variants.get(variant).numerics
        ),
        _choice(task, train_size),
        ModelChoice("tiny", "0" * 64, dtype),
        OptimizerConfig(rate, weight_decay=0.01),
        LRSchedule(steps),
        BatchConfig(batch_size, accumulation, max_length or catalogue.get(task).defaults.max_length),
        evaluations=evaluations,
        seed=seed,
    )


@cache
def _choice(task: str, train_size: int) -> TaskChoice:
    return replace(catalogue.get(task).choice(), train_size=train_size, validation_size=16, test_size=16)


@dataclass
class Script:
    """A lane source in one process, which keeps everything that the loop sends."""

    leases: list[Lease]
    start_at: Mapping[str, int] = field(default_factory=dict)
    """Fingerprint -> the step that some lane must have reached before this lane is leased."""
    answers: Callable[[Report], Directive] = lambda report: Directive.CONTINUE
    """The function that returns the directive for a report. A parked lane continues at the next exchange."""
    changes: Callable[[Mapping[str, int]], Mapping[str, Directive]] = lambda steps: {}
    """The function that returns the directives of an exchange for the steps of all lanes."""
    reports: list[Report] = field(default_factory=list)
    ended: list[tuple[str, int, str]] = field(default_factory=list)
    """(fingerprint, attempt, state) of each lane that has ended."""
    held: list[Mapping[str, int]] = field(default_factory=list)
    """The values of `steps` at all exchanges."""
    parked: set[str] = field(default_factory=set)
    steps: Mapping[str, int] = field(default_factory=dict)
    """Fingerprint -> step of each lane of the trainer at the last exchange."""
    spilled: list[tuple[str, int]] = field(default_factory=list)
    """(fingerprint, attempt) of each lease that was returned."""
    said: list[str] = field(default_factory=list)
    """The lines of `notify`."""
    taken: int = 0
    """The optimizer steps that the loop has counted."""
    progress: int = 0
    """The number of times that the loop has noted progress."""
    lanes: dict[str, Lane] = field(default_factory=dict)
    """Fingerprint -> the lane that was made last for it; `train` fills this."""

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        self.taken = steps_taken
        furthest = max(self.steps.values(), default=0)
        given = []
        for lease in list(self.leases):
            ready = furthest >= self.start_at.get(lease.configuration.fingerprint, 0)
            if (
                ready
                and len(given) < capacity
                and lease.configuration.group_key == (group_key or lease.configuration.group_key)
            ):
                group_key = lease.configuration.group_key
                given.append(lease)
                self.leases.remove(lease)
        return LeaseGrant(tuple(given), closed=not self.leases)

    def report(self, report: Report) -> Directive:
        self.reports.append(report)
        answer = self.answers(report)
        if answer is Directive.PARK:
            self.parked.add(report.fingerprint)
        return answer

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        self.taken = steps_taken
        self.steps = steps = {
            name: lane.step for name, lane in self.lanes.items() if lane.state is not LaneState.ENDED
        }
        self.held.append(self.steps)
        resumed = {f: Directive.CONTINUE for f in self.parked if f in steps}
        self.parked.clear()
        return {**resumed, **self.changes(steps)}

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        self.spilled.append((fingerprint, attempt))

    def notify(self, line: str) -> None:
        self.said.append(line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Do nothing: the lanes are those of the list."""

    def note_progress(self) -> None:
        self.progress += 1

    def end_lease(self, fingerprint: str, attempt: int, state: str) -> None:
        self.ended.append((fingerprint, attempt, state))


@dataclass
class Queue(Script):
    """A lane source that parks every lane at each report but its last, for `park_exchanges` exchanges.

    A lane whose lease is returned waits for as many exchanges, and then behind all waiting lanes. A report
    that the lane repeats after that does not park it.
    """

    park_exchanges: int = 2
    most: int = 0
    """The largest number of lanes that the trainer had at an exchange."""
    since: dict[str, int] = field(default_factory=dict)
    """Fingerprint -> number of exchanges when the lane was last parked."""
    away: dict[str, int] = field(default_factory=dict)
    """Fingerprint -> number of exchanges when the lane's lease was returned."""
    attempt: Counter[str] = field(default_factory=Counter)
    """Fingerprint -> number of leases after the first."""

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        for name in [
            name for name, since in self.away.items() if len(self.held) >= since + self.park_exchanges
        ]:
            del self.away[name]
            self.attempt[name] += 1
            self.leases.append(Lease(self.lanes[name].configuration, 1 + self.attempt[name]))
        offer = super().lease(group_key, capacity, steps_taken)
        return replace(offer, closed=offer.closed and not self.away)

    def report(self, report: Report) -> Directive:
        first = report.step > max(
            (r.step for r in self.reports if r.fingerprint == report.fingerprint), default=0
        )
        super().report(report)
        if not first or report.step == self.lanes[report.fingerprint].evaluation_steps[-1]:
            return Directive.CONTINUE
        self.since[report.fingerprint] = len(self.held)
        return Directive.PARK

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        super().exchange(steps_taken)
        self.most = max(self.most, len(self.steps))
        return {
            name: Directive.CONTINUE
            for name, since in self.since.items()
            if name in self.steps and len(self.held) >= since + self.park_exchanges
        }

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        super().return_lease(fingerprint, attempt)
        assert attempt == 1 + self.attempt[fingerprint]
        self.away[fingerprint] = len(self.held)


class SimulatedCrashError(Exception):
    """An error with which a test ends the loop as if its process had died."""


def crash_at(step: int, points: Sequence[Configuration], store: Store, **options: Any) -> None:
    """Train lanes until a simulated crash at a report of this step; their checkpoints stay."""

    def answer(report: Report) -> Directive:
        if report.step == step:
            raise SimulatedCrashError
        return Directive.CONTINUE

    with pytest.raises(SimulatedCrashError):
        train(Script(leases(points), answers=answer), store, **options)


def leases(configurations: Iterable[Configuration], attempt: int = 1) -> list[Lease]:
    return [Lease(c, attempt) for c in configurations]


@cache
def tiny_data() -> Path:
    """Return a folder of prepared data that the stores of the tiny model share."""
    return Path(tempfile.mkdtemp(prefix="data-"))


def train(
    source: Any,
    store: Store,
    lanes: int = 8,
    *,
    data: Path | None = None,
    save_when: Callable[[Lane], bool] = is_at_evaluation,
    **options: Any,
) -> None:
    """Run the loop with `lanes` lanes at most.

    Args:
        source: A `Script`, or another lane source with a dictionary `lanes`.
        store: The store.
        lanes: The largest number of lanes at once.
        data: A folder of prepared data that stores of the same model share.
        save_when: Returns whether a lane is saved before its next step; the lane waits for the write. With
            `max_checkpoint_seconds` in `options`, lanes are saved as in a study instead.
        options: `is_automatic` of the slots, time limits of `timeouts` in lower case, and arguments of
            `loop.run`.
    """
    if data is not None:
        store.data = data
    elif "load_base_model" not in options and not store.data.exists():
        store.data = tiny_data()
    slots = LaneSlots(lanes, options.pop("is_automatic", False))
    seconds = {"idle_trainer_seconds": 5.0, "source_poll_seconds": 0.0}
    seconds |= {name: options.pop(name) for name in list(options) if name.endswith("_seconds")}

    class Seen(Lane):
        """A lane that registers itself with the lane source."""

        def __init__(self, lease: Lease) -> None:
            super().__init__(lease)
            source.lanes[self.fingerprint] = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Lane", Seen)
        patch.setattr(engine, "Lane", Seen)
        for name, value in seconds.items():
            patch.setattr(timeouts, name.upper(), value)
        if "max_checkpoint_seconds" not in seconds:
            save_promptly(patch.setattr, save_when)
        loop.run(
            source,
            store,
            options.pop("load_base_model", tiny_base_model),
            slots,
            **options,
        )


def saved_step(checkpoints: Path, one: Configuration) -> int:
    """Return the step of the newest checkpoint of a configuration; 0 if there is none."""
    path = find_newest(checkpoints / one.fingerprint, print)
    return 0 if path is None else read_checkpoint(path).step


def get_record(store: Store, one: Configuration) -> Record:
    """Return the record of a configuration, which must be in the store."""
    record = store.get(one.fingerprint)
    assert record is not None
    return record


ALONE: dict[str, Record] = {}
"""Fingerprint -> record of `solo`. Tests share it, because a configuration always gives the same results."""


def solo(one: Configuration, folder: Path, **options: Any) -> Record:
    """Return the record of a configuration that trained alone. Tests share records without `options`."""
    if not options and one.fingerprint in ALONE:
        return ALONE[one.fingerprint]
    store = Store(folder / f"solo-{one.fingerprint[:12]}")
    if store.get(one.fingerprint) is None:
        train(Script(leases([one])), store, lanes=1, **options)
    record = get_record(store, one)
    return record if options else ALONE.setdefault(one.fingerprint, record)


def numbers_of(record: Record) -> Record:
    """Return the record without what differs between two runs: seconds, peak memory and provenance."""
    cost = replace(record.cost, peak_memory=0, **dict.fromkeys(TIME_FIELDS, 0.0))
    return replace(record, cost=cost, provenance=Provenance())
