"""Options that single scripts add: values that are refused before Ray starts, and plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import SWEEP, Run

DRY = ("--dry-run", "--plan")

TUNED = SWEEP.with_name("tuned_comparison.py")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (TUNED, ("--replicates", "1"), ["--replicates 1", "2 or more", "take 10"]),
        (TUNED, ("--replicates", "1000000000"), ["--replicates 1000000000", "take 10000"]),
        (TUNED, ("--replicates", "9999"), ["--seeds 9999", "39996 points"]),
        (TUNED, ("--max-replicates", "3"), ["--max-replicates 3", "at least", "take 5"]),
        (TUNED, ("--margin", "0"), ["--margin 0", "above 0", "0.01"]),
        (TUNED, ("--margin", "nan"), ["--margin nan", "above 0"]),
        (TUNED, ("--seeds", "3"), ["--seeds 3", "take --replicates 3"]),
        (TUNED, ("--learning-rates", "1e-3"), ["letters has 1 rate", "take two"]),
        (TUNED, ("--learning-rates", "1e-3:1e-2:999"), ["closer than a shift"]),
        (TUNED, ("--variants", "lora"), ["--variants lora", "one more"]),
        (TUNED, ("--variants", "pisa"), ["'pisa'", "pissa"]),
        (TUNED, ("--search", "qmc", "--seeds", "2"), ["--seeds 2", "--replicates 2"]),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(
    script: Path, arguments: tuple[str, ...], expected: list[str], run: Run
) -> None:
    run(script, *DRY, *arguments).assert_refused(*expected)


def test_a_plan_shows_the_size_of_all_tunings_and_starts_nothing(tmp_path: Path, run: Run) -> None:
    done = run(
        TUNED, *DRY, "--variants", "pissa", "dora", "--replicates", "4", "--learning-rates", "1e-3:1e-1:2"
    )
    assert done.returncode == 0, done.stderr
    assert "Variants        lora pissa dora" in done.stdout
    assert f"Configurations  {2 * 3 * 5 * 4}, of them 0 known" in done.stdout
    assert "Seeds           4" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_every_replicate_can_be_a_search_on_every_task(run: Run) -> None:
    arguments = ("--search", "qmc", "--points", "8", "--variants", "pissa", "--task", "letters", "digits")
    done = run(TUNED, "--dry-run", "--plan", "--replicates", "3", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Search          qmc, 8 points in each of 6 searches of each variant" in done.stdout
    assert f"Configurations  {2 * 2 * 3 * 8}, of them 0 known" in done.stdout


def test_the_rehearsal_has_two_tasks_and_a_grid_of_its_own(run: Run) -> None:
    done = run(TUNED, "--dry-run", "--plan")
    assert done.returncode == 0, done.stderr
    assert "Task            letters" in done.stdout
    assert "Task            digits" in done.stdout
    assert f"Configurations  {2 * 3 * 5 * 4}, of them 0 known" in done.stdout
