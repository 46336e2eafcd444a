"""Check whether every node has the same versions: a result must not depend on the node that computed it."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    shorten_list,
)

CHECK_NAME = "versions"


def check_versions(
    driver_versions: Mapping[str, str], versions_by_node: Mapping[str, Mapping[str, str]]
) -> CheckResult:
    """Compare each node's versions with the driver's.

    Args:
        driver_versions: Package -> version on this machine.
        versions_by_node: Node address -> package -> version.
    """
    wrong = []
    for node, node_versions in versions_by_node.items():
        for package in sorted({*driver_versions, *node_versions}):
            expected, actual = driver_versions.get(package, "none"), node_versions.get(package, "none")
            if expected != actual:
                wrong.append(f"{package} on {node} is {actual}, here {expected}")
    if wrong:
        return failed_result(
            CHECK_NAME,
            f"{shorten_list(wrong, '; ')}: all must be equal; install this package there with "
            "constraints.txt as here, then restart Ray on that node",
        )
    versions = ", ".join(f"{package} {version}" for package, version in driver_versions.items())
    return ok_result(CHECK_NAME, f"{versions} on {format_node_count(len(versions_by_node))}")
