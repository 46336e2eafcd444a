"""The plans of comparisons of tuned variants and of studies of factors."""

from __future__ import annotations

from pathlib import Path

from in_process import SWEEP, Run

DRY = ("--dry-run", "--plan")

TUNED = SWEEP.with_name("tuned_comparison.py")
FACTORS = SWEEP.with_name("hyperparameter_sensitivity.py")


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
    assert "Search          qmc, 12 searches" in done.stdout
    said = " ".join(done.stdout.split())
    for name, rates in (("lora", "0.001:0.3"), ("digits/lora", "0.0001:0.4")):
        space = f"8 points of learning_rate=log:{rates}, in each of {2 * 3} searches"
        assert f"Space, {name} {space}" in said
    assert f"Configurations  {2 * 2 * 3 * 8}, of them 0 known" in done.stdout


def test_the_rehearsal_of_tunings_has_two_tasks_and_a_grid_of_its_own(run: Run) -> None:
    done = run(TUNED, "--dry-run", "--plan")
    assert done.returncode == 0, done.stderr
    assert "Task            letters" in done.stdout
    assert "Task            digits" in done.stdout
    assert f"Configurations  {2 * 3 * 5 * 4}, of them 0 known" in done.stdout


def test_a_plan_counts_the_curve_and_the_arms_and_says_what_is_left_out(tmp_path: Path, run: Run) -> None:
    done = run(
        FACTORS, *DRY, "--plan", "--variants", "lora", "hira", "--factors", "alpha", "schedule",
        "--learning-rates", "1e-3:1e-1:4", "--seeds", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hira has no alpha: left out." in done.stdout
    # A curve of two decades has room for five rates around its middle, which is the default rate, too.
    # The rates of a level of alpha depend on the best rate of the curve; the plan takes the most: ten for
    # x 64 (five around the middle, half-decade steps to its own expected best rate, and the neighbors of
    # that), nine for x 1/4.
    lora, hira = 9 + 2 * 5 + 10 + 9, 9 + 2 * 5
    assert f"Configurations  {3 * (lora + hira)}, of them 0 known" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_the_rehearsal_of_factors_is_small(run: Run) -> None:
    """With 1.3 seconds for a run and 25 for the start, it ends within 5 minutes on two cores."""
    done = run(FACTORS, "--dry-run", "--plan")
    assert done.returncode == 0, done.stderr
    assert "Seeds           2" in done.stdout
    count = int(done.stdout.partition("Configurations")[2].split(",")[0])
    assert count <= 200
