"""`check` takes the name and the options of an experiment, and checks what that experiment would train."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, Run

from orchestrator.cluster.preflight.check import PreflightCheck
from orchestrator.execution.ray import runtime


@pytest.fixture(autouse=True)
def without_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of nodes, which start Ray; see tests/cluster/preflight."""
    monkeypatch.setattr(runtime, "running_cluster_address", lambda: None)
    monkeypatch.setattr(PreflightCheck, "check_cluster", lambda self, configurations: "")


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("--dry-run --widen 0", ["letters"]),
        ("study --dry-run --rates-per-decade 4", ["letters"]),
        ("tuned --dry-run --replicates 3 --margin 0.02", ["letters", "digits"]),
        ("tuned", ["chain_sum"]),
        ("tuned --config tuned.yaml", ["letters", "digits"]),
        ("sensitivity --dry-run --factors alpha --levels 1", ["letters"]),
        ("study --dry-run --scheduler median", ["letters"]),
    ],
)
def test_the_default_tasks_and_the_options_of_the_experiment_are_checked(
    words: str, data: list[str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tuned.yaml").write_text("dry_run: true\nreplicates: 3\n")
    done = run(ORCHESTRATOR, "check", *words.split())
    assert done.stderr == ""
    lines = [line.split(None, 2) for line in done.stdout.splitlines()]
    found = [text for _, name, text in lines if name == "data"]
    assert all(task in text for task, text in zip(data, found, strict=True)), found
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.yaml"}, "nothing is left"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tuend", ["check 'tuend'", "Did you mean 'tuned'?"]),
        ("published", ["check 'published'", "study"]),
        ("--replicates 3", ["'--replicates' is no option here", "check --help"]),
        ("tuned --replicates 1", ["--replicates 1: must be 2 or more"]),
        ("sensitivity --levels 9", ["--levels 9"]),
        ("study --config tuned.yaml", ["tuned.yaml, line 1", "'replicates' is no option here"]),
    ],
)
def test_wrong_experiments_and_options_are_refused(
    words: str, expected: list[str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tuned.yaml").write_text("replicates: 3\n")
    run(ORCHESTRATOR, "check", *words.split()).assert_refused(*expected)
