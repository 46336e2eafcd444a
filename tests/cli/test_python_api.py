"""`Study`, `plan` and their errors; tests/promises/test_13_package.py runs a study from a notebook."""

from __future__ import annotations

from pathlib import Path

import hub_folder
import pytest
from data_rows import SUMS, write
from star_records import make_record

import orchestrator
from orchestrator import Study, plan, run
from orchestrator.record.store import Store
from orchestrator.util.errors import UsageError

WRONG = {
    "experiment": (("tunned", {}), "'tunned'.*'tuned'"),
    "trains nothing": (("published", {}), "'published'"),
    "option": (("study", {"rnk": 3}), "'rnk'.*'rank'"),
    "option of another experiment": (("study", {"replicates": 3}), "'replicates'"),
    "type": (("study", {"rank": "big"}), "--rank 'big': must be a whole number"),
    "truth value": (("study", {"dry_run": "maybe"}), "true or false"),
    "bounds": (("study", {"rank": 0}), "--rank 0: must be 1 or more"),
    "list": (("study", {"variants": {"lora": 1}}), "list of words"),
    "file": (("study", {"config": "none.yaml"}), "No such file"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_in_one_line(given: tuple[str, dict[str, object]], message: str) -> None:
    experiment, options = given
    with pytest.raises(UsageError, match=message) as refused:
        Study(experiment, **options)  # type: ignore[arg-type]
    assert len(str(refused.value).splitlines()) == 1


def test_a_plan_is_printed_and_returned(
    restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Study(
        "tuned", variants=["LoRA", "PiSSA"], task="letters", learning_rates=[1e-3, 1e-2], replicates=2,
        dry_run=True,
    )  # fmt: skip
    assert "tuned --dry-run --variants LoRA PiSSA" in repr(study)
    (planned,) = plan(study)
    assert (planned.total, len(planned.pending), len(planned.requested)) == (8, 8, 8)
    assert repr(planned) == "<Plan: 8 configurations, 8 to train>"
    assert ("Variants", "lora pissa") in planned.lines
    assert "Variants        lora pissa" in capsys.readouterr().out
    assert not list(tmp_path.glob("results/*/study.json"))


def test_a_run_does_not_read_the_files_of_other_studies(
    restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration has a record already, so nothing is trained."""
    monkeypatch.chdir(tmp_path)
    study = Study(
        data=write(Path("sums.csv"), SUMS), model=hub_folder.llama(Path("base")), variants="lora",
        learning_rates=[1e-3, 1e-2], seeds=1, widen=0, study="mine",
    )  # fmt: skip
    (planned,) = plan(study)
    store = Store(study.options.store_folder)
    for configuration in planned.pending:
        store.put(make_record(configuration, 0.5))
    damaged = Path("results", "other", "study.json")
    damaged.parent.mkdir()
    damaged.write_text("{")
    result = run(study)
    assert (result.exit_code, result.folder) == (0, Path("results", "mine"))
    assert (result.folder / "report.html").exists()


def test_the_package_exports_five_names() -> None:
    assert set(orchestrator.__all__) == {"Study", "__version__", "load", "plan", "run"}
    assert all(getattr(orchestrator, name) for name in orchestrator.__all__)
    with pytest.raises(AttributeError, match="no attribute 'studies'"):
        _ = orchestrator.studies
