"""What can be seen of all nodes at once, quickly: versions, storage, clocks, disks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.cluster.preflight import availability, clock, disk, shared_storage, versions
from orchestrator.cluster.preflight.check_result import CheckResult
from orchestrator.cluster.preflight.node_agent import NodeAgents, start_node_agents
from orchestrator.cluster.preflight.node_info import NodeInfo
from orchestrator.cluster.preflight.node_info import node_versions as versions_here
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError


def check_nodes(agents: NodeAgents, node_infos: dict[str, NodeInfo], store: Path) -> Iterator[CheckResult]:
    """One line each; a last one about nodes that do not answer. `facts`: what nodes said of themselves."""
    yield versions.check_versions(versions_here(), {name: one.versions for name, one in node_infos.items()})
    yield _check_storage(agents, store)
    yield disk.check_free_space(store, shutil.disk_usage(store).free, node_infos)
    yield clock.check_clocks(agents.sample_clocks())
    yield from agents.check_responses()


def _check_storage(agents: NodeAgents, store: Path) -> CheckResult:
    with shared_storage.create_check_folder(store) as folder:
        file_names = {name: f"node-{number}" for number, name in enumerate(agents.actors)}
        write_results = agents.call("write_node_file", lambda name: (str(folder), file_names[name]))
        writable = [name for name, one in write_results.items() if not (one.is_driver_file_missing or one.write_error)]
        nodes_by_file = {file_names[name]: name for name in writable}
        missing_by_reader = {"this machine": shared_storage.missing_files(folder, list(nodes_by_file))}
        missing_on_nodes = agents.call(
            "missing_files", lambda name: (str(folder), list(nodes_by_file) if name in writable else [])
        )
        missing_by_reader |= missing_on_nodes
    return shared_storage.check_storage(
        store,
        write_results,
        {who: [nodes_by_file[n] for n in whose] for who, whose in missing_by_reader.items()},
    )


def require_usable_cluster(
    cluster: Cluster, store: Path, bases: Path, configurations: Sequence[Configuration]
) -> None:
    """The first step of a study on several machines: raises BadInput when they are not fit for what is
    `wanted`, with a line for each reason. Without the probe of memory: a seat that finds too little takes
    fewer lanes."""
    if cluster.local or len({node.address for node in cluster.nodes}) < 2:
        return
    with start_node_agents(cluster.nodes) as agents:
        results = [*check_nodes(agents, agents.call("node_info"), store)]
        if configurations:  # all of a study have the same model and task
            arguments = configurations[0].model, configurations[0].task, str(bases)
            results.append(availability.check_availability(agents.call("unavailable_reason", lambda name: arguments)))
    wrong = [one for one in results if one.failed]
    if wrong:
        raise UsageError("\n".join(f"{one.name}: {one.text}" for one in wrong))
