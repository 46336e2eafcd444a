"""Whether every node runs the same: a result must not depend on the node that it came from."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.cluster.preflight.check_result import Finding, failed, listed, ok
from orchestrator.cluster.preflight.check_result import nodes as count

NAME = "versions"


def judge(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> Finding:
    """`here`: the driver's versions by package; `nodes`: those of each node, by its address."""
    wrong = []
    for node, theirs in nodes.items():
        for package in sorted({*here, *theirs}):
            mine, other = here.get(package, "none"), theirs.get(package, "none")
            if mine != other:
                wrong.append(f"{package} on {node} is {other}, here {mine}")
    if wrong:
        return failed(
            NAME,
            f"{listed(wrong, '; ')}: all must be equal; install this package there with constraints.txt "
            "as here, then start Ray on that node again",
        )
    return ok(NAME, f"{', '.join(f'{k} {v}' for k, v in here.items())} on {count(len(nodes))}")
