"""How much memory lanes take: measured in a process that loads the base and takes steps with the longest
examples of the task. The arithmetic is the seat's own; nothing is kept."""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.cluster.preflight.memory_meter import Meter
from orchestrator.cluster.preflight.memory_result import Measured
from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.data.batches import longest, rows_of
from orchestrator.finetune.engine.calibration import evidence
from orchestrator.finetune.engine.lane import Lane, settings_of
from orchestrator.finetune.engine.lane_group import Data, Pack
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.evaluation.evaluate import Split
from orchestrator.finetune.failures import Fault, fault_of, free_memory
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import ALONE
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Example
from orchestrator.study.configuration import Configuration
from variants import catalogue as variants
from variants.attach import attach

STEPS = 2  # the second has the optimizer's state beside all that a step needs
SCORED = 64  # examples: a batch of an evaluation has no more
RATE = 1e-4


def probe(
    configurations: Sequence[Configuration],
    bench: Bench,
    lanes: int,
    meter: Meter,
    limit: int,
    data: Path | None = None,
) -> list[Measured]:
    """Of each configuration's variant. `data`: where examples are that a study has prepared, if it has.
    Raises what a study's worker would, but for want of memory."""
    task, first = tasks.get(configurations[0].task.name), configurations[0]
    length = first.batches.max_length
    with tempfile.TemporaryDirectory() as folder:
        there = data is not None and dataset_cache.has_examples(data, first.task, task)
        examples = dataset_cache.examples(data if data and there else Path(folder), first.task, task)
        rows = heapq.nlargest(
            first.batches.batch_size * first.batches.accumulation,
            rows_of(examples["train"], task, bench.processor, length),
            key=lambda row: len(row.ids),
        )
        longest_items = _longest(examples["validation"])
        split = Split.of(longest_items, task, bench.processor, longest(task, length))
        longest_ones = Data(task, rows, {"validation": split}, {})
        base = meter.now()
        return [
            _measure(c, bench, longest_ones, Path(folder), lanes, meter, limit, base) for c in configurations
        ]


def _longest(examples: Sequence[Example]) -> Sequence[Example]:
    return heapq.nlargest(SCORED, examples, key=lambda e: len(e.prompt) + len(e.pair or "") + len(e.answer))


def _measure(
    configuration: Configuration,
    bench: Bench,
    data: Data,
    folder: Path,
    lanes: int,
    meter: Meter,
    limit: int,
    base: int,
) -> Measured:
    choice = configuration.variant
    adapters = attach(
        bench.model,
        variants.get(choice.name),
        settings_of(configuration),
        choice.targets,
        heads=bench.heads,
    )
    place = f"{meter.name}, {os.uname().nodename}"
    found = Measured(choice.name, place, min(lanes, adapters.most_lanes), limit, base, ())
    pack = Pack(bench, adapters, data, ALONE)
    taken: list[Lane] = []

    def turn(count: int) -> None:
        while len(taken) < count:
            taken.append(_open(pack, configuration, len(taken), folder))
        for _ in range(STEPS):
            told = pack.reduce(pack.backward(taken))
            for lane, one in zip(taken, told, strict=True):
                lane.take_step(one)
        pack.scores(taken, "validation", always=True)

    try:
        for count in _counts(found.asked):
            # On a CPU too much would end this process, or another: it is not tried, but reckoned.
            few = count
            if not meter.may_fail and found.peaks and found.needs(count) > limit:
                few = min(count, 2)
            meter.start()
            if not _enough(turn, few):
                found = replace(found, short=few)
                break
            found = replace(found, peaks=(*found.peaks, (few, meter.peak())))
    finally:
        adapters.detach()
        free_memory()
    return found


def _counts(asked: int) -> Iterator[int]:
    yield 1
    if asked > 1:
        yield asked


def _open(pack: Pack, configuration: Configuration, seed: int, folder: Path) -> Lane:
    """A lane that will never see its end."""
    own = replace(
        configuration,
        seed=seed,
        optimizer=replace(configuration.optimizer, learning_rate=RATE),
        schedule=replace(configuration.schedule, steps=max(1000, configuration.schedule.steps)),
        evaluations=1,
    )
    lane = Lane(Lease(own, 1))
    lane.open(pack.adapters, 1.0, None, evidence(pack, own, folder, ALONE))
    return lane


def _enough(work: Callable[[int], None], lanes: int) -> bool:
    """False where it finds too little memory. What it had is let go then: out of the handler, since the
    error's traceback holds it."""
    try:
        work(lanes)
    except Exception as error:
        if fault_of(error) is not Fault.MEMORY:
            raise
    else:
        return True
    free_memory()
    return False


def part_of_a_worker(configuration: Configuration, workers: int) -> Configuration:
    """With the rows that one of a seat's workers computes."""
    batches = configuration.batches
    return replace(configuration, batches=replace(batches, batch_size=-(-batches.batch_size // workers)))
