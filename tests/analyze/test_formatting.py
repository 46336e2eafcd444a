"""Numbers and commands as text."""

from __future__ import annotations

import shlex

from orchestrator.analyze import formatting


def test_rates_are_short_and_exact_rates_read_back_as_the_same_number() -> None:
    assert [formatting.rate(r) for r in (3e-4, 0.01, 1.1247e-5, 1.0)] == ["3e-4", "1e-2", "1.12e-5", "1e0"]
    assert formatting.exact_rate(3e-4) == "3e-4"
    assert float(formatting.exact_rate(1.1247e-5)) == 1.1247e-5
    assert formatting.number(-1e-9) == "0.000"


def test_a_folded_command_is_one_command_for_a_shell() -> None:
    command = "run --name 'two words' " + " ".join(f"--option-{i}" for i in range(9)) + " " + "x" * 50
    folded = formatting.fold_command(command, 40)
    lines = folded.split("\n")
    assert len(lines) > 3
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split(folded.replace("\\\n", "")) == shlex.split(command)
    assert all(len(line) <= 42 or "x" * 50 in line for line in lines)
    assert formatting.fold_command("short", 40) == "short"
