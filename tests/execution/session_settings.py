"""A session without Ray, for tests of the rules that read its settings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.execution.progress import Progress, RunBudget
from orchestrator.execution.ray_cluster import Cluster
from orchestrator.execution.settings import Session, TrainerSettings
from orchestrator.record.store import Store
from orchestrator.study.options import StudyOptions

NO_NODES = Cluster(())


def make_session(
    num_trainers: int,
    max_lanes: int,
    gpus: float = 0,
    *,
    cluster: Cluster = NO_NODES,
    elastic: bool = False,
    automatic_lanes: bool = False,
    scheduler: str = "none",
    **more: Any,
) -> Session:
    """Return a session of trainers with one worker each.

    Args:
        num_trainers: The number of trainers.
        max_lanes: The largest number of lanes of each.
        gpus: GPUs of each worker.
        cluster: The nodes.
        elastic: Whether the number of trainers follows the nodes.
        automatic_lanes: Whether trainers on GPUs choose their number of lanes.
        scheduler: The early stopping.
        more: Further fields of the session.
    """
    lanes = None if automatic_lanes else max_lanes
    trainers = None if elastic else num_trainers
    options = StudyOptions(trainers=trainers, lanes_per_trainer=lanes, scheduler=scheduler)
    settings = TrainerSettings(options, max_lanes, gpus, Path("store"), Path("scratch"))
    progress = Progress(Path(), 0, 0, Console(file=io.StringIO()))
    return Session(settings, num_trainers, cluster, Store(Path("store")), progress, RunBudget(), **more)
