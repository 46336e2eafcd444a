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
from pathlib import Path

from orchestrator.finetune.engine.active_lanes import ActiveLanes
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane_source import LaneSource
from orchestrator.finetune.engine.leasing import LaneLeasing
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
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from orchestrator.util import timeouts

log = logging.getLogger(__name__)

BaseModelLoader = Callable[[ModelChoice, Task], BaseModel]
EngineFactory = Callable[[BaseModelLoader, Path, Path, ProcessGroup, Callable[[], None]], Engine]
"""Called with the loader, the folders of calibrations and of prepared data, the process group, and a function
that the engine calls to show progress, for instance after every batch of an evaluation or calibration."""


def run(
    source: LaneSource | None,
    store: Store,
    load_base_model: BaseModelLoader,
    slots: LaneSlots,
    *,
    adapters: Path | None = None,
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
        slots: How many lanes train at once.
        adapters: The folder in which the adapters of finished lanes are kept; None to keep none.
        process_group: The workers of this trainer.
        make_engine: Makes the engine, which computes steps and scores.

    Raises:
        TrainerBrokenError: This process can train no more lanes.
        StoreFullError: The disk has been full for STORE_FULL_SECONDS. All leases were given back.
            Ranks other than 0 raise a WorkerError in its place.
    """
    notify = source.notify if source is not None else log.warning
    on_batch = source.note_progress if source is not None else lambda: None
    engine = make_engine(load_base_model, store.calibration, store.data, process_group, on_batch)
    recorder = LaneRecorder(store, engine, notify, adapters)
    active = ActiveLanes(source, engine, recorder, process_group, slots)
    try:
        _run_until_idle(active)
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


def _run_until_idle(active: ActiveLanes) -> None:
    """Run rounds until the source is closed, or no lane has been held for IDLE_TRAINER_SECONDS."""
    recovery = FailureRecovery(active)
    leasing = LaneLeasing(active, recovery)
    rounds = TrainingRounds(active, recovery)
    while True:
        leasing.lease_lanes()
        if active.lanes:
            rounds.run()
        elif leasing.closed or rounds.is_idle():
            return
        else:
            time.sleep(timeouts.SOURCE_POLL_SECONDS)
