"""Whether every node runs the same: a result must not depend on the node that it came from."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result, shorten_list
from orchestrator.cluster.preflight.check_result import format_node_count as count

CHECK_NAME = "versions"


def check_versions(
    driver_versions: Mapping[str, str], versions_by_node: Mapping[str, Mapping[str, str]]
) -> CheckResult:
    """`here`: the driver's versions by package; `nodes`: those of each node, by its address."""
    wrong = []
    for node, node_versions in versions_by_node.items():
        for package in sorted({*driver_versions, *node_versions}):
            expected, actual = driver_versions.get(package, "none"), node_versions.get(package, "none")
            if expected != actual:
                wrong.append(f"{package} on {node} is {actual}, here {expected}")
    if wrong:
        return failed_result(
            CHECK_NAME,
            f"{shorten_list(wrong, '; ')}: all must be equal; install this package there with constraints.txt "
            "as here, then start Ray on that node again",
        )
    return ok_result(
        CHECK_NAME,
        f"{', '.join(f'{k} {v}' for k, v in driver_versions.items())} on {count(len(versions_by_node))}",
    )
