"""The settings of a session and of its trainers: the study's options, and what is known once it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.study.options import DEFAULT_LANES_PER_TRAINER, StudyOptions
from orchestrator.util import timeouts

if TYPE_CHECKING:
    from orchestrator.execution.progress import Progress, RunBudget
    from orchestrator.execution.ray_cluster import Cluster
    from orchestrator.record.schema import LaneProgress, Record
    from orchestrator.record.store import Store


def shared_options(options: StudyOptions) -> StudyOptions:
    """Return the options that Ray sends to trainers, without those of the experiment and the tracking URI.

    An experiment defines its options in a subclass. Ray would send a subclass of the script `__main__` as
    code, which a worker cannot always load. The URI may contain a password, and Ray's dashboard shows the
    settings of a trainer.
    """
    names = [each.name for each in fields(StudyOptions) if each.name != "tracking_uri"]
    return StudyOptions(**{name: getattr(options, name) for name in names})


@dataclass(frozen=True)
class TrainerSettings:
    """The settings that all trainers of a study share. Ray sends them to each worker."""

    options: StudyOptions
    """The study's options, see `shared_options`."""
    max_lanes: int
    """The largest number of lanes of a trainer."""
    gpus_per_worker: float
    """The GPUs that Ray reserves for a worker: --gpus-per-worker, or what the cluster has."""
    store: Path
    """Folder of the store, which has the same path on every node."""
    scratch: Path
    """Folder in the store for Ray's own files. It exists as long as the session."""
    train_loop: str = "orchestrator.finetune.engine.loop:run"
    """The function that each worker runs, "module:function"; benchmarks replace it."""

    @property
    def uses_gpus(self) -> bool:
        """True if the workers compute on the GPUs that they reserve."""
        return self.gpus_per_worker > 0 and self.options.device != "cpu"

    @property
    def automatic_lanes(self) -> bool:
        """Whether each trainer decides how many lanes it trains at once; see `engine.leasing.LaneSlots`."""
        return self.uses_gpus and self.options.lanes_per_trainer is None

    @property
    def expected_lanes(self) -> int:
        """The number of lanes to expect of a trainer before it has chosen one."""
        return min(self.max_lanes, DEFAULT_LANES_PER_TRAINER) if self.automatic_lanes else self.max_lanes

    @property
    def start_timeout(self) -> float:
        """Seconds that a study waits for a trainer while it has none."""
        return self.options.trainer_timeout or timeouts.TRAINER_TIMEOUT_SECONDS

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """The resources that Ray reserves for a worker."""
        return {"CPU": 1, "GPU": self.gpus_per_worker} if self.gpus_per_worker else {"CPU": 1}


@dataclass(frozen=True)
class Session:
    """The settings, storage and observers of one run of Ray Tune and its trainers."""

    settings: TrainerSettings
    """The settings of the trainers."""
    num_trainers: int
    """The number of trainers to start with."""
    cluster: Cluster
    store: Store
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

    @property
    def scheduler(self) -> str:
        """The study's early stopping, or "none"."""
        return self.settings.options.scheduler

    @property
    def is_elastic(self) -> bool:
        """True if the number of trainers follows the cluster's nodes, starting from `num_trainers`."""
        return self.settings.options.trainers is None
