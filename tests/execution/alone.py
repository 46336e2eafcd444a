"""Training of configurations in this process, without Ray, for the records of an undisturbed study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from orchestrator.execution.settings import TrainerSettings
from orchestrator.execution.trainer_worker import load_base_model
from orchestrator.finetune.engine import loop
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.finetune.engine.leasing import LaneSlots
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.schema import Record, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from variants.testing.rig import one_thread

LANES = 4
COUNTED_TASK = Path(__file__).with_name("counted_task.py")


class _Queue:
    """A lane source that leases each configuration once."""

    def __init__(self, configurations: Iterable[Configuration]) -> None:
        self.waiting = [Lease(configuration, 1) for configuration in configurations]

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        group_key = group_key or next((lease.configuration.group_key for lease in self.waiting), None)
        given = [lease for lease in self.waiting if lease.configuration.group_key == group_key][:capacity]
        self.waiting = [lease for lease in self.waiting if lease not in given]
        return LeaseGrant(tuple(given), closed=not self.waiting)

    def report(self, report: Report) -> Directive:
        return Directive.CONTINUE

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        return {}

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        raise AssertionError(f"{fingerprint[:12]} was given back")

    def notify(self, line: str) -> None:
        raise AssertionError(line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Do nothing: the lanes are those of the list."""

    def note_progress(self) -> None:
        pass

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        pass


def train(configurations: Iterable[Configuration], bases: Path, folder: Path) -> dict[str, Record]:
    """Return the records of `configurations`, by fingerprint.

    Args:
        configurations: Configurations to train on the CPU as a trainer does.
        bases: Folder of the base models.
        folder: Folder in which a store is created.
    """
    tasks.load(str(COUNTED_TASK))  # the new store has no entry of it
    store, settings = Store(folder), TrainerSettings(StudyOptions(), LANES, 0.0, folder, folder)
    with one_thread():
        loop.run(
            _Queue(configurations),
            store,
            partial(load_base_model, settings, bases, torch.device("cpu")),
            LaneSlots(LANES),
        )
    return {record.fingerprint: record for record in store.records()}
