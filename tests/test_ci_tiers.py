"""`.ci/tiers`, on which the result of `.ci/run` depends."""

from __future__ import annotations

import subprocess
from pathlib import Path

TIERS = Path(__file__).parents[1] / ".ci" / "tiers"


def run(*commands: str) -> subprocess.CompletedProcess[str]:
    """Run these lines as a script that uses the tiers, and report."""
    script = "\n".join(["set -uo pipefail", f"source {TIERS}", *commands, "report"])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_tiers_that_pass_give_0_and_show_their_output() -> None:
    found = run("tier first echo said", "tier second true")
    assert found.returncode == 0, found.stderr
    assert "\nsaid\n" in found.stdout
    assert "first           ok" in found.stdout
    assert not found.stderr


def test_a_tier_that_fails_gives_1_and_its_failure_again_at_the_end() -> None:
    found = run("tier first bash -c 'echo FAILED test_a; exit 3'", "tier second true")
    assert found.returncode == 1
    after = found.stdout.partition("== tiers")[2]
    assert "first       FAILED" in after
    assert "second          ok" in after
    assert after.endswith("first:\nFAILED test_a\n")


def test_a_tier_can_wait_for_a_job_of_the_script() -> None:
    found = run("(exit 3) &", "job=$!", "ended() { wait $job; }", "tier first ended")
    assert "first       FAILED" in found.stdout
    assert not found.stderr
