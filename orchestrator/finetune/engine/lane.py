"""A lane: one configuration in training, with everything that is its own."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.divergence import Watch
from orchestrator.finetune.engine.lane_source import Lease, Report
from orchestrator.finetune.engine.lane_state import NEXT, IllegalMove, Phase, due_steps
from orchestrator.finetune.evaluation.evaluate import Scored
from orchestrator.record.schema import Cost, Evaluation, Items, Step
from orchestrator.study.configuration import Configuration
from orchestrator.study.lr_schedule import factor
from variants.base import Settings

if TYPE_CHECKING:
    from variants.attach import Adapters, Distilled

MOMENTS = ("exp_avg", "exp_avg_sq")
CLIP_EPSILON = 1e-6
"""What torch.nn.utils.clip_grad_norm_, which transformers' Trainer uses, adds to the norm."""
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
"""Matches the lower-case names of parameters that do not decay, as transformers'
Trainer.get_decay_parameter_names does."""


@dataclass(frozen=True)
class Taken:
    """What a step's backward passes gave: mean loss a token, global gradient norm, tokens with loss."""

    loss: float
    norm: float
    tokens: int


def decays(name: str, adapters: Adapters) -> bool:
    """Return whether weight decay applies to a parameter, by the rule of transformers' Trainer.

    Args:
        name: As `Adapters.trainable` gives it.
        adapters: The model's adapters.

    Returns:
        False for biases and for the parameters of norms.
    """
    return not (_NO_DECAY.search(name.lower()) or isinstance(adapters.owner(name), torch.nn.LayerNorm))


def settings_of(configuration: Configuration) -> Settings:
    """What the variant is told."""
    choice = configuration.variant
    return Settings(choice.rank, choice.alpha, choice.dropout, choice.extra)


class Lane:
    """`step` counts the optimizer steps taken. Nothing here knows the other lanes of the pack."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.configuration = lease.configuration
        self.name = lease.configuration.fingerprint
        self.phase = Phase.LEASED
        self.step = 0
        self.due = due_steps(self.configuration.schedule.steps, self.configuration.evaluations)
        self.curve: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.items: dict[str, Items] = {}
        self.to_report: deque[Report] = deque()
        self.train_seconds = self.evaluate_seconds = 0.0
        self.tokens = 0
        self.pack_lanes = 1
        self.resumed_from: tuple[int, ...] = ()
        self.started = time.time()
        self.saved_at = time.monotonic()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.adapters: Adapters
        self.settings: Settings
        self.optimizer: torch.optim.AdamW
        self.watch: Watch

    # -- where it is ------------------------------------------------------------------------------------

    def move(self, to: Phase) -> None:
        if to not in NEXT[self.phase]:
            raise IllegalMove(
                f"lane {self.name[:12]} at step {self.step} cannot go from {self.phase} to {to}"
            )
        self.phase = to

    def go_on(self) -> None:
        """To what comes next for a lane that may go on: owed reports, due scores, training."""
        if self.to_report:
            if self.phase is not Phase.REPORTING:
                self.move(Phase.REPORTING)
        elif self.step in self.due and not self.evaluated:
            self.move(Phase.EVALUATING)
        else:
            self.move(Phase.TRAINING)

    @property
    def at_end(self) -> bool:
        return self.step == self.configuration.schedule.steps

    @property
    def evaluated(self) -> bool:
        return any(e.step == self.step for e in self.evaluations)

    # -- on and off the model ---------------------------------------------------------------------------

    def open(
        self,
        adapters: Adapters,
        untrained_loss: float,
        saved: Checkpoint | None,
        evidence: Distilled | None = None,
    ) -> None:
        """Puts the lane on the model, at its start or where `saved` left it; raises what the variant does."""
        self.adapters = adapters
        self.settings = adapters.variant.checked_settings(settings_of(self.configuration))
        seed = self.configuration.seed
        if saved is None:
            adapters.add(self.name, self.settings, seed, evidence)
        else:
            adapters.load(self.name, saved.trainable, saved.frozen, self.settings, seed)
        self.parameters = adapters.trainable(self.name)
        self.watch = Watch(self.configuration.divergence, self.configuration.schedule, untrained_loss)
        self.optimizer = self._optimizer()
        if saved is not None:
            self._restore(saved)
        self.go_on()

    def _optimizer(self) -> torch.optim.AdamW:
        options = self.configuration.optimizer
        head = options.head_learning_rate
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if self.adapters.is_head(name):
                scale = 1.0 if head is None else head / options.learning_rate
            else:
                scale = self.adapters.variant.learning_rate_scale(name.rpartition(".")[2], self.settings)
            decay = options.weight_decay if decays(name, self.adapters) else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "scale": scale, "weight_decay": decay}
                for (scale, decay), parameters in groups.items()
            ],
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            fused=True,
        )

    # -- a step -----------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        schedule = self.configuration.schedule
        own = self.adapters.variant.schedule_scale(self.step, schedule.steps, self.settings)
        return self.configuration.optimizer.learning_rate * factor(schedule, self.step) * own

    def take_step(self, taken: Taken) -> str | None:
        """One optimizer step with the gradients that are in the parameters. Returns why the lane has diverged
        if it has; the step is not taken then."""
        loss, norm, rate = taken.loss, taken.norm, self.learning_rate
        self.curve.append(Step(self.step + 1, loss, rate, norm))
        self.tokens += taken.tokens
        reason = self.watch.observe(self.step, loss, norm)
        if reason is not None:
            return reason
        clipped = self.configuration.optimizer.clip_norm / (norm + CLIP_EPSILON)
        if clipped < 1:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, clipped)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        steps = self.configuration.schedule.steps
        self.adapters.before_step(self.name, self.step, steps, self._moments)
        self.optimizer.step()
        self.step += 1
        self.adapters.after_step(self.name, self.step, steps, self._moments)
        self.optimizer.zero_grad(set_to_none=True)
        if self.step in self.due:
            self.move(Phase.EVALUATING)
        return None

    def _moments(self, parameter: Tensor) -> Mapping[str, Tensor]:
        kept = self.optimizer.state.get(parameter, {})
        return {moment: kept[moment] for moment in MOMENTS if moment in kept}

    # -- scores -----------------------------------------------------------------------------------------

    def scored(self, split: Literal["validation", "test"], scored: Scored) -> None:
        self.evaluations.append(Evaluation(self.step, split, scored.scores))
        if self.at_end:
            self.items[split] = scored.items

    def owe(self, after: int = 0) -> None:
        """The validation scores beyond step `after` are to be reported, in order."""
        losses = {s.step: s.loss for s in self.curve}
        for e in self.evaluations:
            if e.split == "validation" and e.step > after:
                self.to_report.append(Report(self.name, self.lease.attempt, e.step, e.scores, losses[e.step]))

    @property
    def told(self) -> int:
        """The last step whose validation scores were reported; 0 before the first."""
        owed = {report.step for report in self.to_report}
        steps = [e.step for e in self.evaluations if e.split == "validation" and e.step not in owed]
        return max(steps, default=0)

    def unsound(self) -> str | None:
        """A loss on a held-out split that is not finite: why the lane has diverged."""
        for e in self.evaluations:
            if e.step == self.step and not math.isfinite(e.scores.get("loss", 0.0)):
                return f"{e.split} loss {e.scores['loss']} after step {e.step}"
        return None

    @property
    def cost(self) -> Cost:
        return Cost(
            self.train_seconds,
            self.evaluate_seconds,
            self.tokens,
            self.adapters.parameter_count(self.name) if self.parameters else 0,
        )

    # -- checkpoints ------------------------------------------------------------------------------------

    def checkpoint(self, frozen: Mapping[str, Tensor]) -> Checkpoint:
        moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        for name, parameter in self.parameters.items():
            for moment, kept in self._moments(parameter).items():
                moments[moment][name] = kept
        state = {
            "curve": [asdict(s) for s in self.curve],
            "evaluations": [asdict(e) for e in self.evaluations],
            "watch": self.watch.state(),
            "seconds": [self.train_seconds, self.evaluate_seconds],
            "tokens": self.tokens,
            "pack_lanes": self.pack_lanes,
            "resumed_from": self.resumed_from,
            "started": self.started,
        }
        self.saved_at = time.monotonic()
        return Checkpoint(self.name, self.lease.attempt, self.step, self.parameters, frozen, moments, state)

    def _restore(self, saved: Checkpoint) -> None:
        state = saved.state
        self.step = saved.step
        self.curve = [Step(**s) for s in state["curve"]]
        self.evaluations = [Evaluation(**e) for e in state["evaluations"]]
        self.watch.restore(state["watch"])
        self.train_seconds, self.evaluate_seconds = state["seconds"]
        self.tokens, self.pack_lanes, self.started = state["tokens"], state["pack_lanes"], state["started"]
        self.resumed_from = (*state["resumed_from"], saved.step)
        for name, parameter in self.parameters.items():
            if all(name in saved.moments.get(moment, {}) for moment in MOMENTS):
                # The step counter of fused AdamW is a float32 tensor beside the parameter.
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step), dtype=torch.float32, device=parameter.device)
                } | {m: saved.moments[m][name].to(parameter.device) for m in MOMENTS}
        # Whoever waits may have missed any report, or all (a new driver): they are told again, in order.
        self.owe()


def share(started: float, lanes: Sequence[Lane], what: str) -> None:
    """The seconds since `started`, in equal parts to the lanes that they went to."""
    seconds = (time.monotonic() - started) / len(lanes)
    for lane in lanes:
        setattr(lane, what, getattr(lane, what) + seconds)
