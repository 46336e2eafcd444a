"""The Ray that a study runs on: joined where there is one, else started here and ended with the study."""

from __future__ import annotations

import logging
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

import orchestrator
from orchestrator.execution.ray import auth_token, cleanup, private
from orchestrator.util.errors import StudyError, UsageError, format_error
from orchestrator.util.graceful_interrupts import exit_on_interrupt

TRAINER_MEMORY_BYTES = (
    2 * 2**30
)  # bytes; a trainer's worker and controller hold about 1 GiB with a small model
LOCAL_RAY_IN_USE = (  # two Rays on one machine can end each other's Train runs
    "another study runs its own Ray on this machine; wait for it, or let both join one (ray start --head)."
)
LOCAL_RAY_ENVIRONMENT = {
    # In spite of its name, Ray reads this variable on Linux as well. With 0 the node's address is 127.0.0.1
    # and Ray's processes listen there only. Otherwise they listen on all addresses of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # no port for Prometheus that nobody has asked for
}
"""Environment variables of a Ray that is started here, which serves this machine only."""
MAX_ADDRESS_LENGTH = 300  # as many as a host name and a port may have
CONNECT_ATTEMPTS = 3  # of a second each, to reach a cluster
START_ATTEMPTS = (
    2  # Ray 2.60 gives a start 30 s, which cannot be changed; a machine with other work may need more
)
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large goes through it: models and data lie on storage


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float
    memory: float
    """Bytes that Ray may promise."""
    id: str = ""
    address: str = ""


@dataclass(frozen=True)
class Cluster:
    nodes: tuple[Node, ...]
    namespace: str = ""
    local: bool = True
    """Started here, for this study. Others may grow."""
    gcs_address: str = ""
    """Address of its GCS, HOST:PORT."""

    @property
    def memory(self) -> float:
        return sum(node.memory for node in self.nodes)

    def plan_trainers(
        self, requested: int | None, gpus_per_worker: float | None, workers_per_trainer: int = 1
    ) -> tuple[int, float]:
        """Trainers, and GPUs a worker: what was asked for, else all there is room for. A trainer's workers
        need not be on one node. Of a cluster that was there before, more than there is room for may be asked:
        the rest waits for nodes, and so does the one trainer that there is at least. Raises BadInput for more
        than a local one has."""
        all_gpus = sum(node.gpus for node in self.nodes)
        gpus = gpus_per_worker if gpus_per_worker is not None else float(all_gpus > 0)
        units = self._worker_capacity(gpus)
        trainer_capacity = units // workers_per_trainer
        if self.local and (trainer_capacity < 1 or (requested or 0) > trainer_capacity):
            if gpus:
                needs, there = f"{gpus:g} GPU and a CPU", f"{all_gpus:g} GPUs"
            else:
                needs, there = "a CPU and 2 GiB", f"{self.memory / 2**30:.0f} GiB"
            asked = [f"--trainers {requested}"] if requested else []
            asked += [f"--workers-per-trainer {workers_per_trainer}"] if workers_per_trainer > 1 else []
            if trainer_capacity:
                advice = f"take --trainers {trainer_capacity}"
            elif units:
                advice = f"take --workers-per-trainer {units}"
            else:
                advice = "leave --gpus-per-worker out, or join a cluster with GPUs"
            times = f"{workers_per_trainer} times " if workers_per_trainer > 1 else ""
            raise UsageError(
                f"{' '.join(asked) or f'--gpus-per-worker {gpus:g}'}: there is room for {trainer_capacity} trainers (each "
                f"takes {times}{needs}; there are "
                f"{sum(node.cpus for node in self.nodes):g} CPUs, {there}); {advice}."
            )
        return requested or max(1, trainer_capacity), gpus

    def trainer_capacity(self, gpus_per_worker: float, workers_per_trainer: int) -> int:
        """How many trainers fit, were nothing else here."""
        return self._worker_capacity(gpus_per_worker) // workers_per_trainer

    def _worker_capacity(self, gpus_per_worker: float) -> int:
        """Workers that fit."""
        if not gpus_per_worker:
            return sum(min(int(n.cpus), max(1, int(n.memory / TRAINER_MEMORY_BYTES))) for n in self.nodes)
        each = int(1 / gpus_per_worker + 1e-9)  # a worker's share of a GPU lies on one GPU
        return sum(min(int(n.cpus), int(n.gpus) * each) for n in self.nodes)


def estimate_local_cluster() -> Cluster:
    """What a Ray that is started here would have, about; starts nothing."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))
    memory = 0.7 * psutil.virtual_memory().available
    return Cluster((Node(len(os.sched_getaffinity(0)), gpus, memory),))


def gpu_name(proc: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Of this machine's GPUs, as torch names it; empty when the driver does not say, or they differ."""
    names = set()
    for file in proc.glob("*/information"):
        with suppress(OSError):
            found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
            names.add(found[1] if found else "")
    return names.pop() if len(names) == 1 else ""


def running_cluster_address() -> str | None:
    """Return the address of the running cluster that a study would join.

    It is RAY_ADDRESS, else the address in the file that `ray start` writes to the temporary folder, where
    something answers at that address.

    Raises:
        BadInput: the file belongs neither to this user nor to root. Any user can write to that folder.
    """
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    word = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")
    with suppress(OSError, ValueError), open(word, opener=_open_untrusted) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return None
        found, owner = file.read(MAX_ADDRESS_LENGTH).strip(), status.st_uid
        host, _, port = found.rpartition(":")
        # Connecting sends nothing; it alone tells the cluster of another user from a file that one has left.
        if found and is_listening(host, int(port)):
            if owner not in (0, os.getuid()):
                raise UsageError(
                    f"{word} announces a Ray cluster of another user (user id {owner}), which is joined on "
                    f"request only; set RAY_ADDRESS={found} to join it, or TMPDIR to a folder of your own to "
                    "start Ray here."
                )
            return found
    return None


def _open_untrusted(path: str, flags: int) -> int:
    """Open a file that another user may have planted: follow no link, and do not wait for a pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


@contextmanager
def connect(before_exit: Callable[[], object] = lambda: None) -> Iterator[Cluster]:
    """Join or start Ray; on leaving, what the study made is gone.

    Args:
        last: called when Ctrl-C ends the process meanwhile: no exception comes out of Ray's start then.

    Raises:
        BadInput: the cluster cannot be joined, or its workers would import another copy of this code.
        Trouble: Ray does not start here.
    """
    _refuse_other_source_tree()
    cluster_address = running_cluster_address()
    if cluster_address is None:
        cleanup.state_folder().mkdir(mode=0o700, exist_ok=True)  # `folder` then checks whose it is
    with (
        exclusive_lock(cleanup.state_folder() / "lock", LOCAL_RAY_IN_USE)
        if cluster_address is None
        else nullcontext()
    ):
        cleanup.end_orphaned_rays()
        yield from _connect(cluster_address, before_exit)


def _connect(cluster_address: str | None, before_exit: Callable[[], object]) -> Iterator[Cluster]:
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # silences a warning about later versions
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no call may start Ray implicitly
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # files nobody reads
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # a study is resumed from its records
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours
    auth_token.restrict_token_file(create_if_missing=cluster_address is None)
    if cluster_address is None:
        for name, value in LOCAL_RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    with exit_on_interrupt(before_exit):  # an exception may strike imports, too
        import ray

    namespace = f"study-{uuid.uuid4().hex[:12]}"
    init_arguments: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    processes_before = cleanup.child_processes()
    if cluster_address is None:
        with exit_on_interrupt(before_exit):
            _start_local_ray(init_arguments, processes_before)
    else:
        host, _, port = cluster_address.rpartition(":")
        # Ray itself tries for minutes, even where nothing is.
        plain = port.isdigit() and "/" not in host
        if plain and not any(is_listening(host, int(port)) for _ in range(CONNECT_ATTEMPTS)):
            raise _join_error(cluster_address, "nothing answers there")
        try:
            with exit_on_interrupt(before_exit):
                ray.init(address=cluster_address, **init_arguments)
        except (ConnectionError, RuntimeError) as error:
            raise _join_error(cluster_address, str(error).splitlines()[0]) from None
    with cleanup.cleanup_guard(processes_before) if cluster_address is None else nullcontext():
        try:
            store = ray.get_runtime_context().gcs_address
            yield Cluster(
                usable_nodes(), namespace=namespace, local=cluster_address is None, gcs_address=store
            )
        finally:
            ray.shutdown()


def _start_local_ray(init_arguments: Mapping[str, Any], processes_before: Collection[psutil.Process]) -> None:
    """Start Ray here, once more where it did not answer in time.

    Args:
        quiet: arguments of `ray.init`.
        before: processes below this one that are not Ray's.

    Raises:
        Trouble: no start has been answered in time.
    """
    import ray

    for _ in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **init_arguments,
            )
            return
        except Exception as error:  # Ray 2.60 raises bare Exceptions here
            if "timed out" not in str(error).lower():
                raise
            said = format_error(error)
            cleanup.kill_new_children(processes_before)
    raise StudyError(
        f"Ray did not start within its 30 s, {START_ATTEMPTS} times ({said}); the load of this machine is "
        f"{os.getloadavg()[0]:.0f}: run the command again when other work is done."
    )


def _refuse_other_source_tree() -> None:
    """Raise BadInput in a folder with another copy of this code: Ray's workers import from there first."""
    here, source_folder = Path.cwd(), Path(orchestrator.__file__).resolve().parent.parent
    for package in ("orchestrator", "variants"):
        if here != source_folder and (here / package / "__init__.py").is_file():
            raise UsageError(
                f"{here} has another {package!r} than {source_folder}, which runs this command, and Ray's workers "
                "would import that one; run the command in another folder, or the one of that copy."
            )


def _join_error(cluster_address: str, reason: str) -> UsageError:
    return UsageError(
        f"RAY_ADDRESS {cluster_address!r} cannot be joined ({reason}); start that cluster, or unset RAY_ADDRESS to start "
        "Ray here."
    )


@contextmanager
def exclusive_lock(file: Path, refusal: str) -> Iterator[None]:
    """Hold a lock that goes with the process, however it ends. Raises BadInput when another holds it."""
    lock = FileLock(file, timeout=5)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(refusal) from None
    try:
        yield
    finally:
        lock.release()


def is_listening(host: str, port: int) -> bool:
    """Whether something answers there, within a second."""
    import socket

    with suppress(OSError, OverflowError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def usable_nodes() -> tuple[Node, ...]:
    """Those of the joined Ray that can take a trainer: alive, and not about to go."""
    import ray

    draining_ids = private.draining_node_ids()
    return tuple(
        Node(has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0), node["NodeID"], address)
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining_ids
        for has, address in [(node["Resources"], node["NodeManagerAddress"])]
    )


def driver_node_affinity() -> Any:
    """Where an actor goes that must not die with another node. Not softly: Ray 2.60 then puts actors that ask
    for nothing on any node. They end with the driver in any case."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
