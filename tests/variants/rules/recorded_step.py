"""One optimizer step of a lane, with the values and gradients from before the step."""

from __future__ import annotations

from torch import Tensor

from variants.attach import Adapters
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, model_output


def record_step(
    case: Case, adapters: Adapters, optimizer: LaneOptimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take a step of the only lane, and return its parameters and their gradients from before the step."""
    step = optimizer.steps_taken
    rows = case.rows(0, step)
    optimizer.zero_grad()
    with adapters.activate_lanes(["0"], step):
        case.loss(model_output(adapters.model, rows), rows).backward()
    parameters = adapters.trainable("0")
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    optimizer.step()
    return values, gradients
