"""The fine-tuning loop with an engine that trains nothing. Losses and scores are synthetic curves.

A trainer whose `TrainerSettings.train_loop` is `simulated_training:run` differs from others in its engine
only. It leases, evaluates, parks, spills, stops, checkpoints and records lanes by the same code. `scale.py`
uses it to measure the cost of a study without training.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.finetune.engine import loop
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.engine.lane_source import LaneSource, evaluation_steps
from orchestrator.finetune.engine.tensor_files import read_checkpoint
from orchestrator.finetune.evaluation.evaluate import EvaluationResult
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS
from orchestrator.record.schema import ItemResults
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue

if TYPE_CHECKING:
    from orchestrator.execution.ray_cluster import Cluster

SPLITS = ("validation", "test")
UNTRAINED_LOSS = 2.5
"""Loss of the untrained synthetic model, in nats per token."""
SECONDS_PER_STEP = 0.01
"""Duration of one step of a lane group."""
LANES_PER_TRAINER = 4  # the number in a dry run on two cores


@dataclass(frozen=True)
class SimulatedCurve:
    """Losses and scores of the whole training of one configuration."""

    losses: Sequence[float]
    """Training loss of each step."""
    gradient_norms: Sequence[float]
    """Gradient norm of each step."""
    scores: Mapping[tuple[int, str], Mapping[str, float]]
    """(step, split) -> metric -> score."""
    untrained: Mapping[str, Mapping[str, float]]
    """Split -> metric -> score of the untrained model."""


def synthetic_curve(configuration: Configuration) -> SimulatedCurve:
    """Return a curve whose loss is a smooth function of the logarithm of the learning rate.

    The variant determines the best learning rate, and the configuration determines the noise. Above ten times
    the best rate, the loss grows with every step, as in a training that diverges.
    """
    best = -2.5 + int(hashlib.sha256(configuration.variant.name.encode()).hexdigest()[:4], 16) / 2**16
    log_distance = math.log10(configuration.optimizer.learning_rate) - best
    gain = math.exp(-(log_distance**2) / 0.5)
    steps, noise = configuration.lr_schedule.steps, random.Random(configuration.fingerprint)

    def loss(step: int) -> float:
        if log_distance > 1.0:
            return UNTRAINED_LOSS * (1.0 + step)
        progress = 1.0 - math.exp(-4.0 * step / steps)
        return UNTRAINED_LOSS * (1.0 - 0.95 * gain * progress) * math.exp(noise.gauss(0.0, 0.02))

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
    """Stand-in for `variants.adapters.Adapters`: a lane has one parameter, whose gradient is zero."""

    max_lanes = 10_000

    def __init__(self, variant: Any) -> None:
        self.variant = variant
        self.lanes: dict[str, dict[str, torch.nn.Parameter]] = {}

    def add_lane(self, lane: str, *settings: Any) -> None:
        self.lanes[lane] = {"layer.number": torch.nn.Parameter(torch.zeros(1))}

    def restore_lane(self, lane: str, trainable: Mapping[str, torch.Tensor], *settings: Any) -> None:
        self.lanes[lane] = {name: torch.nn.Parameter(value) for name, value in trainable.items()}

    def trainable(self, lane: str) -> dict[str, torch.nn.Parameter]:
        return self.lanes[lane]

    def frozen(self, lane: str) -> dict[str, torch.Tensor]:
        return {}

    def parameter_count(self, lane: str) -> int:
        return 1

    def is_head(self, parameter: str) -> bool:
        return False

    def owning_module(self, parameter: str) -> None:
        return None

    def before_step(self, *lane: Any) -> None:
        """Do nothing: no variant acts on the parameter."""

    after_step = before_step

    def remove_lane(self, lane: str) -> None:
        del self.lanes[lane]

    def detach(self) -> None:
        self.lanes.clear()


class SimulatedEngine(Engine):
    """An engine whose lanes follow prepared curves, and that computes nothing."""

    device_name = "simulated"
    curves: Mapping[str, SimulatedCurve] = {}
    """Fingerprint -> the curve of a lane."""

    def add_lane(self, lane: Lane, checkpoint: Path | None) -> None:
        """Start the lane, or restore it from `checkpoint`, in a new lane group if its group key differs."""
        curve, group_key = synthetic_curve(lane.configuration), lane.configuration.group_key
        if self._lane_group is None or group_key != self._group_key:
            self._detach()
            adapters = _SimulatedAdapters(catalogue.get(lane.configuration.variant.name))
            data = SimpleNamespace(
                baseline=SimpleNamespace(scores=curve.untrained), general_scores={}, splits=HELD_OUT_SPLITS
            )
            group: Any = SimpleNamespace(adapters=adapters, data=data)
            self._lane_group, self._group_key, self.curves = group, group_key, {}
        self.curves = {**self.curves, lane.fingerprint: curve}
        restored = None if checkpoint is None else read_checkpoint(checkpoint)
        lane.initialize(self.lane_group.adapters, curve.untrained["validation"]["loss"], restored)

    def step(self, fingerprints: Sequence[str]) -> list[Any]:
        """Take a step of each lane with the loss and the gradient norm of its curve."""
        time.sleep(SECONDS_PER_STEP)
        lanes = [self.lanes[name] for name in fingerprints]
        for lane in lanes:
            for parameter in lane.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        curves = [(self.curves[lane.fingerprint], lane.step) for lane in lanes]
        results = [BackwardResult(one.losses[step], one.gradient_norms[step], 0) for one, step in curves]
        return [lane.take_optimizer_step(result) for lane, result in zip(lanes, results, strict=True)]

    def evaluate(self, split: str, fingerprints: Sequence[str]) -> list[EvaluationResult]:
        """Return the scores of the lanes' curves."""
        lanes = [self.lanes[name] for name in fingerprints]
        steps = [(self.curves[lane.fingerprint], lane.step) for lane in lanes]
        return [EvaluationResult(curve.scores[step, split], ItemResults()) for curve, step in steps]

    def complete_baseline_scores(self, wait: bool) -> None:
        """Do nothing: the curves have these scores."""


class CountingSource:
    """A lane source that counts and times the calls to another one.

    Args:
        source: The other one.
        folder: The folder for the file with the counts, which is written whenever a lane ends, because the
            study ends its trainers without waiting for them.
    """

    def __init__(self, source: Any, folder: Path) -> None:
        self.source, self.file = source, folder / f"calls-{uuid.uuid4().hex}.json"
        self.calls, self.seconds = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.source, name)

        def timed(*arguments: Any) -> Any:
            started = time.monotonic()
            try:
                return method(*arguments)
            finally:
                self.calls += 1
                self.seconds += time.monotonic() - started
                if name == "end_lease":
                    counts = json.dumps({"calls": self.calls, "seconds": self.seconds})
                    new = self.file.with_suffix(".new")
                    new.write_text(f"{counts}\n")
                    new.replace(self.file)

        return timed


def run(source: LaneSource | None, store: Any, *arguments: Any, **options: Any) -> None:
    """Run the fine-tuning loop with a `SimulatedEngine`; see `orchestrator.finetune.engine.loop.run`."""
    counting_source = CountingSource(source, store.root) if source is not None else None
    loop.run(counting_source, store, *arguments, make_engine=SimulatedEngine, **options)


def train_simulated(
    configurations: Sequence[Configuration],
    scheduler: str,
    cluster: Cluster,
    num_trainers: int,
    gpus_per_worker: float,
    store: Store,
) -> int:
    """Run a study on the connected Ray cluster with real trials, broker and trainers but simulated training.

    Args:
        configurations: The configurations of the study.
        scheduler: Early stopping: a name in `SCHEDULERS`.
        cluster: The connected cluster.
        num_trainers: Number of trainers, each of one worker and `LANES_PER_TRAINER` lanes.
        gpus_per_worker: GPUs that Ray reserves for each worker.
        store: The store that receives the records.

    Returns:
        The optimizer steps that the trainers have counted.

    Raises:
        StudyError: No trainer could be started or is left, or too many have failed.
    """
    from rich.console import Console

    from orchestrator.execution.progress import Progress, RunBudget
    from orchestrator.execution.session import train
    from orchestrator.execution.settings import Session, TrainerSettings
    from orchestrator.study.options import StudyOptions

    scratch = store.root / "scratch"
    scratch.mkdir(exist_ok=True)
    options = StudyOptions(trainers=num_trainers, scheduler=scheduler, device="cpu", save_adapters="none")
    settings = TrainerSettings(
        options,
        LANES_PER_TRAINER,
        gpus_per_worker,
        store.root,
        scratch,
        train_loop=f"{__name__}:{run.__name__}",
    )
    console = Console(file=sys.stderr, highlight=False)
    with Progress(store.root, len(configurations), 0, console) as progress:
        session = Session(settings, num_trainers, cluster, store, progress, RunBudget())
        return train(session, (), configurations)
