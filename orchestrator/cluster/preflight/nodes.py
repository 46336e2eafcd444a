"""What can be seen of all nodes at once, quickly: versions, storage, clocks, disks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.cluster.preflight import availability, clock, disk, shared_storage, versions
from orchestrator.cluster.preflight.check_result import Finding
from orchestrator.cluster.preflight.node_agent import Witnesses, witnesses
from orchestrator.cluster.preflight.node_info import Facts
from orchestrator.cluster.preflight.node_info import versions as versions_here
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import BadInput


def look(there: Witnesses, facts: dict[str, Facts], store: Path) -> Iterator[Finding]:
    """One line each; a last one about nodes that do not answer. `facts`: what nodes said of themselves."""
    yield versions.judge(versions_here(), {name: one.versions for name, one in facts.items()})
    yield _storage(there, store)
    yield disk.judge(store, shutil.disk_usage(store).free, facts)
    yield clock.judge(there.ticks())
    yield from there.lost()


def _storage(there: Witnesses, store: Path) -> Finding:
    with shared_storage.folder_in(store) as folder:
        numbers = {name: f"node-{number}" for number, name in enumerate(there.actors)}
        wrote = there.ask("write", lambda name: (str(folder), numbers[name]))
        good = [name for name, one in wrote.items() if not (one.unseen or one.refused)]
        names = {numbers[name]: name for name in good}
        unseen = {"this machine": shared_storage.absent(folder, list(names))}
        told = there.ask("absent", lambda name: (str(folder), list(names) if name in good else []))
        unseen |= told
    return shared_storage.judge(
        store, wrote, {who: [names[n] for n in whose] for who, whose in unseen.items()}
    )


def refuse_unfit(cluster: Cluster, store: Path, bases: Path, wanted: Sequence[Configuration]) -> None:
    """The first step of a study on several machines: raises BadInput when they are not fit for what is
    `wanted`, with a line for each reason. Without the probe of memory: a seat that finds too little takes
    fewer lanes."""
    if cluster.local or len({node.address for node in cluster.nodes}) < 2:
        return
    with witnesses(cluster.nodes) as there:
        found = [*look(there, there.ask("facts"), store)]
        if wanted:  # all of a study have the same model and task
            asked = wanted[0].model, wanted[0].task, str(bases)
            found.append(availability.judge(there.ask("reach", lambda name: asked)))
    wrong = [one for one in found if one.failed]
    if wrong:
        raise BadInput("\n".join(f"{one.name}: {one.text}" for one in wrong))
