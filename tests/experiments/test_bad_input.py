"""Whatever is wrong with what a user types is one line (value, rule, nearest right choice) and exit code 2,
before Ray starts. The commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "lr_sensitivity.py"


def run(tmp_path: Path, *arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
        check=False,
    )


DRY = ("--dry-run", "--plan")

BAD = {
    "unknown variant": ((*DRY, "--variants", "lora", "pisa"), ["'pisa'", "pissa"]),
    "no variant": ((*DRY, "--variants"), ["--variants is empty"]),
    "unknown task": ((*DRY, "--task", "leters"), ["'leters'", "letters"]),
    "unknown task file": ((*DRY, "--task", "none.py"), ["none.py"]),
    "unknown model": ((*DRY, "--model", "smolm2-135m"), ["'smolm2-135m'", "smollm2-135m"]),
    "rate zero": ((*DRY, "--learning-rates", "0"), ["'0'", "above 0"]),
    "rate negative": ((*DRY, "--learning-rates", "1e-3", "-1e-3"), ["'-1e-3'", "above 0"]),
    "rate no number": ((*DRY, "--learning-rates", "fast"), ["'fast'", "not a number"]),
    "rate not finite": ((*DRY, "--learning-rates", "nan"), ["'nan'", "finite"]),
    "rate infinite": ((*DRY, "--learning-rates", "inf"), ["'inf'", "finite"]),
    "empty grid": ((*DRY, "--learning-rates"), ["--learning-rates is empty"]),
    "reversed grid": ((*DRY, "--learning-rates", "1e-2:1e-4:2"), ["reversed", "1e-4:1e-2:2"]),
    "zero points a decade": ((*DRY, "--learning-rates", "1e-4:1e-2:0"), ["'0'", "1 or more"]),
    "rank zero": ((*DRY, "--rank", "0"), ["--rank 0", "1 or more"]),
    "rank negative": ((*DRY, "--rank", "-8"), ["--rank -8", "1 or more"]),
    "alpha not finite": ((*DRY, "--alpha", "nan"), ["--alpha nan", "finite"]),
    "alpha infinite": ((*DRY, "--alpha", "inf"), ["--alpha inf", "finite"]),
    "dropout of everything": ((*DRY, "--dropout", "1"), ["--dropout 1", "below 1"]),
    "no seeds": ((*DRY, "--seeds", "0"), ["--seeds 0", "1 or more"]),
    "negative seeds": ((*DRY, "--seeds", "-3"), ["--seeds -3", "1 or more"]),
    "zero steps": ((*DRY, "--steps", "0"), ["--steps 0", "1 or more"]),
    "zero lanes": ((*DRY, "--lanes-per-seat", "0"), ["--lanes-per-seat 0", "1 or more"]),
    "zero seats": ((*DRY, "--seats", "0"), ["--seats 0", "1 or more"]),
    "unknown scheduler": ((*DRY, "--scheduler", "ahsa"), ["'ahsa'", "asha"]),
    "population based training": ((*DRY, "--scheduler", "pbt"), ["'pbt'", "immutable", "asha"]),
    "zero workers": ((*DRY, "--workers-per-seat", "0"), ["--workers-per-seat 0", "1 or more"]),
    "more workers than rows": (
        (*DRY, "--workers-per-seat", "5", "--accumulation", "4", "--batch-size", "16"),
        ["--workers-per-seat 5", "take 4"],
    ),
    "workers on fractions of a GPU": (
        (*DRY, "--workers-per-seat", "2", "--gpus-per-seat", "0.5"),
        ["--workers-per-seat 2", "--gpus-per-seat 0.5", "NCCL", "take --gpus-per-seat 1"],
    ),
    "zero parts of a batch": ((*DRY, "--accumulation", "0"), ["--accumulation 0", "1 or more"]),
    "unequal parts of a batch": ((*DRY, "--accumulation", "3"), ["--accumulation 3", "16", "take 2"]),
    "head rate no number": ((*DRY, "--head-learning-rate", "sme"), ["'sme'", "same", "1e-3"]),
    "head rate zero": ((*DRY, "--head-learning-rate", "0"), ["'0'", "above 0"]),
    "head rate without a head": ((*DRY, "--head-learning-rate", "1e-3"), ["1e-3", "no head", "same"]),
    "gpus of a seat": ((*DRY, "--gpus-per-seat", "1.5"), ["--gpus-per-seat 1.5"]),
    "price reversed": ((*DRY, "--price-per-gpu-hour", "2:1"), ["'2:1'", "reversed", "1:2"]),
    "output is a file": ((*DRY, "--output", "/dev/null"), ["--output '/dev/null'", "cannot be written"]),
    "output below a file": (
        (*DRY, "--output", "/dev/null/x"),
        ["--output '/dev/null/x'", "cannot be written"],
    ),
    "tracking uri malformed": ((*DRY, "--tracking-uri", "mlflow"), ["'mlflow'", "sqlite:///"]),
    "tracking uri scheme": ((*DRY, "--tracking-uri", "htp://x:5000"), ["'htp", "http"]),
    "tracking server away": (
        (*DRY, "--tracking-uri", "http://127.0.0.1:9"),
        ["'http://127.0.0.1:9'", "cannot be reached"],
    ),
    "more seats than there are cores": ((*DRY, "--seats", "4000"), ["--seats 4000", "take --seats "]),
    "a GPU where there is none": ((*DRY, "--gpus-per-seat", "1"), ["--gpus-per-seat 1", "0 GPUs"]),
    "study name": ((*DRY, "--study", "a/b"), ["--study 'a/b'"]),
    "nothing to run on": ((), ["GPU", "--dry-run"]),
}


@pytest.mark.parametrize("what", BAD)
def test_one_line_and_exit_code_2(what: str, tmp_path: Path) -> None:
    arguments, said = BAD[what]
    done = run(tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.strip()
    assert line.startswith("error: "), done.stderr
    assert "\n" not in line
    assert "Traceback" not in line
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--outptu", "x"), "--output"),
        (("--rank", "eight"), "--rank"),
        (("--schedule", "cosin"), "cosine"),
    ],
)
def test_an_option_that_does_not_exist_or_parse_names_the_right_one(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = run(tmp_path, "--dry-run", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_help_needs_nothing_heavy(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--learning-rates" in done.stdout
    probe = (
        "import runpy, sys; sys.argv = ['lr_sensitivity.py', '--help']\n"
        "try: runpy.run_path(%r, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'mlflow', 'scipy') if m in sys.modules])"
    )
    probed = subprocess.run(
        [sys.executable, "-c", probe % str(SCRIPT)], capture_output=True, text=True, check=True
    )
    assert probed.stdout.splitlines()[-1] == "[]"


def test_a_plan_says_what_would_be_trained_and_starts_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, *DRY)
    assert done.returncode == 0, done.stderr
    assert "105, of them 0 known" in done.stdout
    assert "Early stopping  none" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_a_dry_run_takes_another_task(tmp_path: Path) -> None:
    done = run(tmp_path, *DRY, "--task", "reviews")
    assert done.returncode == 0, done.stderr
    assert "Base model      reviews-base" in done.stdout
    assert "105, of them 0 known" in done.stdout


def test_the_early_stopping_plan_is_that_of_both_studies(tmp_path: Path) -> None:
    done = run(tmp_path, *DRY, "--steps", "120", script=SCRIPT.with_name("early_stopping.py"))
    assert done.returncode == 0, done.stderr
    assert "Early stopping  asha loss=min first=40 eta=4" in done.stdout
    assert "Early stopping  none" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))
