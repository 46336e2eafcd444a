"""Training curves of simulated configurations: replayed from stored records, or synthetic."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.finetune.engine.lane_state import evaluation_steps
from orchestrator.record.schema import ItemResults, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

PLAN_FILE = "simulation.json"
SPLITS = ("validation", "test")
UNTRAINED_LOSS = 2.5
"""Loss of the untrained synthetic model, in nats per token."""


@dataclass(frozen=True)
class SimulationPlan:
    """The source of a simulation's curves, and the duration of its steps."""

    store: str = ""
    """Folder of the records whose curves are replayed. Empty: synthetic curves."""
    evaluations: int | None = None
    """Evaluations of each replayed configuration. Default: those of the simulated configuration."""
    loss_window: int = 0
    """Training steps whose mean loss replaces a validation loss that the replayed record lacks. 0: a missing
    loss is an error."""
    seconds_per_step: float = 0.0
    """Duration of one step of a lane group, in seconds."""

    def write(self, store: Store) -> None:
        """Write the plan into the folder of `store`, where `read` finds it."""
        (store.root / PLAN_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, store: Any) -> SimulationPlan:
        """Return the plan in the folder of `store`.

        Raises:
            OSError: There is none.
        """
        return cls(**json.loads((store.root / PLAN_FILE).read_text()))


@dataclass(frozen=True)
class SimulatedCurve:
    """The whole training of one configuration."""

    losses: Sequence[float]
    """Training loss of each step."""
    gradient_norms: Sequence[float]
    """Gradient norm of each step."""
    scores: Mapping[tuple[int, str], Mapping[str, float]]
    """(step, split) -> metric -> score."""
    untrained: Mapping[str, Mapping[str, float]]
    """Split -> metric -> score of the untrained model."""
    tokens_per_step: int = 0
    items: Mapping[str, ItemResults] = field(default_factory=dict)
    """Split -> results of its examples after the last step."""


def replayed_curve(record: Record, configuration: Configuration, loss_window: int) -> SimulatedCurve:
    """Return the curve that a record holds.

    Args:
        record: The record of the same training, with the same or another number of evaluations.
        configuration: The configuration to be simulated.
        loss_window: See `SimulationPlan`. An evaluation that is added has the task's floor as its score,
            because its score is not known.
    """
    losses = [step.loss for step in record.curve]
    scores = {(e.step, e.split): e.scores for e in record.evaluations}
    for step in evaluation_steps(configuration.lr_schedule.steps, configuration.evaluations):
        if loss_window and step <= len(losses):
            loss = statistics.fmean(losses[max(0, step - loss_window) : step])
            estimate = {"loss": loss, configuration.task.metric: configuration.task.floor}
            scores.setdefault((step, "validation"), estimate)
    return SimulatedCurve(
        losses=losses,
        gradient_norms=[step.gradient_norm for step in record.curve],
        scores=scores,
        untrained=record.baseline_scores,
        tokens_per_step=record.cost.tokens // max(1, len(record.curve)),
        items=record.items,
    )


def synthetic_curve(configuration: Configuration) -> SimulatedCurve:
    """Return a curve whose loss is a smooth function of the logarithm of the learning rate.

    Each variant has a best rate of its own, each configuration its own noise. Above ten times the best rate,
    the loss grows with every step, as in a training that diverges.
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
