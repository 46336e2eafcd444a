"""Options of hyperparameter_sensitivity.py: refused values, and the size of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import SWEEP, Run

DRY = ("--dry-run", "--plan")

FACTORS = SWEEP.with_name("hyperparameter_sensitivity.py")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--factors", "alhpa"), ["'alhpa'", "Did you mean 'alpha'?"]),
        (("--factors", "relora.merges"), ["relora.merges", "add it to --variants"]),
        (("--levels", "9"), ["--levels 9", "from 1 to 3", "take 2"]),
        (("--margin", "nan"), ["--margin nan", "above 0"]),
        (("--search", "qmc"), ["--search qmc", "take grid"]),
        (("--scheduler", "asha"), ["--scheduler asha", "take none"]),
        (("--learning-rates", "1e-3"), ["--learning-rates", "5 rates or more"]),
        (("--seeds", "1000000000"), ["--seeds 1000000000", "take 10000"]),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(
    arguments: tuple[str, ...], expected: list[str], run: Run
) -> None:
    run(FACTORS, *DRY, *arguments).assert_refused(*expected)


def test_a_plan_counts_the_curve_and_the_arms_and_says_what_is_left_out(tmp_path: Path, run: Run) -> None:
    done = run(
        FACTORS, *DRY, "--plan", "--variants", "lora", "hira", "--factors", "alpha", "schedule",
        "--learning-rates", "1e-3:1e-1:4", "--seeds", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hira has no alpha: left out." in done.stdout
    # A curve of two decades has room for five rates around its middle, which is the default rate, too.
    lora, hira = 9 + (2 + 2) * 5, 9 + 2 * 5
    assert f"Configurations  {3 * (lora + hira)}, of them 0 known" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_the_rehearsal_is_small(run: Run) -> None:
    """With 1.3 seconds for a run and 25 for the start, it ends within 5 minutes on two cores."""
    done = run(FACTORS, "--dry-run", "--plan")
    assert done.returncode == 0, done.stderr
    assert "Seeds           2" in done.stdout
    count = int(done.stdout.partition("Configurations")[2].split(",")[0])
    assert count <= 200
