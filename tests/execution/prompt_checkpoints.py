"""Checkpoints at known steps.

A study saves a lane when that is worth its cost. A test that ends or changes something at a given step must
know what is saved by then.

The tasks of tests import this file in the workers of trainers, from the folder that they are in; a test that
copies such a task copies this file as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.recorder import LaneRecorder

SetAttribute = Callable[[Any, str, Any], None]


def is_at_evaluation(lane: Lane) -> bool:
    """Return whether the lane is at one of its evaluation steps."""
    return lane.step in lane.evaluation_steps


def save_promptly(
    set_attribute: SetAttribute = setattr, when: Callable[[Lane], bool] = is_at_evaluation
) -> None:
    """Save each lane when `when` returns true for it.

    Args:
        set_attribute: Changes the classes of the loop: for good, or `setattr` of a `MonkeyPatch`.
        when: Called for each lane before each of its steps.
    """

    def save_due_checkpoint(recorder: LaneRecorder, lanes: Sequence[Lane]) -> None:
        for lane in filter(when, lanes):
            recorder.save_checkpoint(lane)

    set_attribute(LaneRecorder, "save_due_checkpoint", save_due_checkpoint)
