"""Wrong values of options are refused before Ray starts, in one line with exit code 2.

The line names the value, the rule and the nearest valid choice. The scripts run in the process of the test
unless a test says otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, SWEEP, Run

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
    "zero lanes": ((*DRY, "--lanes-per-trainer", "0"), ["--lanes-per-trainer 0", "1 or more"]),
    "zero trainers": ((*DRY, "--trainers", "0"), ["--trainers 0", "1 or more"]),
    "unknown scheduler": ((*DRY, "--scheduler", "ahsa"), ["'ahsa'", "asha"]),
    "population based training": ((*DRY, "--scheduler", "pbt"), ["'pbt'", "immutable", "asha"]),
    "zero workers": ((*DRY, "--workers-per-trainer", "0"), ["--workers-per-trainer 0", "1 or more"]),
    "more workers than rows": (
        (*DRY, "--workers-per-trainer", "17", "--accumulation", "4", "--batch-size", "16"),
        ["--workers-per-trainer 17", "take 16"],
    ),
    "workers on fractions of a GPU": (
        (*DRY, "--workers-per-trainer", "2", "--gpus-per-worker", "0.5"),
        ["--workers-per-trainer 2", "--gpus-per-worker 0.5", "NCCL", "take --gpus-per-worker 1"],
    ),
    "zero parts of a batch": ((*DRY, "--accumulation", "0"), ["--accumulation 0", "1 or more"]),
    "unequal parts of a batch": ((*DRY, "--accumulation", "3"), ["--accumulation 3", "16", "take 2"]),
    "head rate no number": ((*DRY, "--head-learning-rate", "sme"), ["'sme'", "same", "1e-3"]),
    "head rate zero": ((*DRY, "--head-learning-rate", "0"), ["'0'", "above 0"]),
    "head rate without a head": ((*DRY, "--head-learning-rate", "1e-3"), ["1e-3", "no head", "same"]),
    "gpus of a worker": ((*DRY, "--gpus-per-worker", "1.5"), ["--gpus-per-worker 1.5"]),
    "price of nothing": ((*DRY, "--price-per-hour", "0"), ["--price-per-hour 0", "above 0"]),
    "output is a file": ((*DRY, "--output", "/dev/null"), ["--output '/dev/null'", "cannot be written"]),
    "output below a file": (
        (*DRY, "--output", "/dev/null/x"),
        ["--output '/dev/null/x'", "cannot be written"],
    ),
    "tracking uri malformed": ((*DRY, "--tracking-uri", "mlflow"), ["'mlflow'", "sqlite:///"]),
    "tracking uri scheme": ((*DRY, "--tracking-uri", "htp://x:5000"), ["'htp", "http"]),
    "tracking server away": (
        (*DRY, "--tracking-uri", "http://127.0.0.1:9"),
        ["'http://127.0.0.1:9'", "start that server"],
    ),
    "more trainers than there are cores": (
        (*DRY, "--trainers", "4000"),
        ["--trainers 4000", "take --trainers "],
    ),
    "a GPU where there is none": ((*DRY, "--gpus-per-worker", "1"), ["--gpus-per-worker 1", "0 GPUs"]),
    # The base model is not prepared yet, but the shapes of its layers are known.
    "unknown target": ((*DRY, "--targets", "q_porj"), ["'q_porj'", "Did you mean 'q_proj'?"]),
    "unknown target of an encoder": (
        (*DRY, "--task", "reviews", "--targets", "qery"),
        ["'qery'", "Did you mean 'query'?"],
    ),
    "unknown target of images": (
        (*DRY, "--task", "digits", "--targets", "v_porj"),
        ["'v_porj'", "Did you mean '"],
    ),
    "empty target": ((*DRY, "--targets", ""), ["target ''"]),
    "no target": ((*DRY, "--targets", "q_proj,"), ["target ''"]),
    "a pattern that is none": ((*DRY, "--targets", "re:("), ["'re:('", "not a regular expression"]),
    "a rank larger than the layers": ((*DRY, "--rank", "97"), ["rank 97", "at most 96"]),
    "an end of a constant schedule": (
        (*DRY, "--lr-schedule", "constant", "--set", "final_factor=0.1"),
        ["final_factor=0.1", "constant", "cosine or linear"],
    ),
    "an end above the peak": ((*DRY, "--set", "final_factor=1.5"), ["final_factor=1.5", "below 1"]),
    "a choice with a hole": (
        (*DRY, "--search", "qmc", "--space", "rank=4,,8"),
        ["'rank=4,,8'", "empty", "take rank=4,8"],
    ),
    "a choice that ends in a comma": (
        (*DRY, "--search", "qmc", "--space", "rank=4,8,"),
        ["empty", "rank=4,8"],
    ),
    "a choice of nothing": ((*DRY, "--search", "qmc", "--space", "rank=,"), ["empty", "rank=,"]),
    "study name": ((*DRY, "--study", "a/b"), ["--study 'a/b'", "take 'a-b'"]),
    "study name of 300 characters": ((*DRY, "--study", "x" * 300), ["--study 'xxx", "200 bytes"]),
    "study name of 300 bytes": ((*DRY, "--study", "μ" * 150), ["--study 'μμμ", "200 bytes"]),
    "study name with control characters": ((*DRY, "--study", "a\n\x1b[31mb"), [r"'a\n\x1b[31mb'", "take 'a"]),
    "study name that turns the text round": ((*DRY, "--study", "a\u202eb"), [r"'a\u202eb'", "take 'a-b'"]),
    "study name of bytes that are no text": ((*DRY, "--study", "a\udcff"), [r"'a\udcff'", "take 'a-'"]),
    "study name with a backslash": ((*DRY, "--study", "a\\b"), ["take 'a-b'"]),
    "study name with a leading dash": ((*DRY, "--study=-x"), ["--study '-x'", "take 'x'"]),
    "study name with a leading dot": ((*DRY, "--study", ".x"), ["--study '.x'", "take 'x'"]),
    "study name of this folder": ((*DRY, "--study", "."), ["--study '.'", "take 'study'"]),
    "study name of the folder above": ((*DRY, "--study", ".."), ["--study '..'", "take 'study'"]),
    "study name with spaces around it": ((*DRY, "--study", " a "), ["--study ' a '", "take 'a'"]),
    "empty study name": ((*DRY, "--study", ""), ["--study ''", "take 'study'"]),
    "study name of the store": ((*DRY, "--study", "store"), ["--study 'store'", "results/store", "another"]),
    "study in the store": (
        (*DRY, "--study", "records", "--output", "all", "--store", "all"),
        ["--study 'records'", "one of the store's own", "another --output"],
    ),
    "study in the store by another way": (
        (*DRY, "--study", "a", "--output", "x", "--store", "x/../x/a"),
        ["--study 'a'", "one of the store's own"],
    ),
    "too many seeds": (
        (*DRY, "--seeds", "1000000000"),
        ["--seeds 1000000000", "10000 or less", "take 10000"],
    ),
    "too many seeds at all rates": (
        (*DRY, "--seeds", "9000"),
        ["54000", "10000 or less", "take --seeds 1666"],
    ),
    "too many seeds at all rates of a finer grid": (
        (*DRY, "--seeds", "1666"),
        ["18326", "10000 or less", "take --seeds 909"],
    ),
    "too many rates": (
        (*DRY, "--learning-rates", "1e-5:1e-2:1000000000"),
        ["'1e-5:1e-2:1000000000'", "10000 rates", "points a decade"],
    ),
    "too many rates that are one when rounded": (
        (*DRY, "--learning-rates", "1e-3:1.001e-3:1000000000000"),
        ["10000 rates"],
    ),
    "too many rates over too much": (
        (*DRY, "--learning-rates", "1e-300:1e300:100000"),
        ["'1e-300:1e300:100000'", "600 decades"],
    ),
    "too many decades": ((*DRY, "--learning-rates", "1e-300:1e300:1"), ["600 decades", "100 or less"]),
    "a number of 5,000 digits": ((*DRY, "--learning-rates", f"1e-5:1e-2:{'9' * 5000}"), ["10000 rates"]),
    "a step without a learning rate": ((*DRY, "--steps", "1"), ["--steps 1", "learning rate 0", "warmup=0"]),
    "too many steps": ((*DRY, "--steps", f"1{'0' * 30}"), ["--steps 1000", "take 10000000"]),
    "too many evaluations": ((*DRY, "--evaluations", f"1{'0' * 30}"), ["--evaluations 1000", "take 100000"]),
    "too large a batch": ((*DRY, "--batch-size", f"1{'0' * 15}"), ["--batch-size 1000", "take 1000000"]),
    "too large a rank": ((*DRY, "--rank", f"1{'0' * 30}"), ["--rank 1000", "take 100000"]),
    "too many lanes": (
        (*DRY, "--lanes-per-trainer", f"1{'0' * 30}"),
        ["--lanes-per-trainer 1", "take 10000"],
    ),
    "too many parts of a batch": (
        (*DRY, "--accumulation", f"1{'0' * 12}"),
        ["--accumulation 1", "16", "take 16"],
    ),
    "too large a rank by --set": ((*DRY, "--set", "rank=1e300"), ["'rank=1e300'", "at most 100000"]),
    "too large a batch by --set": (
        (*DRY, "--set", "batch_size=1e18"),
        ["'batch_size=1e18'", "at most 1e+06"],
    ),
    "too large a number of a variant's own": (
        (*DRY, "--variants", "relora", "--set", "relora.merges=1e18"),
        ["'relora.merges=1e18'", "at most 100000"],
    ),
    "too large a range of a variant's own": (
        (*DRY, "--variants", "relora", "--search", "qmc", "--space", "relora.merges=int:1:1e18"),
        ["'1e18'", "at most 100000"],
    ),
    "too large a batch in a space": (
        (*DRY, "--search", "qmc", "--space", "batch_size=int:1:1e18"),
        ["'batch_size=int:1:1e18'", "'1e18'", "at most 1e+06"],
    ),
    "trainer timeout not finite": ((*DRY, "--trainer-timeout", "inf"), ["--trainer-timeout inf", "finite"]),
    "more evaluations than steps": (
        (*DRY, "--steps", "30", "--evaluations", "31"),
        ["--evaluations 31", "30 steps", "take 30"],
    ),
    "a length of one token": ((*DRY, "--max-length", "1"), ["--max-length 1", "take 2"]),
    "too many test examples": (
        (*DRY, "--test-size", "100000000"),
        ["--test-size 100000000", "take 10000000"],
    ),
    "a batch larger than the data": ((*DRY, "--batch-size", "999999"), ["999999", "2000 examples", "take"]),
    "a batch larger than the data by --set": ((*DRY, "--set", "batch_size=999999"), ["999999", "2000"]),
    "a batch larger than the data in a space": (
        (*DRY, "--search", "qmc", "--space", "batch_size=16,999999"),
        ["--space batch_size: 999999", "take 2000"],
    ),
    "a rank larger than the layers, before anything is pretrained": (
        ("--dry-run", "--rank", "100000"),
        ["rank 100000", "at most 96"],
    ),
    "such a rank in the second task": (
        ("--dry-run", "--task", "letters", "reviews", "--rank", "90"),
        ["reviews-base", "rank 90", "at most 64"],
    ),
    "empty output": ((*DRY, "--output", ""), ["--output is empty", "leave it out"]),
    "empty store": ((*DRY, "--store", ""), ["--store is empty", "leave it out"]),
    "a device as a file of options": ((*DRY, "--config", "/dev/zero"), ["'/dev/zero'", "name a YAML file"]),
    "empty task": ((*DRY, "--task", ""), ["--task is empty", "leave it out"]),
    "empty model": ((*DRY, "--model", ""), ["--model is empty", "leave it out"]),
    "empty tracking uri": ((*DRY, "--tracking-uri", ""), ["--tracking-uri is empty", "leave it out"]),
    "empty cluster file": ((*DRY, "--on", ""), ["--on is empty", "leave it out"]),
    "nothing to run on": ((), ["GPU", "--dry-run"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_value_is_refused_in_one_line_and_leaves_nothing(case: str, run: Run, tmp_path: Path) -> None:
    arguments, expected = BAD[case]
    run(SWEEP, *arguments).assert_refused(*expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("RAY_ADDRESS", "nonsense", "must be HOST:PORT"),
        ("RAY_ADDRESS", "127.0.0.1:9", "nothing answers there"),
        ("RAY_ADDRESS", "head..example.org:6379", "nothing answers there"),
        ("TMPDIR", "/none", "no folder that can be written"),
        ("RAY_TMPDIR", "/none", "no folder that can be written"),
        ("TMPDIR", "long" * 20, "Ray's sockets are too long"),
    ],
)
def test_an_environment_in_which_ray_cannot_start_is_refused_before_anything_is_pretrained(
    name: str, value: str, rule: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setenv(name, value)
    run(SWEEP, "--dry-run").assert_refused(name, value, rule)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("option", "name"), [("--config", "a.yaml"), ("--data", "a.csv"), ("--data", "."), ("--task", "a.py")]
)
def test_a_pipe_is_refused_and_not_waited_for(option: str, name: str, run: Run, tmp_path: Path) -> None:
    file = "train.csv" if name == "." else name
    os.mkfifo(tmp_path / file)
    run(SWEEP, *DRY, option, name).assert_refused(file)


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "variants: &a [*a]", "&a {grid: *a}", "&a {grid: &b {training: *b}}", "&a [*a]"]
)
def test_yaml_that_contains_itself_is_refused(text: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    run(SWEEP, *DRY, "--config", "a.yaml").assert_refused("a.yaml, line 1")


def test_a_process_with_a_wrong_value_exits_with_code_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SWEEP), *DRY, "--rank", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rank 0: must be 1 or more.\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--outptu", "x"), "--output"),
        (("--rank", "eight"), "--rank"),
        (("--lr-schedule", "cosin"), "cosine"),
    ],
)
def test_an_unknown_or_unparsable_option_is_refused_with_the_right_one(
    arguments: tuple[str, ...], expected: str, run: Run
) -> None:
    run(SWEEP, "--dry-run", *arguments).assert_refused(arguments[0], expected)


def test_help_imports_nothing_heavy() -> None:
    """Use a fresh interpreter, because other tests import these packages. Help has to appear at once."""
    probe = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'ray', 'transformers', 'datasets', 'mlflow', 'pyarrow', 'scipy', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    command = [sys.executable, "-c", probe, str(SWEEP), str(ORCHESTRATOR)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--learning-rates" in done.stdout
    assert all(name in done.stdout for name in ("sync", "show", "report", "fetch model", "fetch data"))
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_plan_prints_what_would_be_trained_and_starts_nothing(tmp_path: Path, run: Run) -> None:
    done = run(SWEEP, *DRY)
    assert done.returncode == 0, done.stderr
    assert "132, of them 0 known" in done.stdout
    assert "Early stopping  none" in done.stdout
    assert not list(tmp_path.glob("results/*/study.json"))


def test_a_dry_run_takes_another_task(run: Run) -> None:
    done = run(SWEEP, *DRY, "--task", "reviews")
    assert done.returncode == 0, done.stderr
    assert "Base model      reviews-base" in done.stdout
    assert "156, of them 0 known" in done.stdout


def test_a_plan_says_when_early_stopping_begins(run: Run) -> None:
    done = run(SWEEP, *DRY, "--steps", "120", "--scheduler", "asha")
    assert done.returncode == 0, done.stderr
    assert "Early stopping  asha loss=min first=40 eta=4" in done.stdout
