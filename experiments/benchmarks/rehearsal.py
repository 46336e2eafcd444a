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
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.engine.lane_source import LaneSource
from orchestrator.finetune.engine.lane_state import evaluation_steps
from orchestrator.finetune.evaluation.evaluate import EvaluationResult
from orchestrator.record.schema import ItemResults, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue

if TYPE_CHECKING:
    from orchestrator.execution.ray.runtime import Cluster

PLAN_FILE = "rehearsal.json"
SPLITS = ("validation", "test")
UNTRAINED_LOSS = 2.5  # nats a token, of the synthetic base


@dataclass(frozen=True)
class SimulationPlan:
    """`store`: the folder of records whose curves are replayed; empty: synthetic curves. `evaluations`: how
    often those were evaluated, if it is not as often as the rehearsed lanes are. `guess`: where a lane is
    evaluated and the stored one was not, its validation loss is the mean training loss of so many steps
    before (0: that is an error). `seconds_per_step`: what a step of a pack takes."""

    store: str = ""
    evaluations: int | None = None
    guess: int = 0
    seconds_per_step: float = 0.0

    def write(self, store: Store) -> None:
        (store.root / PLAN_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, store: Any) -> SimulationPlan:
        return cls(**json.loads((store.root / PLAN_FILE).read_text()))

    def stored_configuration(self, configuration: Configuration) -> Configuration:
        """The one whose record is replayed for `configuration`."""
        return replace(configuration, evaluations=self.evaluations or configuration.evaluations)


@dataclass(frozen=True)
class SimulatedCurve:
    """What happens to one configuration: `losses` of training, one a step, with the gradient norms; `scores`
    by (step, split)."""

    losses: Sequence[float]
    gradient_norms: Sequence[float]
    scores: Mapping[tuple[int, str], Mapping[str, float]]
    untrained: Mapping[str, Mapping[str, float]]
    tokens_per_step: int = 0
    items: Mapping[str, ItemResults] = field(default_factory=dict)


def curve_from_record(record: Record) -> SimulatedCurve:
    """The course that a record tells."""
    return SimulatedCurve(
        losses=[step.loss for step in record.curve],
        gradient_norms=[step.gradient_norm for step in record.curve],
        scores={(e.step, e.split): e.scores for e in record.evaluations},
        untrained=record.untrained,
        tokens_per_step=record.cost.tokens // max(1, len(record.curve)),
        items=record.items,
    )


def add_estimated_losses(
    curve: SimulatedCurve, configuration: Configuration, loss_window: int
) -> SimulatedCurve:
    """With a validation loss, see `Plan`, after each step at which `configuration` is evaluated. Such an
    evaluation has no score: the task's floor stands for it."""
    due = evaluation_steps(configuration.schedule.steps, configuration.evaluations)
    scores = dict(curve.scores)
    for step in due:
        if step <= len(curve.losses):
            loss = statistics.fmean(curve.losses[max(0, step - loss_window) : step])
            told = {"loss": loss, configuration.task.metric: configuration.task.floor}
            scores.setdefault((step, "validation"), told)
    return replace(curve, scores=scores)


def synthetic_curve(configuration: Configuration) -> SimulatedCurve:
    """Smooth in the logarithm of the rate, with a best rate for each variant, noise for each seed, and a
    cliff, above which the loss grows from step to step."""
    best = -2.5 + int(hashlib.sha256(configuration.variant.name.encode()).hexdigest()[:4], 16) / 2**16
    log_distance = math.log10(configuration.optimizer.learning_rate) - best
    gain = math.exp(-(log_distance**2) / 0.5)
    steps, noise = configuration.schedule.steps, random.Random(configuration.fingerprint)

    def loss(step: int) -> float:
        if log_distance > 1.0:
            return UNTRAINED_LOSS * (1.0 + step)
        way = 1.0 - math.exp(-4.0 * step / steps)
        return UNTRAINED_LOSS * (1.0 - 0.95 * gain * way) * math.exp(noise.gauss(0.0, 0.02))

    def scores(loss: float) -> dict[str, float]:
        return {"loss": loss, configuration.task.metric: max(0.0, 1.0 - loss / UNTRAINED_LOSS)}

    due = evaluation_steps(steps, configuration.evaluations)
    return SimulatedCurve(
        losses=[loss(step) for step in range(steps)],
        gradient_norms=[2.0] * steps,
        scores={(step, split): scores(loss(step)) for step in due for split in SPLITS},
        untrained=dict.fromkeys(SPLITS, scores(UNTRAINED_LOSS)),
    )


class _SimulatedAdapters:
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


class _SimulatedLaneGroup:
    """In the place of the arithmetic."""

    def __init__(self, adapters: _SimulatedAdapters, untrained: Any, seconds_per_step: float) -> None:
        self.adapters, self.seconds_per_step = adapters, seconds_per_step
        self.data = SimpleNamespace(untrained=untrained)
        self.curves: dict[str, SimulatedCurve] = {}

    def backward(self, lanes: Sequence[Lane]) -> Sequence[Lane]:
        time.sleep(self.seconds_per_step)
        for lane in lanes:
            for parameter in lane.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        return lanes

    def reduce_gradients(self, lanes: Sequence[Lane]) -> list[BackwardResult]:
        courses = [(self.curves[lane.fingerprint], lane.step) for lane in lanes]
        return [
            BackwardResult(one.losses[step], one.gradient_norms[step], one.tokens_per_step)
            for one, step in courses
        ]

    def evaluate(self, lanes: Sequence[Lane], split: str) -> list[EvaluationResult]:
        courses = [(self.curves[lane.fingerprint], lane.step) for lane in lanes]
        return [
            EvaluationResult(one.scores[step, split], one.items.get(split, ItemResults()))
            for one, step in courses
        ]


class SimulatedEngine(Engine):
    """A workshop whose packs follow courses."""

    device_name = "rehearsal"

    def __init__(self, plan: SimulationPlan, *engine_arguments: Any) -> None:
        super().__init__(*engine_arguments)
        self.plan = plan
        self.store = Store(plan.store, create=False) if plan.store else None

    def curve_for(self, configuration: Configuration) -> SimulatedCurve:
        if self.store is None:
            return synthetic_curve(configuration)
        replayed = self.plan.stored_configuration(configuration)
        record = self.store.get_reusable(replayed.fingerprint)
        if record is None:
            raise LookupError(f"no whole curve of {replayed.fingerprint[:12]} in {self.plan.store} to replay")
        curve, loss_window = curve_from_record(record), self.plan.guess
        return add_estimated_losses(curve, configuration, loss_window) if loss_window else curve

    def add_lane(self, lane: Lane, checkpoint: Checkpoint | None) -> None:
        curve, group_key = self.curve_for(lane.configuration), lane.configuration.group_key
        lane_group: Any = self._lane_group
        if lane_group is None or group_key != self._shape:
            self.detach_adapters()
            self.variant = catalogue.get(lane.configuration.variant.name)
            lane_group = _SimulatedLaneGroup(
                _SimulatedAdapters(self.variant), curve.untrained, self.plan.seconds_per_step
            )
            self._lane_group, self._shape = lane_group, group_key
        lane_group.courses[lane.fingerprint] = curve
        lane.initialize(lane_group.adapters, curve.untrained["validation"]["loss"], checkpoint)

    def remove_lane(self, fingerprint: str) -> None:
        super().remove_lane(fingerprint)
        lane_group: Any = self._lane_group
        if lane_group is not None:
            lane_group.courses.pop(fingerprint, None)


class CountingSource:
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


def run(source: LaneSource | None, store: Any, load_base_model: Callable[..., Any], **options: Any) -> None:
    """As `orchestrator.finetune.engine.loop.run`, which it calls. Raises OSError when the store holds no
    plan, and BadInput when there is no store to replay from."""
    counting_source = CountingSource(source) if source is not None else None
    try:
        loop.run(
            counting_source,
            store,
            load_base_model,
            make_engine=partial(SimulatedEngine, SimulationPlan.read(store)),
            **options,
        )
    finally:
        if counting_source is not None:
            counting_source.write(store)


def train_simulated(
    configurations: Sequence[Configuration],
    scheduler: str,
    cluster: Cluster,
    trainers: int,
    lanes_per_trainer: int,
    store: Store,
    plan: SimulationPlan,
    gpus_per_worker: float = 0.0,
) -> int:
    """Trains `points`, by rehearsal, as a study does: Tune, broker and seats on the Ray that is connected,
    records in `store`. Returns the optimizer steps that the seats have counted. Raises Trouble when no seat
    can be had."""
    from rich.console import Console

    from orchestrator.execution.progress import Progress
    from orchestrator.execution.run_budget import RunBudget
    from orchestrator.execution.session import PoolConfig, train
    from orchestrator.execution.trainers.trainer import TrainerSpec
    from orchestrator.execution.tune.rungs import submission_order
    from orchestrator.study.grid import training_order

    plan.write(store)
    scratch = store.root / "scratch"
    scratch.mkdir(exist_ok=True)
    _wait_for_previous_broker()
    spec = TrainerSpec(
        lanes_per_trainer=lanes_per_trainer,
        gpus_per_worker=gpus_per_worker,
        store=str(store.root),
        scratch=str(scratch),
        device="cpu",
        train_loop=f"{__name__}:{run.__name__}",
    )
    console = Console(file=sys.stderr, highlight=False)
    with Progress(store.root, len(configurations), 0, console) as progress:
        return train(
            submission_order(
                scheduler, [], training_order(configurations, lanes_per_trainer), lanes_per_trainer
            ),
            (),
            scheduler,
            cluster,
            PoolConfig(trainers, spec),
            store,
            scratch,
            progress,
            lambda record: None,
            RunBudget(),
        )


def _wait_for_previous_broker() -> None:
    import ray

    from orchestrator.execution.broker.actor import BROKER_NAME

    while True:
        try:
            ray.get_actor(BROKER_NAME)
        except ValueError:
            return
        time.sleep(0.2)
