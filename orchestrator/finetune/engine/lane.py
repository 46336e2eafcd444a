"""A lane: one configuration in training, with its own step, optimizer, curve and reports.

Its states on a trainer are

    leased -> training -> evaluating -> reporting -> training | parked | ended

and it can end from any of them. A lane that resumes from a checkpoint, and a parked lane that continues,
enter the state that their pending work requires (`Lane.enter_next_state`).
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from torch import Tensor

from orchestrator.finetune.engine.lane_source import Lease, Report, evaluation_steps
from orchestrator.finetune.engine.tensor_files import Checkpoint
from orchestrator.finetune.evaluation.evaluate import EvaluationResult
from orchestrator.record.run_values import select_live_steps
from orchestrator.record.schema import TIME_FIELDS, Cost, Evaluation, ItemResults, ScoredSplit, StepMetrics
from orchestrator.study.configuration import (
    Configuration,
    DivergenceConfig,
    LRSchedule,
    lr_factor,
    warmup_steps,
)
from variants.adapters import Adapters, CalibrationTensors
from variants.api import VariantSettings, parameter_lr_scale, schedule_lr_scale

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP_COUNTERS = "step"
"""Name under which a checkpoint keeps AdamW's step counters among the moments, stacked to one tensor in the
order of the parameters' names. A parameter whose training begins or restarts late has a lower counter."""
CLIP_EPSILON = 1e-6
"""Added to the gradient norm before clipping, as torch.nn.utils.clip_grad_norm_ does."""
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
"""Matches lower-case names of parameters without weight decay, as Trainer.get_decay_parameter_names of
transformers does."""


class LaneState(StrEnum):
    """The next action of a lane on its trainer."""

    LEASED = "leased"
    """The lane is added to the model."""
    TRAINING = "training"
    """The lane takes an optimizer step."""
    EVALUATING = "evaluating"
    """The lane is scored, because its step is one of its evaluation steps."""
    REPORTING = "reporting"
    """The lane sends its pending reports to the source."""
    PARKED = "parked"
    """The lane waits for CONTINUE from the source."""
    ENDED = "ended"
    """The lane has left the trainer."""


TRANSITIONS: Mapping[LaneState, Collection[LaneState]] = {
    # A lane that resumes from a checkpoint may have reports to send or scores to compute first.
    LaneState.LEASED: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED},
    LaneState.TRAINING: {LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED},
    LaneState.EVALUATING: {LaneState.REPORTING, LaneState.PARKED, LaneState.ENDED},
    LaneState.REPORTING: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED},
    LaneState.PARKED: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED},
    LaneState.ENDED: (),
}
"""State -> states that may follow it."""


class IllegalTransitionError(RuntimeError):
    """A transition that `TRANSITIONS` does not allow; a bug in the loop."""


@dataclass(frozen=True)
class BackwardResult:
    """The result of the backward passes of one optimizer step."""

    loss: float
    """Mean over the targets of the cross-entropy in nats, or of the squared error for a regression task."""
    gradient_norm: float
    """L2 norm of all gradients, before clipping."""
    tokens: int
    """Targets of the accumulated batch, on all workers."""


class DivergenceDetector:
    """A detector that checks the training loss and the gradient norm of every step before it is taken.

    A lane has diverged when a value is not finite, or when after warm-up the smoothed loss m_t = s m_{t-1} +
    (1 - s) loss_t, with m_0 = loss_0 and s = `rule.smoothing`, has exceeded `rule.loss_ratio` times the
    untrained loss for `rule.share` of all steps in a row.

    Args:
        rule: The rule's parameters.
        schedule: The lane's schedule, which gives the numbers of steps and of warm-up steps.
        untrained_loss: Validation loss of the base model, in the unit of the training loss.
    """

    def __init__(self, rule: DivergenceConfig, schedule: LRSchedule, untrained_loss: float) -> None:
        self.smoothing = rule.smoothing
        self.loss_limit = rule.loss_ratio * untrained_loss
        self.warmup_steps = warmup_steps(schedule)
        self.patience = max(1, math.ceil(round(rule.share * schedule.steps, 9)))
        self.smoothed_loss: float | None = None
        self.steps_above_limit = 0
        """Steps in a row in which the smoothed loss was above the limit."""

    def observe(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """Return why the lane has diverged, or None.

        Args:
            step: The step to be taken, counted from 0.
            loss: Its training loss, in nats per target (squared error for a regression task).
            gradient_norm: L2 norm of its gradient.
        """
        if not math.isfinite(loss):
            return f"training loss {loss} in step {step + 1}"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm} in step {step + 1}"
        previous = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = self.smoothing * previous + (1.0 - self.smoothing) * loss
        is_above = step >= self.warmup_steps and self.smoothed_loss > self.loss_limit
        self.steps_above_limit = self.steps_above_limit + 1 if is_above else 0
        if self.steps_above_limit < self.patience:
            return None
        return (
            f"smoothed training loss {self.smoothed_loss:.3g} in step {step + 1}, "
            f"above {self.loss_limit:.3g} for {self.steps_above_limit} steps in a row"
        )

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the state as JSON values."""
        return {"smoothed": self.smoothed_loss, "above": self.steps_above_limit}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Restore the state from `state_dict`'s value."""
        self.smoothed_loss, self.steps_above_limit = state["smoothed"], int(state["above"] or 0)


def has_weight_decay(name: str, adapters: Adapters) -> bool:
    """Return whether weight decay applies to a parameter, by the rule of transformers' Trainer.

    Args:
        name: The parameter's name, from `Adapters.trainable`.
        adapters: The adapters of the model.

    Returns:
        False for biases and for parameters of normalization layers.
    """
    return not (
        _NO_DECAY.search(name.lower()) or isinstance(adapters.owning_module(name), torch.nn.LayerNorm)
    )


def variant_settings(configuration: Configuration) -> VariantSettings:
    """Return the variant's settings of a configuration."""
    choice = configuration.variant
    return VariantSettings(choice.rank, choice.alpha, choice.dropout, choice.extra)


class Lane:
    """One configuration in training. A lane does not depend on the other lanes of its group.

    Args:
        lease: The right to train the configuration.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.configuration = lease.configuration
        self.fingerprint = lease.configuration.fingerprint
        self.state = LaneState.LEASED
        self.step = 0
        """Optimizer steps taken."""
        steps = self.configuration.lr_schedule.steps
        self.evaluation_steps = evaluation_steps(steps, self.configuration.evaluations)
        self.curve: list[StepMetrics] = []
        self.evaluations: list[Evaluation] = []
        self.items: dict[str, ItemResults] = {}
        self.pending_reports: deque[Report] = deque()
        self.seconds = dict.fromkeys(TIME_FIELDS, 0.0)
        """Time of the trainer by kind, as in `Cost`."""
        self.tokens = 0
        self.peak_group_size = 1
        self.peak_memory = 0
        """Peak memory in bytes, see `Cost.peak_memory`."""
        self.resumed_from: tuple[int, ...] = ()
        self.started = time.time()
        self.saved_at = time.monotonic()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.adapters: Adapters
        self.settings: VariantSettings
        self.optimizer: torch.optim.AdamW
        self.divergence_detector: DivergenceDetector

    # -- state ------------------------------------------------------------------------------------------

    def transition_to(self, target: LaneState) -> None:
        """Change the lane's state.

        Raises:
            IllegalTransitionError: `TRANSITIONS` does not allow this.
        """
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(
                f"lane {self.fingerprint[:12]} at step {self.step} cannot go from {self.state} to {target}"
            )
        self.state = target

    def enter_next_state(self) -> None:
        """Enter REPORTING if reports are pending, else EVALUATING if scores are due, else TRAINING."""
        if self.pending_reports:
            if self.state is not LaneState.REPORTING:
                self.transition_to(LaneState.REPORTING)
        elif self.step in self.evaluation_steps and all(e.step != self.step for e in self.evaluations):
            self.transition_to(LaneState.EVALUATING)
        else:
            self.transition_to(LaneState.TRAINING)

    @property
    def is_at_last_step(self) -> bool:
        """Whether the lane has taken all its steps."""
        return self.step == self.configuration.lr_schedule.steps

    def is_due(self, split: ScoredSplit) -> bool:
        """Return whether an evaluation at this step scores a split, after the splits before it."""
        if split == "general":
            return self.is_at_last_step and self.find_nonfinite_loss() is None
        every = split == "validation" or self.configuration.test_evaluations == "every"
        return every or self.is_at_last_step

    # -- initialization ---------------------------------------------------------------------------------

    def initialize(
        self,
        adapters: Adapters,
        untrained_loss: float,
        checkpoint: Checkpoint | None,
        calibration: CalibrationTensors | None = None,
    ) -> None:
        """Add the lane's adapter to the model, initialized or restored, and make its optimizer.

        Args:
            adapters: The adapters of the model.
            untrained_loss: Validation loss of the base model, for the divergence rule.
            checkpoint: The state from which the lane resumes; None for a lane that starts.
            calibration: Tensors for variants that initialize from data.

        Raises:
            ValueError: The variant refuses the settings.
        """
        self.adapters = adapters
        self.settings = adapters.variant.validate_settings(variant_settings(self.configuration))
        seed = self.configuration.seed
        if checkpoint is None:
            adapters.add_lane(self.fingerprint, self.settings, seed, calibration)
        else:
            tensors = checkpoint.trainable, checkpoint.frozen
            adapters.restore_lane(self.fingerprint, *tensors, self.settings, seed)
        self.parameters = adapters.trainable(self.fingerprint)
        rule, schedule = self.configuration.divergence, self.configuration.lr_schedule
        self.divergence_detector = DivergenceDetector(rule, schedule, untrained_loss)
        self.optimizer = self._make_optimizer()
        if checkpoint is not None:
            self._restore(checkpoint)

    def _make_optimizer(self) -> torch.optim.AdamW:
        """Return AdamW with a parameter group for each pair of learning rate scale and weight decay."""
        options = self.configuration.optimizer
        head = options.head_learning_rate
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if self.adapters.is_head(name):
                scale = 1.0 if head is None else head / options.learning_rate
            else:
                scale = parameter_lr_scale(self.adapters.variant, name.rpartition(".")[2], self.settings)
            decay = options.weight_decay if has_weight_decay(name, self.adapters) else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
        parameter_groups = [
            {"params": parameters, "scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ]
        betas = (options.beta1, options.beta2)
        return torch.optim.AdamW(parameter_groups, options.learning_rate, betas, options.epsilon, fused=True)

    # -- a step -----------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step, before the scales of parameter groups."""
        schedule = self.configuration.lr_schedule
        variant_scale = schedule_lr_scale(self.adapters.variant, self.step, schedule.steps, self.settings)
        return self.configuration.optimizer.learning_rate * lr_factor(schedule, self.step) * variant_scale

    def take_optimizer_step(self, result: BackwardResult) -> str | None:
        """Clip the gradients in the parameters and take one optimizer step, unless the lane has diverged.

        Args:
            result: Loss, gradient norm and token count of these gradients.

        Returns:
            The reason why the lane has diverged, in which case no step was taken; None otherwise.
        """
        loss, norm, rate = result.loss, result.gradient_norm, self.learning_rate
        self.curve.append(StepMetrics(self.step + 1, loss, rate, norm))
        self.tokens += result.tokens
        reason = self.divergence_detector.observe(self.step, loss, norm)
        if reason is not None:
            return reason
        clip_factor = self.configuration.optimizer.clip_norm / (norm + CLIP_EPSILON)
        if clip_factor < 1:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, clip_factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        steps = self.configuration.lr_schedule.steps
        self.adapters.before_step(self.fingerprint, self.step, steps, self.optimizer)
        self.optimizer.step()
        self.step += 1
        self.adapters.after_step(self.fingerprint, self.step, steps, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return None

    # -- scores -----------------------------------------------------------------------------------------

    def record_scores(self, split: ScoredSplit, result: EvaluationResult) -> None:
        """Add the scores of an evaluation at the present step, and at the last step its results per item."""
        self.evaluations.append(Evaluation(self.step, split, result.scores))
        self.seconds["generate_seconds"] += result.generate_seconds
        if self.is_at_last_step and split != "general":
            self.items[split] = result.items

    def queue_reports(self, after_step: int = 0) -> None:
        """Queue a report for each validation evaluation after step `after_step`, in order."""
        shown = select_live_steps(
            self.curve, self.configuration.lr_schedule.steps, {e.step for e in self.evaluations}
        )
        previous = 0
        for e in (e for e in self.evaluations if e.split == "validation"):
            if e.step > after_step:
                since = tuple(s for s in shown if previous < s.step <= e.step)
                self.pending_reports.append(
                    Report(self.fingerprint, self.lease.attempt, e.step, e.scores, since)
                )
            previous = e.step

    @property
    def last_reported_step(self) -> int:
        """The last step whose validation scores were reported; 0 before the first report."""
        pending_steps = {report.step for report in self.pending_reports}
        steps = [e.step for e in self.evaluations if e.split == "validation" and e.step not in pending_steps]
        return max(steps, default=0)

    def find_nonfinite_loss(self) -> str | None:
        """Return the reason why the lane has diverged if an evaluation at this step has a non-finite loss.

        The loss of the split "general" does not count: it decides nothing.
        """
        for e in self.evaluations:
            if e.step == self.step and e.split != "general" and not math.isfinite(e.scores.get("loss", 0.0)):
                return f"{e.split} loss {e.scores['loss']} after step {e.step}"
        return None

    @property
    def cost(self) -> Cost:
        """Seconds, tokens, trainable parameters and peak memory of the lane."""
        parameters = self.adapters.parameter_count(self.fingerprint) if self.parameters else 0
        return Cost(
            tokens=self.tokens,
            trainable_parameters=parameters,
            peak_memory=self.peak_memory,
            **self.seconds,
        )

    # -- checkpoints ------------------------------------------------------------------------------------

    def make_checkpoint(self, frozen: Mapping[str, Tensor]) -> Checkpoint:
        """Return the lane's state as a checkpoint that shares the lane's tensors.

        Args:
            frozen: The adapter's tensors that are not trained, by name.
        """
        states = {name: self.optimizer.state.get(p, {}) for name, p in sorted(self.parameters.items())}
        stepped = {name: state for name, state in states.items() if state}
        moments = {moment: {name: state[moment] for name, state in stepped.items()} for moment in MOMENTS}
        if stepped:
            moments[STEP_COUNTERS] = {"all": torch.stack([state["step"] for state in stepped.values()])}
        state = {
            "curve": [asdict(s) for s in self.curve],
            "evaluations": [asdict(e) for e in self.evaluations],
            "divergence": self.divergence_detector.state_dict(),
            "seconds": dict(self.seconds),
            "tokens": self.tokens,
            "peak_group_size": self.peak_group_size,
            "peak_memory": self.peak_memory,
            "resumed_from": self.resumed_from,
            "started": self.started,
        }
        self.saved_at = time.monotonic()
        return Checkpoint(
            self.fingerprint, self.lease.attempt, self.step, self.parameters, frozen, moments, state
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Set the lane and its optimizer to the state of a checkpoint, and queue its reports again."""
        state = checkpoint.state
        self.step = checkpoint.step
        self.curve = [StepMetrics(**s) for s in state["curve"]]
        self.evaluations = [Evaluation(**e) for e in state["evaluations"]]
        self.divergence_detector.load_state_dict(state["divergence"])
        self.seconds.update(state["seconds"])
        self.tokens, self.peak_group_size = state["tokens"], state["peak_group_size"]
        self.peak_memory = state["peak_memory"]
        self.started = state["started"]
        self.resumed_from = (*state["resumed_from"], checkpoint.step)
        self._restore_optimizer(checkpoint.moments)
        # A new driver or a restarted broker may lack any of the earlier reports, so all are sent again.
        self.queue_reports()

    def _restore_optimizer(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set AdamW's state of the parameters that have moments in a checkpoint."""
        names = sorted(name for name in moments.get(MOMENTS[0], {}) if name in self.parameters)
        for name, counter in zip(names, moments[STEP_COUNTERS]["all"] if names else (), strict=True):
            parameter = self.parameters[name]
            # The step counter of fused AdamW is a float32 tensor on the parameter's device.
            self.optimizer.state[parameter] = {
                "step": counter.to(parameter.device, torch.float32, copy=True)
            } | {moment: moments[moment][name].to(parameter.device) for moment in MOMENTS}
