"""Promise 1: the dry run ends with a verdict and a report, and what is known is not trained again."""

from __future__ import annotations

import html
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import as_a_user
import pytest
import yaml

import orchestrator

STUDY = "lr_sensitivity-letters-letters-base"
WATCHED = Path(__file__).with_name("watched.py")
SMALL = (
    *("study", "--dry-run", "--study", "small", "--variants", WATCHED, "--learning-rates", "1e-3", "1e-2"),
    *("--steps", "12", "--lr-schedule", "constant", "--set", "warmup=0", "--widen", "0"),
)


def squeezed(text: str) -> str:
    """Return a text without tags and line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def steps(folder: Path) -> list[str]:
    """Return the lines "RATE SEED STEP" that the lanes of watched.py have written."""
    return [line for path in folder.glob("*.steps") for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the records by file name."""
    paths = (folder / "results" / "store" / "records").rglob("*.json")
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return a temporary folder with a short path. Ray makes its folder `ray` in it when it starts."""
    folder = Path(tempfile.mkdtemp(prefix="p1-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def small(made_once: Callable[..., Path], with_base: Path) -> Path:
    """Return the working folder of a study of two configurations. Its lanes log their steps in `watched/`."""

    def make(folder: Path) -> None:
        shutil.copytree(with_base, folder, dirs_exist_ok=True)
        (folder / "watched").mkdir()
        said = as_a_user.succeed(*SMALL, "--seeds", "1", cwd=folder, WATCHED=str(folder / "watched"))
        (folder / "said.txt").write_text(said)

    return made_once("small", make)


@pytest.mark.smoke
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_small_dry_run_is_trained_once(small: Path, temporary: Path) -> None:
    first = files(small)
    assert {record["state"] for record in as_a_user.records(small).values()} == {"finished"}
    assert Counter(steps(small / "watched")) == {
        f"{rate} 0 {step}": 1 for rate in ("0.001", "0.01") for step in range(1, 13)
    }
    study = small / "results" / "small"
    assert "<html" in (study / "report.html").read_text()
    as_a_user.assert_one_finished_run_each(small, "small", as_a_user.records(small))

    as_a_user.succeed(*SMALL, "--seeds", "1", cwd=small, WATCHED=str(temporary), TMPDIR=str(temporary))
    assert not steps(temporary)
    assert not (temporary / "ray").exists(), "Ray was started"
    assert files(small) == first
    as_a_user.assert_one_finished_run_each(small, "small", as_a_user.records(small))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_one_more_seed_trains_only_what_is_new(small: Path, tmp_path: Path, temporary: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(small, home)
    before = files(home)
    as_a_user.succeed(*SMALL, "--seeds", "2", cwd=home, WATCHED=str(tmp_path), TMPDIR=str(temporary))
    assert (temporary / "ray").exists(), "this shows that the tests would see that Ray was started"
    assert Counter(steps(tmp_path)) == {
        f"{rate} 1 {step}": 1 for rate in ("0.001", "0.01") for step in range(1, 13)
    }
    after = files(home)
    assert len(after) == 4
    assert before.items() <= after.items()
    as_a_user.assert_one_finished_run_each(home, "small", as_a_user.records(home))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_dry_run_leaves_its_verdict_report_and_records(dry_run: Path) -> None:
    study = dry_run / "results" / STUDY
    records = as_a_user.records(dry_run)
    asked = {(v, rate, seed) for v in ("lora", "pissa") for rate in (1e-3, 1e-2, 1e-1) for seed in (0, 1)}
    found = Counter(
        (r["configuration"]["variant"]["name"], as_a_user.learning_rate(r), r["configuration"]["seed"])
        for r in records.values()
    )
    assert found == dict.fromkeys(asked, 1)
    assert {r["state"] for r in records.values()} <= {"finished", "diverged"}
    assert all(len(r["curve"]) == 30 for r in records.values() if r["state"] == "finished")
    as_a_user.assert_one_finished_run_each(dry_run, STUDY, records)

    said, report = squeezed((dry_run / "said.txt").read_text()), squeezed((study / "report.html").read_text())
    loaded = orchestrator.load(STUDY, output=dry_run / "results")
    assert len(loaded.verdicts)
    claims = [claim.removesuffix(".") for claim in loaded.verdicts["claim"]]  # the task may follow
    assert all(claim in report for claim in claims)
    assert any(claim in said for claim in claims)
    assert "report.html" in said
    assert sorted(loaded.runs["fingerprint"]) == sorted(records)
    assert json.loads((study / "summary.json").read_text())
    assert isinstance(yaml.safe_load((study / "study.yaml").read_text()), dict)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_command_and_the_settings_that_it_wrote_name_the_same_study(
    dry_run: Path, temporary: Path
) -> None:
    """The fixture ran the script. The command repeats its study, by the same options and by study.yaml."""
    before = files(dry_run)
    settings = dry_run / "results" / STUDY / "study.yaml"
    as_a_user.succeed("study", *as_a_user.DRY_RUN, cwd=dry_run, TMPDIR=str(temporary))
    as_a_user.succeed("study", "--config", settings, cwd=dry_run, TMPDIR=str(temporary))
    assert not (temporary / "ray").exists(), "Ray was started"
    assert files(dry_run) == before
    as_a_user.assert_one_finished_run_each(dry_run, STUDY, as_a_user.records(dry_run))


def test_a_plan_starts_no_ray_and_leaves_no_record(home: Path, temporary: Path) -> None:
    said = as_a_user.succeed("study", "--dry-run", "--plan", cwd=home, TMPDIR=str(temporary))
    assert "132" in said, "4 variants x 11 rates x 3 seeds"
    assert not (temporary / "ray").exists(), "Ray was started"
    assert not as_a_user.records(home)
    assert not (home / "results" / "store" / "mlflow.db").exists()


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_whole_dry_run(home: Path) -> None:
    said = as_a_user.succeed("study", "--dry-run", cwd=home)
    records = as_a_user.records(home)
    assert len(records) == 132
    assert {r["state"] for r in records.values()} <= {"finished", "diverged"}
    as_a_user.assert_one_finished_run_each(home, STUDY, records)
    loaded = orchestrator.load(STUDY, output=home / "results")
    assert any(claim.removesuffix(".") in squeezed(said) for claim in loaded.verdicts["claim"])
