"""The scripts with two stages before Ray starts: refused values, and plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import SWEEP, Run
from test_bad_input import DRY

TUNED, STOPPED = SWEEP.with_name("tuned_comparison.py"), SWEEP.with_name("early_stopping.py")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (TUNED, ("--confirm-seeds", "1"), ["--confirm-seeds 1", "2 or more", "take 10"]),
        (TUNED, ("--confirm-seeds", "1000000000"), ["--confirm-seeds 1000000000", "take 10000"]),
        (TUNED, ("--margin", "0"), ["--margin 0", "above 0", "0.01"]),
        (TUNED, ("--margin", "nan"), ["--margin nan", "finite"]),
        (TUNED, ("--seeds", "1001"), ["--seeds 1001", "take 1000"]),
        (TUNED, ("--variants", "lora"), ["--variants lora", "one more"]),
        (TUNED, ("--variants", "pisa"), ["'pisa'", "pissa"]),
        (TUNED, ("--search", "qmc", "--seeds", "2"), ["--seeds 2", "take --seeds 1"]),
        (STOPPED, ("--search", "optuna"), ["--search optuna", "take grid"]),
        (STOPPED, ("--seeds", "1000000000"), ["--seeds 1000000000", "take 10000"]),
        (STOPPED, ("--scheduler", "none"), ["--scheduler none", "asha"]),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(
    script: Path, arguments: tuple[str, ...], expected: list[str], run: Run
) -> None:
    run(script, *DRY, *arguments).assert_refused(*expected)


def test_a_plan_shows_the_size_of_both_stages_and_starts_nothing(tmp_path: Path, run: Run) -> None:
    done = run(TUNED, *DRY, "--variants", "pissa", "dora")
    assert done.returncode == 0, done.stderr
    assert "Variants        lora pissa dora" in done.stdout
    assert "63, of them 0 known" in done.stdout
    assert "3 variants at their chosen points x 10 fresh seeds, 30 configurations" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_a_search_can_tune(run: Run) -> None:
    done = run(TUNED, *DRY, "--search", "qmc", "--points", "8", "--variants", "pissa")
    assert done.returncode == 0, done.stderr
    assert "16, of them 0 known" in done.stdout
    assert "2 variants at their chosen points x 10 fresh seeds, 20 configurations" in done.stdout


def test_the_help_of_early_stopping_names_the_refused_options(run: Run) -> None:
    done = run(STOPPED, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "(default: asha)" in text
    assert "--search, --sampler, --space and --points are refused" in text


def kept_choice(results: Path, text: str) -> None:
    folder = results / "tuned_comparison-letters-tune"
    folder.mkdir(parents=True)
    (folder / "choice.json").write_text(text)


def test_an_invalid_choice_file_is_refused_in_one_line(tmp_path: Path, run: Run) -> None:
    kept_choice(tmp_path / "results", '{"configurations": [], "variants": {"lora": {"rate": 0.01}}}')
    run(TUNED, *DRY).assert_refused("choice.json: not a choice (points: ")


def test_a_plan_with_a_new_variant_after_the_choice_is_refused(tmp_path: Path, run: Run) -> None:
    kept_choice(tmp_path / "results", '{"configurations": [], "points": null, "variants": {"lora": null}}')
    done = run(TUNED, *DRY, "--variants", "pissa")
    done.assert_refused(
        "--variants pissa: tuning of 'tuned_comparison-letters-tune' has chosen for lora alone"
    )
