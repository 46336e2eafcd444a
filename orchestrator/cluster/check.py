"""Checks of all nodes, for `lora-orchestrator check` and for the start of a study.

A check returns its line of output, or raises `UsageError` with value, rule and remedy.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.execution import ray_cluster
from orchestrator.execution.ray_cluster import Cluster, format_ray_error
from orchestrator.record import schema
from orchestrator.record.store import Store
from orchestrator.util import atomic_files, timeouts
from orchestrator.util.errors import UsageError, describe_disk_error
from variants.catalogue import source_digest

T = TypeVar("T")
MAX_LISTED = 3
"""Largest number of items that a line names. It only counts the others."""
_SOURCES = (Path(__file__).parents[1], Path(__file__).parents[2] / "variants")
_MAY_DIFFER = "cuda_driver"  # a head without a GPU has no driver
_DRIVER_FILE = "driver"


def check_machines(
    store_folder: Path, trainers: int | None, gpus_per_worker: float | None, workers_per_trainer: int
) -> bool:
    """Print one line for each check of the machines. Trains nothing and leaves no files.

    Joins the running cluster. Without one, checks this machine and starts no Ray.

    Args:
        store_folder: The store of the study.
        trainers: Number of trainers; None for as many as fit.
        gpus_per_worker: GPUs of each worker; None for the default of a study.
        workers_per_trainer: Workers of each trainer.

    Returns:
        True if all checks have passed.

    Raises:
        UsageError: The cluster cannot be joined.
    """
    request = trainers, gpus_per_worker, workers_per_trainer
    with atomic_files.remove_created_folders(store_folder):
        if not report("store", lambda: f"{Store(store_folder).root} can be written"):
            return False
        if ray_cluster.running_cluster_address() is None:
            return report("nodes", lambda: check_capacity(ray_cluster.estimate_local_cluster(), *request))
        with ray_cluster.connect() as cluster:
            # A list, so that every check runs even if another has failed.
            return all(
                [
                    report("nodes", lambda: check_capacity(cluster, *request)),
                    report("versions", lambda: check_versions(cluster)),
                    report("storage", lambda: check_storage(cluster, store_folder)),
                ]
            )


def report(name: str, check: Callable[[], str]) -> bool:
    """Run a check and print its line. Return whether it has passed."""
    try:
        status, text = "ok", check()
    except (UsageError, OSError) as error:
        status, text = "FAILED", describe_disk_error(error) or str(error)
    print(f"{status:7} {name:9} {text}", flush=True)
    return status == "ok"


def require_usable_cluster(cluster: Cluster, store: Path) -> None:
    """Refuse to start a study on several machines that differ or do not share the store.

    Args:
        cluster: The nodes that are running.
        store: The store's folder.

    Raises:
        UsageError: A check has failed. The message has one line per failure.
    """
    if cluster.local or len({node.address for node in cluster.nodes}) < 2:
        return
    failures = []
    for check in (lambda: check_versions(cluster), lambda: check_storage(cluster, store)):
        try:
            check()
        except UsageError as error:
            failures.append(str(error))
    if failures:
        raise UsageError("\n".join(failures))


def check_capacity(
    cluster: Cluster, trainers: int | None, gpus_per_worker: float | None, workers_per_trainer: int
) -> str:
    """Return the nodes, and for how many of the wanted trainers they have room; a joined cluster may grow.

    Args:
        cluster: The nodes that are running.
        trainers: Number of trainers; None for as many as fit.
        gpus_per_worker: GPUs of each worker; None for 1 if a node has GPUs.
        workers_per_trainer: Workers of each trainer.

    Raises:
        UsageError: This machine, which has no Ray yet, has no room.
    """
    wanted, gpus = cluster.plan_trainers(trainers, gpus_per_worker, workers_per_trainer)
    room = cluster.trainer_capacity(gpus, workers_per_trainer)
    cpus, all_gpus = (sum(getattr(node, name) for node in cluster.nodes) for name in ("cpus", "gpus"))
    where = "this machine" if cluster.local else _nodes(len(cluster.nodes))
    found = f"{where}, {cpus:g} CPUs, {all_gpus:g} GPUs: room for {room} of {max(room, wanted)} trainers"
    return found if room >= wanted else f"{found}; the others wait for nodes to join"


def node_versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes: package -> version.

    torch's build (+cpu, +cu128) is left out, because a head without a GPU may have another one.
    """
    versions = dict(schema.package_versions())
    versions.pop(_MAY_DIFFER, None)
    versions["torch"] = versions.get("torch", "none").partition("+")[0]
    return versions | {"code": "-".join(source_digest(folder)[:8] for folder in _SOURCES)}


def check_versions(cluster: Cluster) -> str:
    """Check that every node has this machine's versions and sources. No result may depend on the node."""
    return compare_versions(node_versions(), call_on_nodes(cluster, node_versions))


def compare_versions(here: Mapping[str, str], there: Mapping[str, Mapping[str, str]]) -> str:
    """Check that the versions of the nodes (node -> package -> version) are those of this machine."""
    wrong = [
        f"{package} on {node} is {versions.get(package, 'none')}, here {here.get(package, 'none')}"
        for node, versions in there.items()
        for package in sorted({*here, *versions})
        if here.get(package) != versions.get(package)
    ]
    if wrong:
        raise UsageError(
            f"{_shorten(wrong, '; ')}: all must be equal; install this package there with constraints.txt as "
            "here, then restart Ray on that node"
        )
    same = ", ".join(f"{package} {version}" for package, version in here.items())
    return f"{same} on {_nodes(len(there))}"


def check_storage(cluster: Cluster, store: Path) -> str:
    """Check that every node can write a file into the store, and that all nodes and the driver see it."""
    folder = store / f".check-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        atomic_files.write_atomically(folder / _DRIVER_FILE, _DRIVER_FILE.encode())
        faults = call_on_nodes(cluster, write_node_file, lambda node: (folder, node))
        writers = [node for node, fault in faults.items() if not fault]
        unseen = {"this machine": missing_files(folder, writers)}
        unseen |= call_on_nodes(cluster, missing_files, lambda node: (folder, writers), nodes=writers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failures = [f"{node} {fault}" for node, fault in faults.items() if fault]
    failures += [
        f"{reader} does not see what {_shorten(files)} wrote" for reader, files in unseen.items() if files
    ]
    if failures:
        raise UsageError(
            f"{store}: {_shorten(failures, '; ')}; every node must read and write the same folder, with "
            "renames and hard links: mount a shared file system (NFS, EFS, Lustre) there, or change --output"
        )
    return f"{store}: read and written from {_nodes(len(faults))}, renames and hard links work"


def write_node_file(folder: Path, name: str) -> str:
    """Find the driver's file, then write a file and link it as a record is linked. Runs on a node.

    Args:
        folder: The folder that the driver has created.
        name: Name of the file to write.

    Returns:
        The fault as a phrase that follows the node's name; empty if there is none.
    """
    if missing_files(folder, [_DRIVER_FILE]):
        return "does not see it"
    try:
        atomic_files.write_atomically(folder / name, name.encode())
        atomic_files.link_if_absent(folder / name, folder / f"{name}.link")
    except OSError as error:
        return f"cannot write and link files in it ({error.strerror or error})"
    return ""


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Wait for files whose content is their name. Return the names of those that do not appear in time.

    Files are opened by name, as records are, because listings of a network file system may be out of date.
    """
    deadline = time.monotonic() + timeouts.STORAGE_VISIBILITY_SECONDS
    while True:
        missing = [name for name in names if not _has_content(folder / name, name)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def _has_content(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def call_on_nodes(
    cluster: Cluster,
    function: Callable[..., T],
    arguments: Callable[[str], tuple[Any, ...]] = lambda node: (),
    nodes: Iterable[str] | None = None,
) -> dict[str, T]:
    """Call a function on nodes at the same time, in a task that requests no CPU.

    Args:
        cluster: The nodes. A node's name is its address, with its id if another node has the same address.
        function: The function, from a module that the nodes can import.
        arguments: Function of a node's name that returns the arguments of its call.
        nodes: Names of the nodes to call; None for all.

    Returns:
        Name of a node -> result. Nodes that have left the cluster meanwhile are left out.

    Raises:
        UsageError: A node that Ray counts as alive does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    named: dict[str, str] = {}
    for node in cluster.nodes:
        named[f"{node.address}-{node.id[:8]}" if node.address in named else node.address] = node.id
    # On a busy machine a process may die while it starts, although the node is sound. Ray retries once.
    task = ray.remote(num_cpus=0, max_retries=1)(function)
    refs = {}
    for name in named if nodes is None else nodes:
        place = NodeAffinitySchedulingStrategy(named[name], soft=False)
        refs[name] = task.options(scheduling_strategy=place).remote(*arguments(name))
    deadline = time.monotonic() + timeouts.NODE_RESPONSE_SECONDS
    answers, silent = {}, {}
    for name, ref in refs.items():
        try:
            answers[name] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except TimeoutError:
            silent[name] = f"no answer in {timeouts.NODE_RESPONSE_SECONDS:g} s"
        except Exception as error:  # any type: a missing package there, a dead node
            silent[name] = format_ray_error(error)
    alive = {node.id for node in ray_cluster.usable_nodes()} if silent else set()
    if faults := [f"{name} ({reason})" for name, reason in silent.items() if named[name] in alive]:
        raise UsageError(
            f"this package does not run on {_shorten(faults)}; install it there as here, and read Ray's logs "
            "on that node"
        )
    return answers


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def _shorten(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return separator.join(items[:MAX_LISTED]) + more
