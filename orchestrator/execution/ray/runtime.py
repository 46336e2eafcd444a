"""The Ray that a study runs on: an existing cluster that it joins, or a local Ray that it starts and ends."""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

import orchestrator
from orchestrator.execution.ray import cleanup, private
from orchestrator.util.errors import StudyError, UsageError, format_error
from orchestrator.util.graceful_interrupts import exit_on_interrupt

TRAINER_MEMORY_BYTES = 2 * 2**30
"""Memory to plan for a worker on CPUs; it and its Train controller use about 1 GiB with a small model."""
CONTROLLER_BYTES = 256 * 2**20
"""Memory of a trainer's Train controller on the driver's node; 247 MiB were measured on Linux x86-64."""
CONTROLLERS_SHARE = 0.5
"""The part of Ray's memory on the driver's node that controllers may take; trials take the rest."""
LOCAL_RAY_IN_USE = (  # two Rays on one machine can end each other's Train runs
    "another study runs its own Ray on this machine; wait for it, or let both join one (ray start --head)."
)
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about later versions
    "RAY_ENABLE_AUTO_CONNECT": "0",  # no call may start Ray implicitly
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # these loggers write files that nobody reads
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # a study is resumed from its records
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver has its own handler of Ctrl-C
}
"""Environment variables of every study, unless the user has set them. Ray and Tune read them on import."""
LOCAL_RAY_ENVIRONMENT = {
    # In spite of the name, Ray reads this variable on Linux as well. With 0 the node's address is 127.0.0.1,
    # and Ray's processes listen only there. Otherwise they listen on all addresses of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # no port for Prometheus that nobody has asked for
}
"""Further variables for a Ray that is started here, which serves this machine only."""
_ADDRESS = re.compile(r"auto|local|[a-z]+://\S+|[^/\s]+:\d{1,5}")
MAX_ADDRESS_LENGTH = 300
"""Length of the longest host name with a port."""
CONNECT_ATTEMPTS = 3
"""Attempts of one second each to reach a cluster."""
START_ATTEMPTS = 2
"""Attempts to start Ray. Ray 2.60 gives each 30 s, which cannot be changed; a busy machine may need more."""
OBJECT_STORE_BYTES = 200 * 2**20
"""Size of Ray's object store, which holds nothing large: models and data are files."""


@dataclass(frozen=True)
class Node:
    """The resources of one node."""

    cpus: float
    gpus: float
    memory: float
    """Bytes that Ray may reserve."""
    id: str = ""
    address: str = ""


@dataclass(frozen=True)
class Cluster:
    """The nodes of a Ray, and how to reach it."""

    nodes: tuple[Node, ...]
    namespace: str = ""
    """The Ray namespace of the study."""
    local: bool = True
    """True if the study has started this Ray; a joined cluster may grow."""

    @property
    def memory(self) -> float:
        """Bytes that Ray may reserve on all nodes."""
        return sum(node.memory for node in self.nodes)

    def plan_trainers(
        self, requested: int | None, gpus_per_worker: float | None, workers_per_trainer: int = 1
    ) -> tuple[int, float]:
        """Return the number of trainers and the GPUs per worker: as requested, or as many as fit.

        The workers of a trainer may lie on several nodes. On a joined cluster, trainers without a place wait
        for nodes, so any number may be requested, and there is at least one.

        Args:
            requested: Number of trainers; None for as many as fit.
            gpus_per_worker: GPUs of each worker; None for 1 if a node has GPUs, else 0.
            workers_per_trainer: Workers of each trainer.

        Raises:
            UsageError: A local Ray has no room for the requested trainers, or for one.
        """
        all_gpus = sum(node.gpus for node in self.nodes)
        gpus = gpus_per_worker if gpus_per_worker is not None else float(all_gpus > 0)
        num_workers = self._worker_capacity(gpus)
        capacity = num_workers // workers_per_trainer
        if self.local and (capacity < 1 or (requested or 0) > capacity):
            if gpus:
                needs, available = f"{gpus:g} GPU and a CPU", f"{all_gpus:g} GPUs"
            else:
                needs, available = "a CPU and 2 GiB", f"{self.memory / 2**30:.0f} GiB"
            options = [f"--trainers {requested}"] if requested else []
            options += [f"--workers-per-trainer {workers_per_trainer}"] if workers_per_trainer > 1 else []
            if capacity:
                advice = f"take --trainers {capacity}"
            elif num_workers:
                advice = f"take --workers-per-trainer {num_workers}"
            else:
                advice = "leave --gpus-per-worker out, or join a cluster with GPUs"
            times = f"{workers_per_trainer} times " if workers_per_trainer > 1 else ""
            num_cpus = sum(node.cpus for node in self.nodes)
            raise UsageError(
                f"{' '.join(options) or f'--gpus-per-worker {gpus:g}'}: there is room for {capacity} "
                f"trainers (each takes {times}{needs}; there are {num_cpus:g} CPUs, {available}); {advice}."
            )
        return requested or max(1, capacity), gpus

    def trainer_capacity(self, gpus_per_worker: float, workers_per_trainer: int) -> int:
        """Return how many trainers fit on the nodes if nothing else runs there."""
        return self._worker_capacity(gpus_per_worker) // workers_per_trainer

    def _worker_capacity(self, gpus_per_worker: float) -> int:
        if not gpus_per_worker:
            return sum(min(int(n.cpus), max(1, int(n.memory / TRAINER_MEMORY_BYTES))) for n in self.nodes)
        each = int(1 / gpus_per_worker + 1e-9)  # a worker cannot use parts of two GPUs
        return sum(min(int(n.cpus), int(n.gpus) * each) for n in self.nodes)


def driver_node_gib(num_trainers: int) -> float:
    """Return the memory in GiB that Ray must have on the driver's node for a number of trainers."""
    return num_trainers * CONTROLLER_BYTES / CONTROLLERS_SHARE / 2**30


def estimate_local_cluster() -> Cluster:
    """Estimate the resources of a Ray that would be started here, without starting it."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))
    memory = 0.7 * psutil.virtual_memory().available
    return Cluster((Node(len(os.sched_getaffinity(0)), gpus, memory),))


def names_mig_slice(environment: Mapping[str, str]) -> bool:
    """Return whether the variables that choose GPUs name a slice of a Multi-Instance GPU."""
    chosen = (environment.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"))
    return any("MIG-" in devices for devices in chosen)


def gpu_name(proc: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return the name of this machine's GPUs as torch gives it; empty if it is unknown or they differ.

    A MIG slice has a share of its card's memory and speed, so its name differs from the card's. Its size is
    not known here.
    """
    names = set()
    for file in proc.glob("*/information"):
        with suppress(OSError):
            found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
            names.add(found[1] if found else "")
    is_slice = names_mig_slice(os.environ) or any(proc.parent.glob("capabilities/gpu*/mig/gi*"))
    return names.pop() + (" MIG" if is_slice else "") if len(names) == 1 else ""


def running_cluster_address() -> str | None:
    """Return the address of the running cluster that a study would join.

    The address is RAY_ADDRESS or, without RAY_ADDRESS, the one in the file that `ray start` writes to the
    temporary folder, provided that a process listens at that address.

    Raises:
        UsageError: RAY_ADDRESS is no address, or the file belongs neither to this user nor to root. Any user
            can write to that folder.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        if not _ADDRESS.fullmatch(address):
            rule = "must be HOST:PORT, for example 10.0.0.1:6379"
            raise UsageError(f"RAY_ADDRESS {address!r}: {rule}; correct it, or unset it to start Ray here.")
        return address
    file_path = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")
    with suppress(OSError, ValueError), open(file_path, opener=_open_untrusted) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return None
        found, owner = file.read(MAX_ADDRESS_LENGTH).strip(), status.st_uid
        host, _, port = found.rpartition(":")
        # A connection, over which nothing is sent, distinguishes a running cluster from a left-over file.
        if found and is_listening(host, int(port)):
            if owner not in (0, os.getuid()):
                raise UsageError(
                    f"{file_path} announces a Ray cluster of another user (user id {owner}), which is "
                    f"joined on request only; set RAY_ADDRESS={found} to join it, or TMPDIR to a folder of "
                    "your own to start Ray here."
                )
            return found
    return None


def _open_untrusted(path: str, flags: int) -> int:
    """Open a file that another user may have planted: follow no link, and do not wait for a pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def check_start() -> None:
    """Check that a study can join the running cluster, or that Ray can start here, without doing so.

    Raises:
        UsageError: Nothing answers at the cluster's address, or Ray cannot use the temporary folder.
    """
    address = running_cluster_address()
    if address is not None:
        host, _, port = address.rpartition(":")
        # Ray itself would retry for minutes, even if nothing listens at the address.
        is_plain = port.isdigit() and "/" not in host
        if is_plain and not any(is_listening(host, int(port)) for _ in range(CONNECT_ATTEMPTS)):
            raise _unreachable_error(address, "nothing answers there")
    else:
        cleanup.check_temporary_folder()


def _unreachable_error(address: str, reason: str) -> UsageError:
    fix = "start that cluster, or unset RAY_ADDRESS to start Ray here"
    return UsageError(f"RAY_ADDRESS {address!r} cannot be joined ({reason}); {fix}.")


@contextmanager
def connect(before_exit: Callable[[], object] = lambda: None) -> Iterator[Cluster]:
    """Join or start Ray. On exit, end the Ray that was started.

    Args:
        before_exit: Called when Ctrl-C ends the process during Ray's start, without an exception.

    Yields:
        The cluster.

    Raises:
        UsageError: The cluster cannot be joined, its workers would import another copy of this code, or
            another study runs its own Ray on this machine.
        StudyError: Ray does not start here.
    """
    _refuse_other_source_tree()
    check_start()
    cluster_address = running_cluster_address()
    lock: AbstractContextManager[None] = nullcontext()
    if cluster_address is None:
        cleanup.state_folder().mkdir(mode=0o700, exist_ok=True)  # `state_folder` then checks its owner
        lock = exclusive_lock(cleanup.state_folder() / "lock", LOCAL_RAY_IN_USE)
    with lock:
        cleanup.end_orphaned_rays()
        yield from _connect(cluster_address, before_exit)


def _connect(cluster_address: str | None, before_exit: Callable[[], object]) -> Iterator[Cluster]:
    is_local = cluster_address is None
    _restrict_token_file(is_local)
    variables = RAY_ENVIRONMENT | (LOCAL_RAY_ENVIRONMENT if is_local else {})
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    with exit_on_interrupt(before_exit):  # an exception could interrupt an import
        import ray

    namespace = f"study-{uuid.uuid4().hex[:12]}"
    options = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    processes_before = cleanup.child_processes()
    with exit_on_interrupt(before_exit):
        if cluster_address is None:
            _start_local_ray(options, processes_before)
        else:
            _join_ray(cluster_address, options)
    with cleanup.cleanup_guard(processes_before) if is_local else nullcontext():
        try:
            yield Cluster(usable_nodes(), namespace, is_local)
        finally:
            ray.shutdown()


def _restrict_token_file(create_if_missing: bool) -> None:
    """Let only the user read the file of Ray's token. Ray would create it with permissions by the umask.

    The umask is not changed, because Ray's workers would inherit it for their files, such as records. If this
    function cannot write the file, Ray creates it.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        path = Path.home() / ".ray" / "auth_token"
        is_disabled = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
        if create_if_missing and not is_disabled and not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.touch(mode=0o600)
            draft.write_text(secrets.token_hex(32))
            draft.rename(path)
        path.chmod(path.stat().st_mode & 0o700)


def _join_ray(cluster_address: str, options: Mapping[str, Any]) -> None:
    """Connect this process to a running Ray cluster.

    Args:
        cluster_address: HOST:PORT of the cluster's control store, or another address that `ray.init` takes.
        options: Further arguments of `ray.init`.

    Raises:
        UsageError: The cluster cannot be joined.
    """
    import ray

    try:
        ray.init(address=cluster_address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable_error(cluster_address, str(error).splitlines()[0]) from None


def _start_local_ray(options: Mapping[str, Any], processes_before: Collection[psutil.Process]) -> None:
    """Start a local Ray, with a second attempt after a time-out.

    Args:
        options: Further arguments of `ray.init`.
        processes_before: Descendants of this process that are not Ray's.

    Raises:
        StudyError: All attempts timed out.
    """
    import ray

    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    for _ in range(START_ATTEMPTS):
        try:
            with private.without_monitors():
                ray.init(address="local", **local, **options)
            return
        except Exception as error:  # Ray 2.60 raises bare Exceptions here
            if "timed out" not in str(error).lower():
                raise
            message = format_error(error)
            cleanup.kill_new_children(processes_before)
    raise StudyError(
        f"Ray did not start within its 30 s, {START_ATTEMPTS} times ({message}); the load of this machine is "
        f"{os.getloadavg()[0]:.0f}; run the command again when the machine is less busy."
    )


def _refuse_other_source_tree() -> None:
    """Refuse a working folder with another copy of this code, which Ray's workers would import.

    Raises:
        UsageError: There is another copy.
    """
    here, source_folder = Path.cwd(), Path(orchestrator.__file__).resolve().parent.parent
    for package in ("orchestrator", "variants"):
        if here != source_folder and (here / package / "__init__.py").is_file():
            raise UsageError(
                f"{here} has another {package!r} than {source_folder}, which runs this command, and Ray's "
                "workers would import the wrong copy; run the command in another folder, or run that copy."
            )


@contextmanager
def exclusive_lock(file: Path, refusal: str) -> Iterator[None]:
    """Hold a file lock, which the system releases when this process ends.

    Raises:
        UsageError: Another process holds the lock; `refusal` is the message.
    """
    try:
        lock = FileLock(file, timeout=5).acquire()
    except Timeout:
        raise UsageError(refusal) from None
    with lock:
        yield


def is_listening(host: str, port: int) -> bool:
    """Return whether a TCP connection succeeds within a second."""
    import socket

    with suppress(OSError, OverflowError, UnicodeError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def usable_nodes() -> tuple[Node, ...]:
    """Return the nodes of the joined Ray that can take a trainer: alive and not draining."""
    import ray

    draining_ids = private.draining_node_ids()
    return tuple(
        Node(has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0), node["NodeID"], address)
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining_ids
        for has, address in [(node["Resources"], node["NodeManagerAddress"])]
    )


def driver_node_affinity() -> Any:
    """Return the scheduling strategy that places an actor on the driver's node.

    Worker nodes may be lost; the study cannot outlive the driver's node. The strategy is not soft, because
    with a soft strategy Ray 2.60 would place actors without resources on any node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
