"""The fine-tuning loop with a workshop that trains nothing: steps and scores come from a course.

A seat whose plan says `loop="rehearsal:run"` is the real one in all else: lanes are leased, evaluated,
parked, spilled, stopped, checkpointed and recorded by the loop's own code. What it rehearses stands in
`rehearsal.json` in the store's folder, see `Plan`. The other scripts in this folder use it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.finetune.engine import loop
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.engine import Workshop
from orchestrator.finetune.engine.lane import Lane, Taken
from orchestrator.finetune.engine.lane_source import Source
from orchestrator.finetune.engine.lane_state import due_steps
from orchestrator.finetune.evaluation.evaluate import Scored
from orchestrator.record.schema import Items, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue

if TYPE_CHECKING:
    from orchestrator.execution.ray.runtime import Cluster

FILE = "rehearsal.json"
SPLITS = ("validation", "test")
UNTRAINED = 2.5  # nats a token, of the synthetic base


@dataclass(frozen=True)
class Plan:
    """`store`: the folder of records whose curves are replayed; empty: synthetic curves. `evaluations`: how
    often those were evaluated, if it is not as often as the rehearsed lanes are. `guess`: where a lane is
    evaluated and the stored one was not, its validation loss is the mean training loss of so many steps
    before (0: that is an error). `seconds_per_step`: what a step of a pack takes."""

    store: str = ""
    evaluations: int | None = None
    guess: int = 0
    seconds_per_step: float = 0.0

    def write(self, store: Store) -> None:
        (store.root / FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, store: Any) -> Plan:
        return cls(**json.loads((store.root / FILE).read_text()))

    def source(self, configuration: Configuration) -> Configuration:
        """The one whose record is replayed for `configuration`."""
        return replace(configuration, evaluations=self.evaluations or configuration.evaluations)


@dataclass(frozen=True)
class Course:
    """What happens to one configuration: `losses` of training, one a step, with the gradient norms; `scores`
    by (step, split)."""

    losses: Sequence[float]
    norms: Sequence[float]
    scores: Mapping[tuple[int, str], Mapping[str, float]]
    untrained: Mapping[str, Mapping[str, float]]
    tokens: int = 0
    items: Mapping[str, Items] = field(default_factory=dict)


def stored(record: Record) -> Course:
    """The course that a record tells."""
    return Course(
        losses=[step.loss for step in record.curve],
        norms=[step.gradient_norm for step in record.curve],
        scores={(e.step, e.split): e.scores for e in record.evaluations},
        untrained=record.untrained,
        tokens=record.cost.tokens // max(1, len(record.curve)),
        items=record.items,
    )


def guessed(course: Course, configuration: Configuration, steps: int) -> Course:
    """With a validation loss, see `Plan`, after each step at which `configuration` is evaluated. Such an
    evaluation has no score: the task's floor stands for it."""
    due = due_steps(configuration.schedule.steps, configuration.evaluations)
    scores = dict(course.scores)
    for step in due:
        if step <= len(course.losses):
            loss = statistics.fmean(course.losses[max(0, step - steps) : step])
            told = {"loss": loss, configuration.task.metric: configuration.task.floor}
            scores.setdefault((step, "validation"), told)
    return replace(course, scores=scores)


def synthetic(configuration: Configuration) -> Course:
    """Smooth in the logarithm of the rate, with a best rate for each variant, noise for each seed, and a
    cliff, above which the loss grows from step to step."""
    best = -2.5 + int(hashlib.sha256(configuration.variant.name.encode()).hexdigest()[:4], 16) / 2**16
    away = math.log10(configuration.optimizer.learning_rate) - best
    gain = math.exp(-(away**2) / 0.5)
    steps, noise = configuration.schedule.steps, random.Random(configuration.fingerprint)

    def loss(step: int) -> float:
        if away > 1.0:
            return UNTRAINED * (1.0 + step)
        way = 1.0 - math.exp(-4.0 * step / steps)
        return UNTRAINED * (1.0 - 0.95 * gain * way) * math.exp(noise.gauss(0.0, 0.02))

    def scores(loss: float) -> dict[str, float]:
        return {"loss": loss, configuration.task.metric: max(0.0, 1.0 - loss / UNTRAINED)}

    due = due_steps(steps, configuration.evaluations)
    return Course(
        losses=[loss(step) for step in range(steps)],
        norms=[2.0] * steps,
        scores={(step, split): scores(loss(step)) for step in due for split in SPLITS},
        untrained=dict.fromkeys(SPLITS, scores(UNTRAINED)),
    )


class _Adapters:
    """In the place of a variant's: one number a lane, which never moves: its gradient is nil."""

    most_lanes = 10_000

    def __init__(self, variant: Any) -> None:
        self.variant = variant
        self.lanes: dict[str, dict[str, torch.nn.Parameter]] = {}

    def add(self, lane: str, *rest: Any) -> None:
        self.lanes[lane] = {"layer.number": torch.nn.Parameter(torch.zeros(1))}

    def load(self, lane: str, trainable: Mapping[str, torch.Tensor], *rest: Any) -> None:
        self.lanes[lane] = {name: torch.nn.Parameter(value) for name, value in trainable.items()}

    def trainable(self, lane: str) -> dict[str, torch.nn.Parameter]:
        return self.lanes[lane]

    def frozen(self, lane: str) -> dict[str, torch.Tensor]:
        return {}

    def parameter_count(self, lane: str) -> int:
        return 1

    def is_head(self, name: str) -> bool:
        return False

    def owner(self, name: str) -> None:
        return None

    def before_step(self, *lane: Any) -> None:
        pass

    after_step = before_step

    def remove(self, lane: str) -> None:
        del self.lanes[lane]

    def detach(self) -> None:
        self.lanes.clear()


class _Pack:
    """In the place of the arithmetic."""

    def __init__(self, adapters: _Adapters, untrained: Any, seconds: float) -> None:
        self.adapters, self.seconds = adapters, seconds
        self.data = SimpleNamespace(untrained=untrained)
        self.courses: dict[str, Course] = {}

    def backward(self, lanes: Sequence[Lane]) -> Sequence[Lane]:
        time.sleep(self.seconds)
        for lane in lanes:
            for parameter in lane.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        return lanes

    def reduce(self, lanes: Sequence[Lane]) -> list[Taken]:
        courses = [(self.courses[lane.name], lane.step) for lane in lanes]
        return [Taken(one.losses[step], one.norms[step], one.tokens) for one, step in courses]

    def scores(self, lanes: Sequence[Lane], split: str) -> list[Scored]:
        courses = [(self.courses[lane.name], lane.step) for lane in lanes]
        return [Scored(one.scores[step, split], one.items.get(split, Items())) for one, step in courses]


class Stage(Workshop):
    """A workshop whose packs follow courses."""

    device = "rehearsal"

    def __init__(self, plan: Plan, *of_a_workshop: Any) -> None:
        super().__init__(*of_a_workshop)
        self.plan = plan
        self.records = Store(plan.store, create=False) if plan.store else None

    def course(self, lane: Configuration) -> Course:
        if self.records is None:
            return synthetic(lane)
        source = self.plan.source(lane)
        record = self.records.meets(source.fingerprint)
        if record is None:
            raise LookupError(f"no whole curve of {source.fingerprint[:12]} in {self.plan.store} to replay")
        course, guess = stored(record), self.plan.guess
        return guessed(course, lane, guess) if guess else course

    def open(self, lane: Lane, saved: Checkpoint | None) -> None:
        course, shape = self.course(lane.configuration), lane.configuration.shape
        pack: Any = self._pack
        if pack is None or shape != self._shape:
            self.close()
            self.variant = catalogue.get(lane.configuration.variant.name)
            pack = _Pack(_Adapters(self.variant), course.untrained, self.plan.seconds_per_step)
            self._pack, self._shape = pack, shape
        pack.courses[lane.name] = course
        lane.open(pack.adapters, course.untrained["validation"]["loss"], saved)

    def remove(self, lane: str) -> None:
        super().remove(lane)
        pack: Any = self._pack
        if pack is not None:
            pack.courses.pop(lane, None)


class Counted:
    """A source whose calls are counted and timed."""

    def __init__(self, source: Any) -> None:
        self.source, self.calls, self.seconds = source, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.source, name)

        def timed(*arguments: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*arguments)
            finally:
                self.calls += 1
                self.seconds += time.monotonic() - began

        return timed

    def write(self, store: Any) -> None:
        """One file a seat, beside the plan."""
        file = store.root / f"calls-{uuid.uuid4().hex}.json"
        file.write_text(json.dumps({"calls": self.calls, "seconds": self.seconds}) + "\n")


def run(source: Source | None, store: Any, load_bench: Callable[..., Any], **options: Any) -> None:
    """As `orchestrator.finetune.engine.loop.run`, which it calls. Raises OSError when the store holds no
    plan, and BadInput when there is no store to replay from."""
    counted = Counted(source) if source is not None else None
    try:
        loop.run(counted, store, load_bench, workshop=partial(Stage, Plan.read(store)), **options)
    finally:
        if counted is not None:
            counted.write(store)


def play(
    points: Sequence[Configuration],
    scheduler: str,
    cluster: Cluster,
    seats: int,
    lanes: int,
    store: Store,
    plan: Plan,
    gpus: float = 0.0,
) -> int:
    """Trains `points`, by rehearsal, as a study does: Tune, broker and seats on the Ray that is connected,
    records in `store`. Returns the optimizer steps that the seats have counted. Raises Trouble when no seat
    can be had."""
    from rich.console import Console

    from orchestrator.execution.progress import Progress
    from orchestrator.execution.run_budget import Limits
    from orchestrator.execution.session import Room, train
    from orchestrator.execution.trainers.trainer import SeatPlan
    from orchestrator.execution.tune.rungs import entry
    from orchestrator.study.grid import order_of_entry

    plan.write(store)
    scratch = store.root / "scratch"
    scratch.mkdir(exist_ok=True)
    _wait_for_the_last_broker_to_go()
    seat = SeatPlan(
        lanes=lanes,
        gpus=gpus,
        store=str(store.root),
        scratch=str(scratch),
        device="cpu",
        loop=f"{__name__}:{run.__name__}",
    )
    console = Console(file=sys.stderr, highlight=False)
    with Progress(store.root, len(points), 0, console) as progress:
        return train(
            entry(scheduler, [], order_of_entry(points, lanes), lanes),
            (),
            scheduler,
            cluster,
            Room(seats, seat),
            store,
            scratch,
            progress,
            lambda record: None,
            Limits(),
        )


def _wait_for_the_last_broker_to_go() -> None:
    import ray

    from orchestrator.execution.broker.actor import NAME

    while True:
        try:
            ray.get_actor(NAME)
        except ValueError:
            return
        time.sleep(0.2)
