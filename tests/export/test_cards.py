"""The lines of a model card, run in a process without this project, give the scores of the lane's record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_folder
import numpy as np
import pytest
from data_rows import CHATS, MAILS, PAIRS, SUMS, write
from encoders import save
from image_data import picture
from resolved import resolve_one_task
from scripted import Script, get_record, leases, train
from tiny_images import vit
from transformers import AutoTokenizer, BertForSequenceClassification, ViTForImageClassification

from orchestrator.export.export import export_lane
from orchestrator.export.lane_choice import LaneQuery
from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve.data import prepare_datasets, write_own_files
from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.examples import Example
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.options import StudyOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE_TURN = [{"messages": row["messages"][1:]} for row in CHATS]
NUMBERS = [{**row, "label": 2 + i % 3 / 2} for i, row in enumerate(MAILS)]
ROWS = {
    "sums": SUMS,
    "chats": ONE_TURN,
    "lines": ONE_TURN,
    "mails": MAILS,
    "pairs": PAIRS,
    "numbers": NUMBERS,
}
READER = """
import io, json, sys
from contextlib import redirect_stdout
sys.modules["orchestrator"] = sys.modules["variants"] = None  # an import of them is an error
answers = []
for (load, predict), inputs in json.load(sys.stdin):
    variables, said = {}, []
    exec(load, variables)
    for values in inputs:
        text = predict
        for name, value in values.items():
            text = text.replace(name, json.dumps(value)[1:-1])
        with redirect_stdout(io.StringIO()) as printed:
            exec(text, variables)
        ids = variables["inputs"].get("input_ids")
        said.append([printed.getvalue().strip(), None if ids is None else ids[0].tolist()])
    answers.append(said)
json.dump(answers, sys.stdout)
"""
"""A program that runs the lines of cards for several inputs, and prints the answers and the token ids."""


def llama(folder: Path, *, has_template: bool) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(hub_folder.llama(folder))
    tokenizer.chat_template = CHATML if has_template else None
    tokenizer.save_pretrained(folder)
    return folder


def with_head(folder: Path, model_class: Any) -> Path:
    """Give a saved encoder a head of seven classes, as a fine-tuned model of the hub has."""
    with suppress_transformers_logging():
        model_class.from_pretrained(folder, num_labels=7).save_pretrained(folder)
    return folder


def pictures(folder: Path) -> Path:
    for number in range(30):
        place = folder / ("red", "green", "blue")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number, number % 3))
    return folder


def trained(output: Path, name: str, source: Path, base: Path) -> Record:
    """Train one lane on a user's data, as the study `name`, and return its record."""
    metric = {"numbers": "pearson", "chats": "token_f1"}.get(name)
    options = StudyOptions(
        data=(str(source),),
        model=str(base),
        variants=("lora",),
        rank=4,
        metric=metric,
        max_new_tokens=4 if name == "chats" else None,
        steps=4,
        batch_size=4,
        evaluations=1,
    )
    store = Store(output / "store")
    _, (template,) = resolve_one_task(options, store.bases)
    made = replace(template, optimizer=replace(template.optimizer, learning_rate=1e-3))
    write_own_files([made], store.data)
    prepare_datasets([made], store.bases, store.data, lambda line: None)
    train(
        Script(leases([made])),
        store,
        data=store.data,
        load_base_model=lambda model, task: loading.load_base_model(model, store.bases, "cpu", task),
        adapters=store.adapters / "best",
    )
    StudyFile(name, "", "python x.py", (made.fingerprint,)).write(output / name)
    return get_record(store, made)


def values(example: Example, file: Path) -> dict[str, str]:
    """Return what a user writes in place of the words in capitals."""
    if example.image is not None:
        file.write_bytes(example.image.read())
        return {"FILE": str(file)}
    if example.prompt.startswith("["):
        (message,) = json.loads(example.prompt)
        return {"INPUT": message["content"]}
    return {"SECOND INPUT": example.pair or "", "INPUT": example.prompt}


@pytest.mark.slow
def test_the_lines_of_every_card_give_the_prompts_and_scores_of_the_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bases with a head of another size, as fine-tuned models have, included."""
    monkeypatch.setattr(tasks, "_own_tasks", {})
    bert = with_head(save("bert", tmp_path / "bert"), BertForSequenceClassification)
    image_model = with_head(vit(tmp_path / "vit"), ViTForImageClassification)
    plain, chat = (llama(tmp_path / f"llama{each}", has_template=each) for each in (False, True))
    bases = {"sums": plain, "lines": plain, "chats": chat, "colors": image_model}
    sources = {name: write(tmp_path / f"{name}.jsonl", rows[:30]) for name, rows in ROWS.items()}
    sources["colors"] = pictures(tmp_path / "colors")
    cards, expected = [], []
    for name, source in sources.items():
        output = tmp_path / "results"
        record = trained(output, name, source, bases.get(name, bert))
        task = tasks.find(record.configuration.task, output / "store" / "data")
        examples = task.load(record.configuration.task)["test"]
        inputs = [values(each, tmp_path / f"{number}.png") for number, each in enumerate(examples)]
        for form in ("peft", "merged"):
            done = export_lane(Store(output / "store"), output, LaneQuery(name), form, notify=str)
            card = (done.folder / "README.md").read_text().replace("FOLDER", str(done.folder))
            cards.append((re.findall(r"```python\n(.*?)```", card, re.DOTALL), inputs))
            expected.append((name, task, record, examples, bases.get(name, bert)))
    reader = subprocess.run(
        [sys.executable, "-I", "-c", READER], input=json.dumps(cards), capture_output=True, text=True
    )
    assert reader.returncode == 0, reader.stderr
    for expectation, answers in zip(expected, json.loads(reader.stdout), strict=True):
        name, task, record, examples, base = expectation
        pairs = [(example, answer) for example, (answer, _) in zip(examples, answers, strict=True)]
        if task.output == "regression":
            found = np.corrcoef([[float(e.answer), float(answer)] for e, answer in pairs], rowvar=False)[0, 1]
        elif task.output == "generation":
            found = np.mean([task.grade(example, answer) for example, answer in pairs])
        else:
            found = np.mean([answer == example.answer.strip() for example, answer in pairs])
        assert found == pytest.approx(record.score("test"), abs=1e-4), name
        if task.inputs == "text":
            tokenizer = AutoTokenizer.from_pretrained(base)
            encoded = [task.encode(example, tokenizer) for example in examples]
            assert [ids for _, ids in answers] == [[*e.ids[: e.prompt_length]] for e in encoded], name
