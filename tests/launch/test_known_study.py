"""A command whose results are all known imports and makes nothing that it does not need."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import ORCHESTRATOR, Run
from orchestrator.experiments.lr_sensitivity import EXPERIMENT, CurveOptions

from orchestrator.analyze import report
from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve import templates
from orchestrator.finetune.resolve.templates import check_attach
from orchestrator.launch.study import resolve_study
from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.util.errors import UsageError
from variants import catalogue
from variants.catalogue import source_digest

HEAVY = ("torch", "transformers", "mlflow", "ray", "scipy", "altair", "vl_convert", "pyarrow", "pandas")
MAIN = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {without}: raise ImportError(name + " is not needed")
sys.meta_path.insert(0, Refuse())
{run}
"""


def run_without(without: tuple[str, ...], what: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module in a process in which an import of some modules fails."""
    code = f"runpy.run_module('{what}', run_name='__main__', alter_sys=True)"
    if what.endswith(".py"):
        code = f"sys.argv[0] = '{what}'; runpy.run_path('{what}', run_name='__main__')"
    command = [sys.executable, "-c", MAIN.format(without=without, run=code), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})


def stamp(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written."""
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.fixture
def words(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the words of a study of which the store has all results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalogue._built_in_traits.cache_clear()  # so that they are kept in this cache folder
    output, rates = tmp_path / "results", ("1e-3", "1e-2")
    options = CurveOptions(
        task=("letters",), variants=("lora", "rslora"), model=str(base), learning_rates=rates, seeds=2,
        output=output, gpus_per_worker=0,
    )  # fmt: skip
    study = resolve_study(EXPERIMENT, options)
    study.look_up()
    for configuration in study.pending:
        scores = {"loss": 1.0, "exact_match": 0.5 + configuration.optimizer.learning_rate}
        evaluations = tuple(Evaluation(4, split, scores) for split in ("validation", "test"))
        study.store.put(
            Record(configuration.fingerprint, configuration, "finished", 4, evaluations=evaluations)
        )
    return [
        *("study", "--task", "letters", "--variants", "lora", "rslora", "--model", str(base), "--seeds", "2"),
        *("--learning-rates", *rates, "--output", str(output)),
    ]


@pytest.mark.slow
def test_a_plan_of_known_results_needs_no_torch(words: list[str]) -> None:
    """A variant that is trained is tried on a model without weights, which takes torch and transformers."""
    done = run_without(HEAVY, "orchestrator", *words, "--plan")
    assert done.returncode == 0, done.stderr
    assert "8, of them 8 known" in done.stdout
    refused = run_without((), "orchestrator", *words, "--plan", "--rank", "100000")
    assert refused.returncode == 2
    assert "rank" in refused.stderr


def test_what_fits_the_base_model_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new study of it is planned without torch. Other settings are tried, and refused each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalogue._built_in_traits.cache_clear()
    tried: list[int] = []
    built: list[ModelChoice] = []
    build = loading.build_meta_model

    def count_built(model: ModelChoice, *rest: Any) -> Any:
        built.append(model)
        return build(model, *rest)

    def spy(configurations: Sequence[Configuration], *rest: Any) -> None:
        tried.append(len(configurations))
        check_attach(configurations, *rest)

    monkeypatch.setattr(loading, "build_meta_model", count_built)
    monkeypatch.setattr(templates, "check_attach", spy)
    options = CurveOptions(task=("letters",), variants=("lora", "pissa"), output=tmp_path / "new", plan=True)

    def count_tried(**changed: Any) -> int:
        before = len(tried)
        resolve_study(EXPERIMENT, replace(options, **changed))
        return sum(tried[before:])

    assert (count_tried(), len(built)) == (2, 1)  # both variants are tried on one model without weights
    assert count_tried(learning_rates=("1e-3",), seeds=5, steps=9) == 0
    for changed in ({"rank": 4}, {"alpha": 8.0}, {"targets": "q_proj"}, {"max_length": 9}, {"dtype": "nf4"}):
        assert (count_tried(**changed), count_tried(**changed)) == (2, 0)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"rank 100000 is larger than layer .* allows: at most 96"):
            count_tried(rank=100000)
    words = "study", "--task", "letters", "--variants", "lora", "pissa", "--output", str(tmp_path / "new")
    planned = run_without(HEAVY, "orchestrator", *words, "--plan")
    assert planned.returncode == 0, planned.stderr
    monkeypatch.setattr(templates, "_PROGRAM", tmp_path)  # of other source files
    assert count_tried() == 2


@pytest.mark.slow
def test_the_same_command_again_makes_nothing_new(
    words: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the same, and needs no cluster. Runs that MLflow has lost are logged again."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # where nothing answers
    first = run(ORCHESTRATOR, *words)
    assert first.returncode == 0, first.stderr
    assert "8 of 8 known, nothing to train" in first.stdout
    (folder,) = (tmp_path / "results").glob("lr_sensitivity*")
    report, database = folder / "report.html", tmp_path / "results" / "store" / "mlflow.db"
    written = stamp(report), stamp(database)
    again = run_without(HEAVY, str(ORCHESTRATOR), *words)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    by_hand = run_without(HEAVY, str(ORCHESTRATOR), "report", folder.name, *words[-2:])
    assert by_hand.returncode == 0, by_hand.stderr
    assert (stamp(report), stamp(database)) == written
    database.unlink()
    restored = run_without((), str(ORCHESTRATOR), *words)
    assert (restored.returncode, restored.stdout) == (0, first.stdout), restored.stderr
    with sqlite3.connect(database) as opened:
        assert opened.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (9,)


def test_a_report_with_a_file_that_was_edited_or_deleted_is_made_again(tmp_path: Path) -> None:
    """The memo of it has a digest of each file."""
    (tmp_path / "report.html").write_text("report")
    (tmp_path / "curves.png").write_text("picture")
    (tmp_path / "summary.json").write_text('{"pictures": ["curves.png"]}')
    report.remember(tmp_path, "inputs", "end", "text")
    assert report.is_written(tmp_path, "inputs")
    assert report.recall_end(tmp_path, "inputs", "end") == "text"
    assert report.recall_end(tmp_path, "inputs", "another") is None
    assert not report.is_written(tmp_path, "others")
    (tmp_path / "curves.png").write_text("edited")
    assert not report.is_written(tmp_path, "inputs")
    (tmp_path / "curves.png").write_text("picture")
    (tmp_path / "report.html").unlink()
    assert report.recall_end(tmp_path, "inputs", "end") is None
    (tmp_path / "report.html").write_text("report")
    assert report.is_written(tmp_path, "inputs")
    (tmp_path / report.MEMO_FILE).write_text('{"inputs": ')
    assert not report.is_written(tmp_path, "inputs")


def test_whatever_a_report_is_made_from_is_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting of the analysis, one more configuration or record, another address, another program."""
    store, study = Store(tmp_path / "store"), StudyFile("s", "?", "command", ("a",))
    program = tmp_path / "program"
    program.mkdir()
    (program / "page.html.jinja").write_text("old")

    def digest(changed: StudyFile = study, uri: str = "sqlite:///a.db", folder: str = "s") -> str:
        source_digest.cache_clear()
        monkeypatch.setattr(report, "_PROGRAM", [source_digest(program)])
        return report.digest_inputs(changed, store, uri, tmp_path / folder)

    first = digest()
    assert digest() == first
    others = [
        digest(replace(study, settings=replace(study.settings, margin=0.02))),
        digest(replace(study, configurations=("a", "b"))),
        digest(replace(study, command="another")),
        digest(study, "sqlite:///b.db"),
        digest(study, folder="t"),
    ]
    (program / "page.html.jinja").write_text("new")
    others.append(digest())
    (store.records_folder / "aa").mkdir()
    for content in ("{}", "{ }"):
        (store.records_folder / "aa" / f"{'a' * 64}.json").write_text(content)
        others.append(digest())
    assert len({first, *others}) == 1 + len(others)


def test_the_second_listing_of_variants_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows from the source files alone is kept in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "torch is not needed" in run_without(("torch",), "variants").stderr
    first = run_without((), "variants")
    assert first.returncode == 0, first.stderr
    second = run_without(("torch",), "variants")
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    (kept,) = (tmp_path / "lora-orchestrator").iterdir()
    kept.write_text(kept.read_text().replace('"sources": "', '"sources": "of other files '))
    assert "torch is not needed" in run_without(("torch",), "variants").stderr
