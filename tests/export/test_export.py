"""`python -m orchestrator export`: what it writes loads elsewhere and has the scores of the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import Ended
from letters_score import recorded_scores, run_card, validation_scores
from safetensors import SafetensorError
from trained_study import STUDY, Trained, changed
from transformers import AutoModelForCausalLM

from orchestrator.export import export_lane
from orchestrator.export.export_folder import MARK_FILE, ExportMark, write_folder
from orchestrator.export.export_lane import ExportRequest
from orchestrator.export.lane_choice import LaneQuery, choose_lane
from orchestrator.export.model_card import CardFacts, _scores, render_card
from orchestrator.finetune.sources import own_variants
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local.letters import LENGTH
from orchestrator.launch.reporting import export_words
from orchestrator.record.kept_adapters import find_adapter
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import UsageError
from variants import catalogue

Export = Callable[..., Ended]

pytestmark = pytest.mark.xdist_group("export")  # the tests of a group share the trained study


def folder_of(done: Ended) -> Path:
    """Return the folder that a successful export has printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1].rpartition(": ")[0])


def test_the_best_adapter_has_the_scores_of_its_record_in_peft(
    export: Export, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python lines of the model card load the adapter, and print its answer."""
    folder, record = folder_of(export("--variant", "lora")), trained.record("lora")
    assert (record.score("validation") or 0) > 0.2, "the lane has learnt something"
    model = run_card(folder)["model"]
    assert len(capsys.readouterr().out.splitlines()[-1].split()) == LENGTH
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert validation_scores(model, folder, record) == pytest.approx(recorded_scores(record), rel=1e-4)
    card = (folder / "README.md").read_text()
    for text in (record.configuration.model.content, record.fingerprint, "pipeline_tag: text-generation"):
        assert text in card
    assert f"{record.score('test'):.4f}" in card
    command = f"export rates {record.fingerprint[:12]} --output {trained.output}"
    assert f"exported by: `python -m orchestrator {command}`" in card
    assert not (trained.store.root / "scratch").exists(), "a store that is only read is sufficient"


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_merged_model_is_a_plain_model_of_transformers(
    export: Export, trained: Trained, tmp_path: Path, variant: str
) -> None:
    target, record = tmp_path / "here" / "merged", trained.record(variant)
    assert folder_of(export("--variant", variant, "--merge", "--to", str(target))) == target
    model = AutoModelForCausalLM.from_pretrained(target)
    assert validation_scores(model, target, record) == pytest.approx(recorded_scores(record), rel=1e-4)
    assert type(run_card(target)["model"]) is type(model)
    assert f" {record.fingerprint[:12]} --merge --output " in (target / "README.md").read_text()


def test_a_variant_without_other_forms_is_exported_exactly(export: Export, trained: Trained) -> None:
    record = trained.record("hydra_lora")
    done = export("--variant", "hydra_lora")
    assert "hydra_lora has no adapter in PEFT's format: " in done.stdout
    assert "; the exact tensors will be written (for an adapter take another --variant)" in done.stdout
    folder = folder_of(done)
    variables = run_card(folder)
    with variables["adapters"].activate_lanes(["lane"], None):
        scores = validation_scores(variables["base"], folder, record)
    assert scores == pytest.approx(recorded_scores(record), rel=1e-4)


def test_a_lane_without_an_adapter_is_trained_again(export: Export, trained: Trained) -> None:
    """Its record stays as it is, and the adapter is kept for the next time."""
    record = trained.record("lora", 0)
    before = {path: path.read_bytes() for path in trained.store.records_folder.rglob("*.json")}
    done = export(record.fingerprint[:10])
    assert "was not kept; training it again: about" in done.stdout
    assert "step 40 of 40" in done.stdout
    assert "are those of the record" in done.stdout
    folder = folder_of(done)
    assert validation_scores(run_card(folder)["model"], folder, record) == pytest.approx(
        recorded_scores(record), rel=1e-4
    )
    assert {path: path.read_bytes() for path in trained.store.records_folder.rglob("*.json")} == before
    assert list(trained.store.checkpoints.glob("*")) == []
    again = export(record.fingerprint[:10])
    assert folder_of(again) == folder
    assert "training" not in again.stdout


def test_an_export_with_other_scores_says_so(export: Export, trained: Trained) -> None:
    """This happens on another device. The store does not keep the new adapter for the record."""
    record = trained.rescore("lora", 0, 0.875)
    done = export(record.fingerprint)
    assert "the results differ from the record's" in done.stdout
    assert "was not kept. This one was trained again" in (folder_of(done) / "README.md").read_text()
    assert find_adapter(trained.store, record) is None


def test_a_model_card_has_no_row_for_a_split_without_an_evaluation(trained: Trained) -> None:
    record = trained.record("lora")
    only = tuple(each for each in record.evaluations if each.split == "validation")
    rows = list(_scores(replace(record, evaluations=only)))
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| validation"]


def test_only_an_earlier_export_of_the_same_lane_is_replaced(
    export: Export, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the new export fails halfway, the earlier one stays, and nothing else is left."""
    folder = folder_of(export("--variant", "lora"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_lane, "_save_processor", fail)
    done = export("--variant", "lora")
    assert (done.returncode, f"{folder}: No space left on device; free some" in done.stderr) == (1, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.undo()
    (folder / MARK_FILE).with_name("notes.txt").write_text("mine")
    export("--variant", "lora").assert_refused("notes.txt", "name a new folder")


def test_an_interruption_between_two_renames_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark, rename = tmp_path / "x", ExportMark("rates", "f" * 64, "raw"), Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if (source / "file").read_text() == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    def write_new(draft: Path) -> None:
        (draft / "file").write_text("new")

    write_folder(folder, mark, lambda draft: (draft / "file").touch())
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, mark, write_new)
    assert (folder / "file").read_text() == ""
    assert list(tmp_path.iterdir()) == [folder]


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


def test_the_reason_tells_equal_variants_and_an_unfinished_study(trained: Trained) -> None:
    """The model card has it as a part of a sentence, also for a lane that the user has named."""
    for variant, score in {"full": 0.5, "lora": 0.5, "hydra_lora": 0.25}.items():
        trained.rescore(variant, -1, score)
    best, folder = trained.record("lora"), trained.output / STUDY
    study = StudyFile.read(folder)
    assert study is not None
    study.with_configurations([replace(best.configuration, seed=1).fingerprint], ()).write(folder)
    chosen = choose_lane(trained.store, trained.output, LaneQuery(STUDY))
    assert chosen.record == best
    reason = (
        "it is the best lora, the best of 3 variants together with full (4 of 5 configurations have ended)"
    )
    assert chosen.reason == reason
    named = choose_lane(trained.store, trained.output, LaneQuery(STUDY, best.fingerprint))
    facts = CardFacts("raw", "base", None, (), "", None)
    for each in (chosen, named):
        card = render_card(each, tasks.get("letters"), facts)
        assert f"This lane was exported because {each.reason}." in card
    assert named.reason == "its fingerprint was given"


def test_the_card_counts_a_collapsed_run_as_such(trained: Trained) -> None:
    trained.rescore("lora", 0, 0.5)
    trained.rescore("lora", -1, 0.0)
    chosen = choose_lane(trained.store, trained.output, LaneQuery(STUDY, variant="lora"))
    card = render_card(chosen, tasks.get("letters"), CardFacts("raw", "base", None, (), "", None))
    assert "runs of this variant in the study: 2 (1 finished, 1 collapsed)" in card


def test_a_users_variant_is_trained_again_alone_and_loads_from_the_export(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the machine of the export nor that of the reader needs the user's file."""
    store, source = (
        trained.store,
        b'"""LoRA."""\n\nfrom variants.baseline.lora import LoRA\n\n\nclass Mine(LoRA):\n    pass\n',
    )
    (tmp_path / "mine.py").write_bytes(source)
    monkeypatch.setattr(catalogue, "_loaded_files", {})
    mine = catalogue.load(str(tmp_path / "mine.py"))
    lora = trained.record("lora", 0)
    choice = replace(lora.configuration.variant, name="mine.py", revision=mine.revision)
    record = changed(lora, variant=choice)
    own_variants.write_entry(choice, store.data)
    store.put(record)
    StudyFile("own", "", "", (record.fingerprint,)).write(trained.output / "own")
    (tmp_path / "mine.py").unlink()
    catalogue._loaded_files.clear()
    request = ExportRequest(LaneQuery("own"), "raw", tmp_path / "exported")
    refused = []

    def notify(line: str) -> None:
        if line.startswith("step 40"):
            with pytest.raises(UsageError, match="another export is training it; wait") as error:
                export_lane.export_lane(store, trained.output, request, lambda line: None)
            refused.append(error)
            assert list(store.checkpoints.glob("*")) == [], "gc would remove them"

    folder = export_lane.export_lane(store, trained.output, request, notify).folder
    assert len(refused) == 1
    assert {path.name for path in (trained.output / "own").glob(".*")} == set(), "nothing is left behind"
    assert (folder / "mine.py").read_bytes() == source
    catalogue._loaded_files.clear()
    assert run_card(folder)["variant"].revision == mine.revision
