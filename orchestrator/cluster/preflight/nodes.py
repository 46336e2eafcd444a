"""Checks of all nodes at once: versions, storage, disks, clocks, access to model and data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.cluster.preflight import availability, clock, disk, shared_storage, versions
from orchestrator.cluster.preflight.check_result import CheckResult
from orchestrator.cluster.preflight.node_agent import NodeAgents, start_node_agents
from orchestrator.cluster.preflight.node_info import NodeInfo, node_versions
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.configuration import Configuration, ModelChoice, TaskChoice
from orchestrator.util.errors import UsageError


def check_nodes(agents: NodeAgents, node_infos: dict[str, NodeInfo], store: Path) -> Iterator[CheckResult]:
    """Yield one result per check, and a last one if nodes do not respond.

    Args:
        agents: One agent per node.
        node_infos: Node address -> what the node has reported.
        store: The store's folder.
    """
    yield versions.check_versions(node_versions(), {name: info.versions for name, info in node_infos.items()})
    yield _check_storage(agents, store)
    yield disk.check_free_space(store, shutil.disk_usage(store).free, node_infos)
    yield clock.check_clocks(agents.sample_clocks())
    yield from agents.check_responses()


def check_node_access(
    agents: NodeAgents, model: ModelChoice | None, task: TaskChoice | None, bases: Path
) -> CheckResult:
    """Check that every node can read model and data.

    Args:
        agents: One agent per node.
        model: The base model; None skips it.
        task: The data; None skips it.
        bases: The store's folder of base models.
    """
    return availability.check_availability(
        agents.call("unavailable_reason", lambda name: (model, task, bases))
    )


def _check_storage(agents: NodeAgents, store: Path) -> CheckResult:
    """Let every node write a file into the store, then look from everywhere for everyone's files."""
    with shared_storage.create_check_folder(store) as folder:
        file_names = {name: f"node-{number}" for number, name in enumerate(agents.actors)}
        write_results = agents.call("write_node_file", lambda name: (folder, file_names[name]))
        writable = [name for name, result in write_results.items() if result.wrote_file]
        nodes_by_file = {file_names[name]: name for name in writable}
        missing_files = {"this machine": shared_storage.missing_files(folder, list(nodes_by_file))}
        missing_files |= agents.call(
            "missing_files", lambda name: (folder, list(nodes_by_file) if name in writable else [])
        )
    missing_by_reader = {
        reader: [nodes_by_file[file] for file in files] for reader, files in missing_files.items()
    }
    return shared_storage.check_storage(store, write_results, missing_by_reader)


def require_usable_cluster(
    cluster: Cluster, store: Path, bases: Path, configurations: Sequence[Configuration]
) -> None:
    """Refuse to start a study on several machines that cannot run it. Does nothing on a single machine.

    Args:
        cluster: The nodes that are running.
        store: The store's folder.
        bases: The store's folder of base models.
        configurations: The configurations to train; all have the same model and task.

    Raises:
        UsageError: A check has failed. The message has one line per failure.
    """
    if cluster.local or len({node.address for node in cluster.nodes}) < 2:
        return
    with start_node_agents(cluster.nodes) as agents:
        results = [*check_nodes(agents, agents.call("node_info"), store)]
        if configurations:
            results.append(check_node_access(agents, configurations[0].model, configurations[0].task, bases))
    failures = [result for result in results if result.failed]
    if failures:
        raise UsageError("\n".join(f"{result.name}: {result.text}" for result in failures))
