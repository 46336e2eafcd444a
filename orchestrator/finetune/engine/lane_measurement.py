"""The measurement of a trainer's steps, from which its number of lanes follows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from orchestrator.finetune.engine.active_lanes import ActiveLanes
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.engine.lane_memory import LaneMemory
from orchestrator.study.configuration import Configuration

SAMPLED_ROWS = 256
"""The number of training rows whose mean length counts."""


def note_step(active: ActiveLanes, lanes: Sequence[Lane], peak: int) -> None:
    """Measure a step of the whole lane group, and set the number of lanes once it follows from the steps.

    All workers call this after each step. The worker with the largest peak and the one with the least memory
    decide.

    Args:
        active: The lanes of the trainer.
        lanes: The lanes that took the step.
        peak: The peak memory of this worker during the step, in bytes.
    """
    slots, engine = active.slots, active.engine
    if not lanes or len(lanes) < len(active.lanes) or not slots.needs_measurement(lanes):
        return
    group_key = lanes[0].configuration.group_key
    known = slots.memory_by_group_key.setdefault(group_key, LaneMemory())
    gathered = active.process_group.all_gather((peak, engine.memory_limit))
    known.peaks[len(lanes)].append(max(one for one, _ in gathered))
    if known.is_known(1) and known.is_known(2):
        tokens = _count_tokens(engine.lane_group, lanes[0].configuration)
        measured = known.choose(min(limit for _, limit in gathered), tokens)
        slots.max_lanes_by_group_key[group_key] = measured.lanes
        active.process_group.broadcast_from_rank0(
            partial(active.recorder.write_measured_lanes, group_key, measured)
        )


def _count_tokens(lane_group: LaneGroup, configuration: Configuration) -> int:
    """Return the mean number of tokens or image patches in a micro-batch of a lane, without padding."""
    train, batches = lane_group.data.train, configuration.batches
    rows = [train[index] for index in range(min(len(train), SAMPLED_ROWS))]
    config = lane_group.base_model.model.config
    config = getattr(config, "vision_config", None) or config  # of CLIP
    patches = (getattr(config, "image_size", 0) // getattr(config, "patch_size", 1)) ** 2
    lengths = [min(len(row.ids), batches.max_length) if row.image is None else patches for row in rows]
    return round(sum(lengths) / len(lengths) * batches.batch_size)
