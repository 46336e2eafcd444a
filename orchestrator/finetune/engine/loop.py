"""The fine-tuning loop of a trainer: it leases lanes, trains them and writes their records.

Each round leases lanes for the free slots (`leasing.py`), applies the directives of the source, takes one
optimizer step with every lane in training, and evaluates the lanes for which that is due (`rounds.py`). Lanes
join and leave at any round and do not influence each other.

All workers of a trainer run the loop in step (`process_group.py`). Rank 0 alone uses the source, the clock
and the store, and broadcasts what it finds; then all workers act on the same values.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.finetune.engine.active_lanes import ActiveLanes
from orchestrator.finetune.engine.checkpoint_schedule import CheckpointSchedule
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane_source import LaneSource
from orchestrator.finetune.engine.leasing import LaneLeasing
from orchestrator.finetune.engine.polling import PollInterval
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.finetune.engine.recovery import FailureRecovery
from orchestrator.finetune.engine.rounds import TrainingRounds
from orchestrator.finetune.engine.slots import LaneSlots
from orchestrator.finetune.failures import (
    BrokenKind,
    Fault,
    StoreFullError,
    TrainerBrokenError,
    classify_error,
)
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Provenance
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

BaseModelLoader = Callable[[ModelChoice, Task], BaseModel]
EngineFactory = Callable[[BaseModelLoader, Path, Path, ProcessGroup, Callable[[], None]], Engine]
"""Called with the loader, the folders of calibrations and of prepared data, the process group, and a function
that the engine calls to show progress, for instance after every batch of an evaluation or calibration."""


@dataclass(frozen=True)
class LoopSettings:
    """The limits and intervals of a fine-tuning loop; times in seconds."""

    max_lanes: int
    """Lanes that train at once, at most."""
    idle_seconds: float
    """The loop ends when it has held no lane for this long."""
    poll_seconds: float = 0.1
    """The shortest interval between two requests of one kind to the source; longer if it answers slowly."""
    spill_seconds: float = 1.0
    """A lane that has been parked for this long makes room for one that waits."""
    is_measured: bool = False
    """If true, the number of lanes follows from the memory of steps with one and with two lanes, up to
    `max_lanes` (GPUs only: on a CPU the memory of a step is not known)."""
    adapters: Path | None = None
    """The folder in which the adapters of finished lanes are kept; None to keep none."""
    min_checkpoint_seconds: float = 60.0
    """The shortest interval between two checkpoints of a lane, see `CheckpointSchedule`."""
    max_checkpoint_seconds: float = 900.0
    """The longest interval between two checkpoints of a lane."""
    store_full_timeout_seconds: float = 60.0
    """The longest time for which a trainer waits for space on a full disk."""


def run(
    source: LaneSource | None,
    store: Store,
    load_base_model: BaseModelLoader,
    settings: LoopSettings,
    *,
    provenance: Callable[..., Provenance],
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    make_engine: EngineFactory = Engine,
) -> None:
    """Train the lanes that `source` leases until it is closed or idle.

    All workers of a trainer call this function with the same arguments, except for the source. A lane that
    fails ends alone, with a `failed` record. When memory runs out, fewer lanes train at once. What the source
    or the store raises ends the loop; the lanes resume from their checkpoints.

    Args:
        source: The source of lanes, which receives the reports; None on all ranks but 0.
        store: The store for checkpoints, adapters and records.
        load_base_model: Loads a base model for a task.
        settings: Limits and intervals.
        provenance: Makes the provenance of a record, called as `provenance(device, kernels=,
            lane_group_size=, workers=, attempt=, resumed_from=, started=, ended=)`.
        process_group: The workers of this trainer.
        make_engine: Makes the engine, which computes steps and scores.

    Raises:
        TrainerBrokenError: This process can train no more lanes.
        StoreFullError: The disk has been full for `store_full_timeout_seconds`. All leases were given back.
            Ranks other than 0 raise a WorkerError in its place.
    """
    notify = source.notify if source is not None else log.warning
    on_batch = source.note_progress if source is not None else lambda: None
    engine = make_engine(load_base_model, store.calibration, store.data, process_group, on_batch)
    schedule = CheckpointSchedule(settings.min_checkpoint_seconds, settings.max_checkpoint_seconds)
    full_timeout = settings.store_full_timeout_seconds
    recorder = LaneRecorder(store, engine, provenance, full_timeout, notify, schedule, settings.adapters)
    slots = LaneSlots(settings.max_lanes, settings.spill_seconds, settings.is_measured)
    poll_interval = PollInterval(settings.poll_seconds)
    active = ActiveLanes(source, engine, recorder, process_group, slots, poll_interval)
    try:
        _run_until_idle(active, settings)
    except BaseException as error:
        if classify_error(error) is Fault.DEVICE:
            reason = f"the device is lost to this process: {error}"
            raise TrainerBrokenError(reason, BrokenKind.DEVICE_LOST) from error
        if isinstance(error, StoreFullError):  # on rank 0
            for lane in active.lanes.values():
                active.return_lease(lane.lease)
        engine.detach_adapters()
        raise
    finally:
        recorder.close()
    engine.detach_adapters()


def _run_until_idle(active: ActiveLanes, settings: LoopSettings) -> None:
    """Run rounds until the source is closed, or no lane has been held for `idle_seconds`."""
    recovery = FailureRecovery(active)
    leasing = LaneLeasing(active, recovery)
    rounds = TrainingRounds(active, recovery, active.recorder.checkpoint_schedule)
    while True:
        leasing.lease_lanes()
        if active.lanes:
            rounds.run()
        elif leasing.closed or rounds.is_idle_for(settings.idle_seconds):
            return
        else:
            time.sleep(settings.poll_seconds)
