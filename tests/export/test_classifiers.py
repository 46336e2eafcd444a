"""Exports of lanes with a head: a text classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoders import save
from scripted import Script, configuration, get_record, leases, train
from trained_study import run_card
from transformers import AutoTokenizer

from orchestrator.export.export import export_lane
from orchestrator.export.lane_choice import LaneQuery
from orchestrator.export.model_card import Form
from orchestrator.finetune.models import catalogue as models
from orchestrator.finetune.models import loading
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import ModelChoice

SENTENCES = ["a good film", "a bad film", "the plot is dull", "what a lovely evening"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder with a study of one LoRA on `reviews`, over a small random BERT."""
    folder = tmp_path_factory.mktemp("classifier")
    output, base = folder / "results", save("bert", folder / "bert")
    store = Store(output / "store")
    content = models.prepare_base_model(str(base), store.bases, lambda text: None)
    made = configuration(task="reviews", steps=4, evaluations=1, max_length=64)
    made = replace(made, model=ModelChoice(str(base), content))
    train(
        Script(leases([made])),
        store,
        data=store.data,
        load_base_model=lambda model, task: loading.load_base_model(model, store.bases, "cpu", task),
        adapters=store.adapters / "best",
    )
    assert get_record(store, made).state == "finished"
    StudyFile("reviews", "", "python x.py", (made.fingerprint,)).write(output / "reviews")
    return output


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits


def test_a_classifier_keeps_its_head_in_every_form(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All forms, loaded as their model cards say, give the same logits; a merged model names the classes."""
    store, found = Store(output / "store"), {}
    forms: tuple[Form, ...] = ("peft", "raw", "merged")
    for form in forms:
        done = export_lane(store, output, LaneQuery("reviews"), form, notify=lambda line: None)
        variables = run_card(done.folder, SENTENCES[0])
        if form != "raw":
            assert capsys.readouterr().out.splitlines()[-1] in tasks.get("reviews").labels
        if form == "raw":
            with variables["adapters"].activate_lanes(["lane"], None):
                found[form] = logits(variables["base"], done.folder)
        else:
            found[form] = logits(variables["model"], done.folder)
        card = (done.folder / "README.md").read_text()
        assert "pipeline_tag: text-classification" in card
        assert "Classes, in the order of the outputs: " in card
    assert found["peft"].std() > 1e-3
    torch.testing.assert_close(found["merged"], found["raw"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["peft"], found["raw"], rtol=1e-4, atol=1e-5)
    assert tuple(variables["model"].config.id2label.values()) == tasks.get("reviews").labels
