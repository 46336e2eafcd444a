"""The settings, storage and observers that all parts of a session share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.execution.progress import Progress
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.run_budget import RunBudget
from orchestrator.execution.trainers.pool import PoolConfig
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store


@dataclass(frozen=True)
class SessionContext:
    """The settings, storage and observers of one session."""

    scheduler: str
    """The study's early stopping, or "none"."""
    cluster: Cluster
    pool: PoolConfig
    store: Store
    scratch: Path
    """Folder in the store for Ray's own files. It exists as long as the session."""
    progress: Progress
    budget: RunBudget
    """The limits of the run. When one is reached, trainers save their lanes and the session ends."""
    on_record: Callable[[Record], None] = lambda record: None
    """Called with each new record, from another thread."""
    on_progress: Callable[[LaneProgress], None] = lambda progress: None
    """Called with the start and each new report of every lane, from another thread."""
    cached: set[str] = field(default_factory=set)
    """Fingerprints with known results, which are replayed to the scheduler. A search adds fingerprints."""
    tune_per_seed: bool = False
    """True if each seed is a separate tuning, so that early stopping compares only lanes of the same seed."""
