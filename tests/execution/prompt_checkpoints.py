"""Checkpoints at known steps, written before the lane trains on.

A study saves a lane when that is worth its cost, and the lane trains on while the file is written. A test
that ends or changes something at a given step must know what is saved by then.

The tasks of tests import this file in the workers of trainers, from the folder that they are in; a test that
copies such a task copies this file as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.finetune.engine.checkpoint_writer import CheckpointSchedule
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.recorder import LaneRecorder

SetAttribute = Callable[[Any, str, Any], None]


def is_at_evaluation(lane: Lane) -> bool:
    """Return whether the lane is at one of its evaluation steps."""
    return lane.step in lane.evaluation_steps


def wait_for_each_save(set_attribute: SetAttribute = setattr) -> None:
    """Let lanes wait for the writes of their checkpoints.

    Args:
        set_attribute: Changes the classes of the loop: for good, or `setattr` of a `MonkeyPatch`.
    """
    start = LaneRecorder.start_checkpoint

    def start_and_finish(recorder: LaneRecorder, lane: Lane) -> None:
        start(recorder, lane)
        recorder.finish_write()

    set_attribute(LaneRecorder, "start_checkpoint", start_and_finish)


def save_promptly(
    set_attribute: SetAttribute = setattr, when: Callable[[Lane], bool] = is_at_evaluation
) -> None:
    """Save each lane when `when` returns true for it, and let it wait for the write.

    Args:
        set_attribute: As for `wait_for_each_save`.
        when: Called for each lane before each of its steps.
    """

    def is_due(schedule: CheckpointSchedule, lane: Lane, lane_count: int, is_first: bool) -> bool:
        return when(lane)

    wait_for_each_save(set_attribute)
    set_attribute(CheckpointSchedule, "is_due", is_due)
