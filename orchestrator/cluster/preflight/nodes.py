"""Checks of all nodes at once: versions, storage, disks, clocks, access to model and data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.cluster.preflight import availability, shared_storage
from orchestrator.cluster.preflight.check_result import format_node_count, shorten_list
from orchestrator.cluster.preflight.node_agent import NodeAgents, start_node_agents
from orchestrator.cluster.preflight.node_info import GpuState, NodeInfo, collect_node_info, node_versions
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import Configuration, ModelChoice, TaskChoice
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

GIB = 2**30
MIN_FREE_BYTES = GIB
"""Enough for some checkpoints of small adapters and a day of Ray's logs."""
CLOCK_SAMPLES_PER_NODE = 3
"""Readings per node. The one with the smallest proven offset counts."""


def node_checks(agents: NodeAgents, infos: dict[str, NodeInfo], store: Path) -> dict[str, Callable[[], str]]:
    """Return the checks of all nodes by the names of their lines.

    Args:
        agents: One agent per node.
        infos: Node address -> description of the node.
        store: The store's folder.
    """
    return {
        "versions": lambda: check_versions(
            node_versions(), {name: info.versions for name, info in infos.items()}
        ),
        "storage": lambda: shared_storage.check_storage(agents, store),
        "disk": lambda: check_free_space(store, shutil.disk_usage(store).free, infos),
        "clock": lambda: check_clocks(sample_clocks(agents)),
        "answers": agents.check_responses,
    }


def check_versions(
    driver_versions: Mapping[str, str], versions_by_node: Mapping[str, Mapping[str, str]]
) -> str:
    """Check that every node has the driver's versions: a result must not depend on the node.

    Args:
        driver_versions: Package -> version on this machine.
        versions_by_node: Node address -> package -> version.
    """
    wrong = []
    for node, versions in versions_by_node.items():
        for package in sorted({*driver_versions, *versions}):
            expected, actual = driver_versions.get(package, "none"), versions.get(package, "none")
            if expected != actual:
                wrong.append(f"{package} on {node} is {actual}, here {expected}")
    if wrong:
        raise UsageError(
            f"{shorten_list(wrong, '; ')}: all must be equal; install this package there with "
            "constraints.txt as here, then restart Ray on that node"
        )
    same = ", ".join(f"{package} {version}" for package, version in driver_versions.items())
    return f"{same} on {format_node_count(len(versions_by_node))}"


def check_free_space(store: Path, store_free_bytes: int, infos: Mapping[str, NodeInfo]) -> str:
    """Check the free space of the store's disk and, on each node, of the disk that Ray uses.

    Args:
        store: The store's folder.
        store_free_bytes: Free bytes on its disk.
        infos: Node address -> description of the node.
    """
    disks = [(str(store), store_free_bytes)]
    disks += [(f"{info.temporary_folder} on {node}", info.free_bytes) for node, info in infos.items()]
    full = [f"{disk} has {free / GIB:.1f} GiB free" for disk, free in disks if free < MIN_FREE_BYTES]
    if full:
        raise UsageError(f"{shorten_list(full)}: at least {MIN_FREE_BYTES / GIB:g} GiB; delete files there")
    smallest = min(free for _, free in disks)
    return (
        f"{store_free_bytes / GIB:.0f} GiB free for the store, {smallest / GIB:.0f} GiB or more on every disk"
    )


def check_drivers(states: Mapping[str, GpuState | None]) -> str:
    """Check that torch can use the GPUs of every node that has an NVIDIA driver.

    Args:
        states: Node address -> result of `look_for_gpus` on the node.

    Returns:
        The text of the check's line; empty if no node has a driver.

    Raises:
        UsageError: torch cannot use a node's GPUs.
    """
    found = {node: state for node, state in states.items() if state is not None}
    failures = [f"{state.versions} on {node}: {state.fault}" for node, state in found.items() if state.fault]
    if failures:
        raise UsageError(
            f"torch cannot use the GPUs: {shorten_list(failures, '; ')}; install a newer driver there, or a "
            "build of torch for its CUDA on all nodes (docs/cluster.md)"
        )
    if not found:
        return ""
    versions = sorted({state.versions for state in found.values()})
    return f"{'; '.join(versions)} on {format_node_count(len(found))}"


@dataclass(frozen=True)
class ClockSample:
    """One reading of a node's clock. All times are seconds since the epoch."""

    sent_at: float
    """Time of this machine when the node was asked."""
    node_time: float
    """Time of the node."""
    received_at: float
    """Time of this machine when the answer arrived."""

    @property
    def min_offset(self) -> float:
        """The smallest offset of the node's clock, in seconds, that explains the reading.

        A correct clock is read between question and answer, so any time in between gives 0.
        """
        if self.node_time < self.sent_at:
            return self.node_time - self.sent_at
        return max(0.0, self.node_time - self.received_at)


def sample_clocks(agents: NodeAgents) -> dict[str, list[ClockSample]]:
    """Return the readings of each node's clock. The nodes are read in turn, so that no answer waits."""
    samples: dict[str, list[ClockSample]] = {name: [] for name in agents.actors}
    for name in [*samples] * CLOCK_SAMPLES_PER_NODE:
        sent_at = time.time()
        for node_time in agents.call(time.time, names=[name]).values():
            samples[name].append(ClockSample(sent_at, node_time, time.time()))
    return samples


def check_clocks(samples: Mapping[str, Sequence[ClockSample]]) -> str:
    """Check that no clock is off by more than `MAX_CLOCK_OFFSET_SECONDS`: node address -> readings.

    Records and checkpoints of several nodes are ordered by their times.
    """
    offsets = {
        node: min((sample.min_offset for sample in readings), key=abs)
        for node, readings in samples.items()
        if readings
    }
    limit = timeouts.MAX_CLOCK_OFFSET_SECONDS
    if wrong := [f"{node} by {offset:+.1f} s" for node, offset in offsets.items() if abs(offset) > limit]:
        raise UsageError(
            f"clocks differ from this machine's: {shorten_list(wrong)}; at most {limit:g} s are allowed; "
            "start chrony (or ntpd) on every node"
        )
    return f"within {limit:g} s of this machine's on {format_node_count(len(offsets))}"


def check_node_access(agents: NodeAgents, model: ModelChoice | None, task: TaskChoice, bases: Path) -> str:
    """Check that every node can read model and data.

    Args:
        agents: One agent per node.
        model: The base model; None skips it.
        task: The data.
        bases: The store's folder of base models.
    """
    entry = tasks.get(task.name).entry() if task.content else None
    return availability.check_availability(
        agents.call(availability.unavailable_reason, lambda name: (model, task, bases, entry))
    )


def _check_access_to_all(agents: NodeAgents, configurations: Sequence[Configuration], bases: Path) -> str:
    """Check that every node can read the models and the data of all configurations."""
    needed = {(c.model.name, c.task.name): c for c in configurations}.values()
    return "; ".join(check_node_access(agents, each.model, each.task, bases) for each in needed)


def require_usable_cluster(
    cluster: Cluster, store: Path, bases: Path, configurations: Sequence[Configuration]
) -> None:
    """Refuse to start a study on several machines that cannot run it. Does nothing on a single machine.

    Args:
        cluster: The nodes that are running.
        store: The store's folder.
        bases: The store's folder of base models.
        configurations: The configurations to train.

    Raises:
        UsageError: A check has failed. The message has one line per failure.
    """
    if cluster.local or len({node.address for node in cluster.nodes}) < 2:
        return
    failures = []
    with start_node_agents(cluster.nodes) as agents:
        checks = node_checks(agents, agents.call(collect_node_info), store)
        if configurations:
            checks["reach"] = partial(_check_access_to_all, agents, configurations, bases)
        for name, check in checks.items():
            try:
                check()
            except UsageError as error:
                failures.append(f"{name}: {error}")
    if failures:
        raise UsageError("\n".join(failures))
