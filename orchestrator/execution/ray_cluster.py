"""The Ray that a study runs on: an existing cluster that it joins, or a local Ray that it starts and ends.

If a driver is killed, Linux kills the raylet and the control store of its local Ray with their parent. The
workers end within seconds, and a trainer's worker ends Ray's agents (`exit_with_raylet`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

import orchestrator
from orchestrator.execution import private_ray as private
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError, format_error, quote_value
from orchestrator.util.redaction import redact_secrets

TRAINER_MEMORY_BYTES = 2 * 2**30
"""Memory to plan for a worker on CPUs; it and its Train controller use about 1 GiB with a small model."""
LOCAL_RAY_IN_USE = (  # each would use the whole machine
    "another study runs its own Ray on this machine; wait for it, or let both join one (ray start --head)."
)
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of Ray 2.60; without it, older ones warn
    "RAY_ENABLE_AUTO_CONNECT": "0",  # no call may start Ray implicitly
    "RAY_TRAIN_V2_ENABLED": "1",  # the default since Ray 2.51
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
    "RAY_AUTH_MODE": "token",  # the default since Ray 2.60
    "RAY_enable_metrics_collection": "0",  # no port for Prometheus that nobody has asked for
}
"""Further variables for a Ray that is started here, which serves this machine only."""
_ADDRESS = re.compile(r"auto|local|[a-z]+://\S+|[^/\s]+:\d{1,5}")
MAX_ADDRESS_LENGTH = 300
"""More than the longest host name with a port."""
MAX_MESSAGE_LENGTH = 300
START_ATTEMPTS = 2
"""Attempts to start Ray. Ray 2.60 gives each 30 s, which cannot be changed; a busy machine may need more."""
OBJECT_STORE_BYTES = 200 * 2**20
"""Size of Ray's object store, which holds nothing large: models and data are files."""
MAX_FOLDER_BYTES = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Length of the longest temporary folder: on Linux, the path of a socket has at most 107 bytes."""


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
            need = f"{gpus:g} GPU and a CPU" if gpus else "a CPU and 2 GiB"
            cpus, memory = sum(node.cpus for node in self.nodes), self.memory / 2**30
            fitting = max(1, num_workers // (requested or 1))
            fix = f"take --trainers {capacity}" if capacity else f"take --workers-per-trainer {fitting}"
            if not num_workers:
                fix = "leave --gpus-per-worker out, or join a cluster with GPUs"
            raise UsageError(
                f"--trainers {requested or 1}: no room for {requested or 1} x {workers_per_trainer} workers "
                f"with {need} each ({cpus:g} CPUs, {all_gpus:g} GPUs, {memory:.0f} GiB in all); {fix}."
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


def estimate_local_cluster() -> Cluster:
    """Estimate the resources of a Ray that would be started here, without starting it."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))
    memory = 0.7 * psutil.virtual_memory().available
    return Cluster((Node(len(os.sched_getaffinity(0)), gpus, memory),))


def adapt_to_cluster(
    options: StudyOptions, cluster: Cluster, configurations: Iterable[Configuration]
) -> StudyOptions:
    """Return the options for a joined cluster that has no GPU now: a GPU study waits long for a GPU node.

    A study is a GPU study if it has a base model in bfloat16 or 4 bits that is not one of the project's own
    small models, or if its trainers shall reserve GPUs.
    """
    if cluster.local or any(node.gpus for node in cluster.nodes):
        return options
    if options.gpus_per_worker is None and options.device != "cpu":
        from orchestrator.finetune.models.catalogue import built_in_names  # imports all tasks

        own = built_in_names()
        models = [configuration.model for configuration in configurations]
        if any(model.dtype != "float32" and model.name not in own for model in models):
            options = replace(options, gpus_per_worker=1.0)
    if options.gpus_per_worker and options.trainer_timeout is None:
        options = replace(options, trainer_timeout=timeouts.NODE_START_SECONDS)
    return options


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
        found = file.read(MAX_ADDRESS_LENGTH).strip()
        host, _, port = found.rpartition(":")
        # A connection, over which nothing is sent, distinguishes a running cluster from a left-over file.
        if found and is_listening(host, int(port)):
            if status.st_uid not in (0, os.getuid()):
                raise UsageError(
                    f"{file_path} announces a Ray cluster of another user (user id {status.st_uid}), which "
                    f"is joined on request only; set RAY_ADDRESS={found} to join it, or TMPDIR to a folder "
                    "of your own to start Ray here."
                )
            return found
    return None


def _open_untrusted(path: str, flags: int) -> int:
    """Open a file that another user may have planted: follow no link, and do not wait for a pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def check_start() -> None:
    """Check that a study can join the running cluster, or that Ray can start here, without doing so.

    Raises:
        UsageError: Nothing answers at the cluster's address, Ray cannot use the temporary folder, or the user
            has chosen the first version of Ray Train.
    """
    version = "RAY_TRAIN_V2_ENABLED"
    if os.environ.get(version, "1").lower() not in ("1", "true"):
        raise UsageError(f"{version} {os.environ[version]!r}: trainers need Ray Train V2; unset {version}.")
    address = running_cluster_address()
    if address is None:
        _check_temporary_folder()
        return
    host, _, port = address.rpartition(":")
    # Ray itself would retry for minutes, even if nothing listens at the address.
    if port.isdigit() and "/" not in host and not is_listening(host, int(port)):
        raise _unreachable_error(address, "nothing answers there")


def _check_temporary_folder() -> None:
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), "")
    folder = os.environ.get(name, "")
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UsageError(f"{name} {folder!r}: is no folder that can be written; make it, or unset {name}.")
    if len(os.fsencode(folder)) > MAX_FOLDER_BYTES:
        raise UsageError(
            f"{name} {quote_value(folder)}: must have at most {MAX_FOLDER_BYTES} bytes, or the paths of "
            f"Ray's sockets are too long; unset {name}, or take a shorter one."
        )


def _unreachable_error(address: str, reason: str) -> UsageError:
    fix = "start that cluster, or unset RAY_ADDRESS to start Ray here"
    return UsageError(f"RAY_ADDRESS {address!r} cannot be joined ({reason}); {fix}.")


@contextmanager
def connect() -> Iterator[Cluster]:
    """Join or start Ray. On exit, end the Ray that was started.

    Yields:
        The cluster.

    Raises:
        UsageError: The cluster cannot be joined, its workers would import another copy of this code, or
            another study runs its own Ray on this machine.
        StudyError: Ray does not start here.
        KeyboardInterrupt: A signal has ended the start.
    """
    _refuse_other_source_tree()
    check_start()
    address = running_cluster_address()
    lock_file = Path(tempfile.gettempdir(), f"lora-orchestrator-{os.getuid()}.lock")
    with nullcontext() if address else exclusive_lock(lock_file, LOCAL_RAY_IN_USE):
        _restrict_token_file(create_if_missing=address is None)
        variables = RAY_ENVIRONMENT | (LOCAL_RAY_ENVIRONMENT if address is None else {})
        os.environ |= variables | os.environ
        import ray

        namespace = f"study-{uuid.uuid4().hex[:12]}"
        options = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
        before = _descendants(psutil.Process())
        try:
            if address is None:
                _start_local_ray(options, before)
            else:
                _join_ray(address, options)
        except SystemExit:  # from Ray's own handler of SIGTERM
            raise KeyboardInterrupt from None
        processes = _descendants(psutil.Process()) - before
        try:
            yield Cluster(usable_nodes(), namespace, address is None)
        finally:
            processes |= _descendants(*processes)
            try:
                ray.shutdown()
            finally:
                _kill(processes)  # those that hang


def _restrict_token_file(create_if_missing: bool) -> None:
    """Let only the user read the file of Ray's token. Ray would create it with permissions by the umask.

    The umask is not changed, because Ray's workers would inherit it for their files, such as records. If this
    function cannot write the file, Ray creates it.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        path = Path.home() / ".ray" / "auth_token"
        is_disabled = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
        is_missing = not path.exists() or not path.stat().st_size
        if create_if_missing and not is_disabled and is_missing:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        path.chmod(path.stat().st_mode & 0o700)


def _join_ray(address: str, options: Mapping[str, Any]) -> None:
    """Connect this process to a running Ray cluster.

    Raises:
        UsageError: The cluster cannot be joined.
    """
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable_error(address, str(error).splitlines()[0]) from None


def _start_local_ray(options: Mapping[str, Any], others: Set[psutil.Process]) -> None:
    """Start a local Ray, with a second attempt after a time-out.

    Args:
        options: Further arguments of `ray.init`.
        others: The descendants of this process that are not Ray's.

    Raises:
        StudyError: All attempts timed out.
    """
    import ray

    for _ in range(START_ATTEMPTS):
        try:
            with private.without_dashboard():
                ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
            return
        except BaseException as error:  # Ray 2.60 raises bare Exceptions here
            _kill(_descendants(psutil.Process()) - others)
            if "timed out" not in str(error).lower():
                raise
            message = format_error(error)
    raise StudyError(
        f"Ray did not start within its 30 s, {START_ATTEMPTS} times ({message}); the load of this machine is "
        f"{os.getloadavg()[0]:.0f}; run the command again when the machine is less busy."
    )


def _descendants(*processes: psutil.Process) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return found


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def exit_with_raylet() -> None:
    """End this worker, and the agents of its raylet, when the raylet has died.

    The raylet dies with a killed driver. Ray then ends a computing worker only half a minute later, and the
    raylet's agents after a minute, in which they try to tell the control store, which has died as well.
    """
    raylet, agents = os.getppid(), list[psutil.Process]()
    with suppress(psutil.Error):  # it may have died already
        agents = [p for p in psutil.Process(raylet).children() if "agent" in str(p.cmdline()).lower()]
    while os.getppid() == raylet:
        time.sleep(timeouts.RAYLET_POLL_SECONDS)
    _kill(agents)
    os._exit(1)


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
    """Return whether a TCP connection succeeds within three seconds."""
    import socket

    with suppress(OSError, OverflowError, UnicodeError), socket.create_connection((host, port), timeout=3):
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


def format_ray_error(error: BaseException) -> str:
    """Return the last non-empty line of an error's message, without secrets.

    Ray puts the message of the original error at the end of the wrapping ones. The name of the error's type
    is returned if there is no message.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact_secrets(lines[-1])[:MAX_MESSAGE_LENGTH] if lines else type(error).__name__
