"""A user's task in one file beside its data, outside of the package, works without any other change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study
import torch
from ray.cluster_utils import Cluster
from transformers import BertConfig, BertModel

from orchestrator.analyze.best_lanes import best_fingerprints
from orchestrator.finetune.tasks.pretraining import word_tokenizer
from orchestrator.record import gc
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(900)]

TASK = """
from functools import lru_cache
from pathlib import Path

from orchestrator.finetune.sources import data_files
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults, hash_split
from orchestrator.util.errors import UsageError

FILE = Path(__file__).with_name("mail.jsonl")


class Mail(Task):
    title = "mail, spam or ham"
    metric = "accuracy"
    floor = 0.5
    default_model = "reviews-base"
    output = "classification"
    labels = ("ham", "spam")
    defaults = TaskDefaults(
        train_size=60, validation_size=20, test_size=20, steps=12, batch_size=8, max_length=16,
        evaluations=2, learning_rates=(1e-2, 3e-2),
    )

    def examples(self, split, count):
        found = _examples()[split]
        if count > len(found):
            raise UsageError(f"Task {self.name!r} has {len(found)} {split} examples, {count} are needed.")
        return found[:count]


@lru_cache
def _examples():
    found = {"train": [], "validation": [], "test": []}
    for row in data_files.read(FILE, {"text": str, "spam": range(2)}, "mail"):
        found[hash_split(row["text"])].append(Example(row["text"], Mail.labels[row["spam"]]))
    found["test"].insert(0, found["train"][0])
    return found
"""
WORDS = ("<pad>", *(f"w{i}" for i in range(20)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a task file, its data and a small base model."""
    (tmp_path / "mail_task.py").write_text(TASK)
    rows = [
        {"text": f"w{i % 19} w{i // 19} w{(7 * i) % 13}", "spam": int(i % 19 > 9), "from": "me"}
        for i in range(200)
    ]
    (tmp_path / "mail.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    small = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(small).save_pretrained(tmp_path / "base")
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_users_task_runs_in_a_study(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All paths are relative to the working folder of the command."""
    arguments = ("--task", "mail_task.py", "--model", "./base", "--variants", "lora", "--seeds", "1")
    arguments += ("--learning-rates", "1e-2", "3e-2", "--widen", "0")
    output = folder / "results"
    monkeypatch.chdir(folder)
    assert study.run_here(Path("results"), *arguments, "--trainers", "1", address=cluster.address) == 0
    assert "2 trained" in capsys.readouterr().out
    found = list(study.records(output).values())
    assert sorted(r.configuration.optimizer.learning_rate for r in found) == [1e-2, 3e-2]
    for record in found:
        assert record.state == "finished"
        assert record.configuration.task.name == "mail_task.py"
        assert len(record.items["test"].answers) == record.configuration.task.test_size
        assert set(record.items["test"].answers) <= {"ham", "spam"}
    leak = "! mail, spam or ham: 1 of 20 test rows have the input of a training row"
    assert leak in (output / "lr_sensitivity-mail_task-base" / "study.log").read_text()
    assert (output / "lr_sensitivity-mail_task-base" / "report.html").exists()
    store = Store(output / "store")
    kept = sorted(path.name for path in store.data.glob("*.arrow"))
    assert len(kept) == 6, "examples and token ids of three splits, written once for driver and workers"
    assert all(name.startswith(f"{found[0].configuration.task.content}-") for name in kept)
    gc.collect_garbage(store, output, best_fingerprints, older_than=0.0)
    assert sorted(path.name for path in store.data.glob("*.arrow")) == kept, "complete files are kept"

    rows = (folder / "mail.jsonl").read_text().splitlines()
    rows[41] = rows[41].replace('"spam": ', '"spam": 1')
    (folder / "mail.jsonl").write_text("\n".join(rows))
    code, out, err = study.run(
        Path("results"), *arguments, cwd=folder
    )  # this process has cached the old rows
    assert code == 2, out + err
    assert err.startswith(f"error: Task 'mail': {folder / 'mail.jsonl'}: row 42: 'spam' must be a class from")
    assert err.count("\n") == 1, err
    assert "Ray" not in out, "the task is refused before Ray is started"
