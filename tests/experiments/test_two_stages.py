"""What the scripts with two stages refuse, and what they plan, before Ray starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_bad_input import DRY, SCRIPT, run

TUNED, STOPPED = SCRIPT.with_name("tuned_comparison.py"), SCRIPT.with_name("early_stopping.py")


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (TUNED, ("--confirm-seeds", "1"), ["--confirm-seeds 1", "2 or more", "take 10"]),
        (TUNED, ("--margin", "0"), ["--margin 0", "above 0", "0.01"]),
        (TUNED, ("--margin", "nan"), ["--margin nan", "finite"]),
        (TUNED, ("--seeds", "1001"), ["--seeds 1001", "take 1000"]),
        (TUNED, ("--variants", "lora"), ["--variants lora", "one more"]),
        (TUNED, ("--variants", "pisa"), ["'pisa'", "pissa"]),
        (TUNED, ("--search", "qmc", "--seeds", "2"), ["--seeds 2", "take --seeds 1"]),
        (STOPPED, ("--search", "optuna"), ["--search optuna", "take grid"]),
        (STOPPED, ("--scheduler", "none"), ["--scheduler none", "asha"]),
    ],
)
def test_one_line_and_exit_code_2(
    script: Path, arguments: tuple[str, ...], said: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, *DRY, *arguments, script=script)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    for part in said:
        assert part in done.stderr


def test_a_plan_shows_the_size_of_both_stages_and_starts_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, *DRY, "--variants", "pissa", "dora", script=TUNED)
    assert done.returncode == 0, done.stderr
    assert "Variants        lora pissa dora" in done.stdout
    assert "63, of them 0 known" in done.stdout
    assert "3 variants at their chosen points x 10 fresh seeds, 30 configurations" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_a_search_tunes_too(tmp_path: Path) -> None:
    done = run(tmp_path, *DRY, "--search", "qmc", "--points", "8", "--variants", "pissa", script=TUNED)
    assert done.returncode == 0, done.stderr
    assert "16, of them 0 known" in done.stdout
    assert "2 variants at their chosen points x 10 fresh seeds, 20 configurations" in done.stdout


def test_the_help_shows_what_early_stopping_takes(tmp_path: Path) -> None:
    done = run(tmp_path, "--help", script=STOPPED)
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "(default: asha)" in text
    assert "--search, --sampler, --space and --points are refused" in text


def test_a_file_that_is_no_choice_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tuned_comparison-letters-tune"
    folder.mkdir(parents=True)
    (folder / "choice.json").write_text('{"configurations": [], "variants": {"lora": {"rate": 0.01}}}')
    done = run(tmp_path, *DRY, script=TUNED)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "choice.json: not a choice (points: " in done.stderr


def test_a_plan_with_a_new_variant_after_the_choice_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tuned_comparison-letters-tune"
    folder.mkdir(parents=True)
    (folder / "choice.json").write_text('{"configurations": [], "points": null, "variants": {"lora": null}}')
    done = run(tmp_path, *DRY, "--variants", "pissa", script=TUNED)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "--variants pissa: tuning of 'tuned_comparison-letters-tune' has chosen for lora alone" in done.stderr
    )
