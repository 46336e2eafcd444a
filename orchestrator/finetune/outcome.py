"""What becomes of a lane: its record, and what the loop needs of the store that keeps it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from orchestrator.finetune.lane import Lane
from orchestrator.finetune.workshop import Workshop
from orchestrator.record.schema import Provenance, Record, State

FINAL = ("finished", "diverged")


class Keeper(Protocol):
    """What the loop needs of the store."""

    checkpoints: Path
    adapters: Path
    evidence: Path

    def put(self, record: Record) -> bool: ...

    def get(self, fingerprint: str) -> Record | None: ...


def record_of(
    lane: Lane,
    state: State,
    workshop: Workshop,
    provenance: Callable[..., Provenance],
    workers: int = 1,
    reason: str = "",
    trace: str = "",
) -> Record:
    """`provenance` as in `loop.run`."""
    return Record(
        fingerprint=lane.name,
        configuration=lane.configuration,
        state=state,
        steps=lane.step,
        reason=reason,
        traceback=trace,
        curve=tuple(lane.curve),
        evaluations=tuple(lane.evaluations),
        untrained=workshop.current.data.untrained if workshop.is_open else {},
        items=lane.items,
        cost=lane.cost,
        provenance=provenance(
            workshop.device,
            pack_lanes=lane.pack_lanes,
            workers=workers,
            attempt=lane.lease.attempt,
            resumed_from=lane.resumed_from,
            started=lane.started,
            ended=time.time(),
        ),
        scheduler=lane.lease.scheduler if state == "stopped" else "",
        stopped_at=lane.told if state == "stopped" else None,
    )
