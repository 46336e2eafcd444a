"""`python -m orchestrator export`: what it writes loads elsewhere and has the scores of the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, Ended, Run
from safetensors import SafetensorError
from scripted import Script, leases, train
from trained_study import STUDY, Trained, run_card

from orchestrator.export import export as export_module
from orchestrator.export.lane_choice import LaneQuery
from orchestrator.finetune.models import loading
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.reporting import export_words
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import LRSchedule
from variants import catalogue

Export = Callable[..., Ended]

pytestmark = pytest.mark.xdist_group("export")  # the tests of a group share the trained study


def folder_of(done: Ended) -> Path:
    """Return the folder that a successful export has printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1].rpartition(": ")[0])


def test_a_lane_without_an_adapter_is_refused_with_the_command_that_trains_it(
    export: Export, trained: Trained, run: Run
) -> None:
    record = trained.record("lora", 0)
    refused = export(record.fingerprint[:10])
    command = f"--only {record.fingerprint[:12]} --save-adapters all --output {trained.output}-again"
    refused.assert_refused("was not kept", "study.yaml", command)
    words = ("--output", str(trained.output), "--tasks", "arc_easy")
    refused = run(ORCHESTRATOR, "evaluate", STUDY, record.fingerprint[:10], *words)
    refused.assert_refused("was not kept", "study.yaml", command)


def test_an_export_is_complete_or_absent_and_never_replaces_another_folder(
    export: Export, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_module, "_write_peft", fail)
    done = export("--variant", "lora")
    assert (done.returncode, "No space left on device; free some" in done.stderr) == (1, True)
    assert list((trained.output / STUDY / "export").iterdir()) == []
    monkeypatch.undo()
    folder = folder_of(export("--variant", "lora"))
    (folder / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert folder_of(export("--variant", "lora")) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    export("--variant", "full", "--to", str(folder)).assert_refused("is not this export", "name a new folder")


def test_without_a_variant_the_best_of_all_is_exported(export: Export, trained: Trained) -> None:
    for variant, score in {"full": 0.25, "lora": 0.5, "hydra_lora": 0.75}.items():
        best = trained.rescore(variant, -1, score)
    trained.rescore("lora", 0, 0.0)
    done = export()
    assert folder_of(done).name == f"hydra_lora-{best.fingerprint[:12]}-raw"
    assert "the best of 3 variants" in done.stdout


def test_the_command_that_a_study_prints_works_if_the_best_variant_has_no_adapter(
    export: Export, trained: Trained
) -> None:
    """Study, report, `show` and MLflow print it without a form."""
    for variant, score in {"full": 0.75, "lora": 0.5, "hydra_lora": 0.25}.items():
        trained.rescore(variant, -1, score)
    trained.rescore("lora", 0, 0.0)
    study = StudyFile.read(trained.output / STUDY)
    assert study is not None
    ((_, *words),) = export_words(study, list(trained.store.records()))
    done = export(*words[1:])
    assert folder_of(done).name == f"full-{trained.record('full').fingerprint[:12]}-merged"
    assert "full has no adapter in PEFT's format: every weight of the model is trained" in done.stdout


def test_a_users_variant_loads_from_the_export(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the machine of the export nor that of the reader needs the user's file."""
    store = trained.store
    source = b'"""LoRA."""\n\nfrom variants.baseline.lora import LoRA\n\n\nclass Mine(LoRA):\n    pass\n'
    (tmp_path / "mine.py").write_bytes(source)
    monkeypatch.setattr(catalogue, "_loaded_files", {})
    mine = catalogue.load(str(tmp_path / "mine.py"))
    lora = trained.record("lora")
    choice = replace(lora.configuration.variant, name="mine.py", revision=mine.revision)
    own = replace(lora.configuration, variant=choice, lr_schedule=LRSchedule(4))
    tasks.write_variant(choice, store.data)
    train(
        Script(leases([own])),
        store,
        data=store.data,
        load_base_model=lambda model, task: loading.load_base_model(model, store.bases, "cpu", task),
        adapters=store.adapters / "all",
    )
    StudyFile("own", "", "", (own.fingerprint,)).write(trained.output / "own")
    (tmp_path / "mine.py").unlink()
    catalogue._loaded_files.clear()
    folder = tmp_path / "exported"
    export_module.export_lane(store, trained.output, LaneQuery("own"), "raw", folder)
    assert (folder / "mine.py").read_bytes() == source
    catalogue._loaded_files.clear()
    assert run_card(folder)["variant"].revision == mine.revision
