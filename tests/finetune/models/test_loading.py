"""Base models: pretrained by tasks, in folders, on the hub and in packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from huggingface_hub import constants

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.letters import RECIPE, Letters, tokenizer
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError

QUICK = replace(RECIPE, steps=3, batch_size=8, hidden_size=16, intermediate_size=32, layers=1, heads=2)


def silent(_: str) -> None:
    pass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bases"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a tiny random transformers model whose tokenizer has no padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "mine"
    with base_store.suppress_transformers_logging():
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(path)
    words.pad_token = None
    words.save_pretrained(path)
    return path


# -- a base model that a task pretrains ------------------------------------------------------------------


def test_a_task_base_model_is_made_once_and_identified_by_content(root: Path) -> None:
    lines: list[str] = []
    content = model_catalogue.prepare_task_base_model(Letters(QUICK), root, lines.append)
    assert lines[-1].startswith("pretraining letters-base: step 3 of 3")
    made = base_store.base_folder(root, "letters-base", content)
    assert made.name == f"letters-base-{content[:12]}"
    assert base_store.content_hash(made) == content

    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    line_count = len(lines)
    assert model_catalogue.prepare_task_base_model(Letters(QUICK), root, lines.append) == content
    assert len(lines) == line_count
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert not [path for path in root.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_pretraining_does_not_depend_on_threads_or_global_seeds(tmp_path: Path) -> None:
    contents = []
    for i, threads in enumerate((1, 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(i)
        state = torch.get_rng_state()
        contents.append(model_catalogue.prepare_task_base_model(Letters(QUICK), tmp_path / str(i), silent))
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    assert contents[0] == contents[1]


def test_a_task_base_model_loads_frozen_in_the_chosen_dtype(root: Path) -> None:
    content = model_catalogue.prepare_task_base_model(Letters(QUICK), root, silent)
    for dtype in ("float32", "bfloat16"):
        base_model = loading.load_base_model(
            ModelChoice("letters-base", content, dtype), root, "cpu", Letters(QUICK)
        )
        assert {p.dtype for p in base_model.model.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in base_model.model.parameters())
        assert not base_model.model.training
        assert base_model.tokenizer.pad_token_id == 0
        ids = base_model.tokenizer("unk a b c d e =", return_tensors="pt")["input_ids"]
        assert base_model.model(input_ids=ids).logits.shape == (1, 7, len(base_model.tokenizer))


def test_a_missing_or_changed_base_model_is_refused(root: Path) -> None:
    content = model_catalogue.prepare_task_base_model(Letters(QUICK), root, silent)
    with pytest.raises(UsageError, match="prepare it there first"):
        loading.load_base_model(ModelChoice("letters-base", "0" * 64), root, "cpu", Letters(QUICK))
    config = base_store.base_folder(root, "letters-base", content) / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-01'))
    with pytest.raises(UsageError, match="holds content"):
        loading.load_base_model(ModelChoice("letters-base", content), root, "cpu", Letters(QUICK))


# -- base models are made once ---------------------------------------------------------------------------


MAKE_SCRIPT = """
import json, os, sys
from pathlib import Path
from orchestrator.finetune.sources import base_store

def make(folder):
    (folder / "config.json").write_text(json.dumps({"pid": os.getpid()}))
    print("making", flush=True)
    sys.stdin.readline()

print("here", flush=True)
sys.stdin.readline()
print(base_store.get_or_create_base(Path(sys.argv[1]), "thing", "r1", make), flush=True)
"""


def test_two_processes_make_one_base_model(root: Path) -> None:
    """The second process starts while the first makes the model."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-c", MAKE_SCRIPT, str(root)]
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        for process in (first, second):
            assert process.stdout.readline() == "here\n"
        print(file=first.stdin)
        assert first.stdout.readline() == "making\n"
        print(file=second.stdin)
        print(file=first.stdin)
        content = first.stdout.readline().strip()
        assert second.communicate()[0].strip() == content, "it has made none of its own"
    assert [p.name for p in root.glob("thing-*")] == [f"thing-{content[:12]}"]


# -- folders ---------------------------------------------------------------------------------------------


def test_a_folder_is_identified_by_its_files(folder: Path, root: Path) -> None:
    content = model_catalogue.find_content(str(folder), root)
    (folder / "README.md").write_text("notes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0.1"}))
    assert (
        model_catalogue.find_content(str(folder), root) == content
    )  # a README and the version of transformers are not content
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert model_catalogue.find_content(str(folder), root) != content


def test_a_folder_loads_from_any_working_directory_with_a_padding_token(
    folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    content = model_catalogue.prepare_base_model("./mine", root, silent)
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    base_model = loading.load_base_model(ModelChoice("./mine", content), root, "cpu", Letters(QUICK))
    assert base_model.tokenizer.pad_token == base_model.tokenizer.eos_token == "<eos>"
    assert base_model.device == torch.device("cpu")

    (folder / "config.json").write_text((folder / "config.json").read_text() + " \n")
    loading.load_base_model(
        ModelChoice("./mine", content), root, "cpu", Letters(QUICK)
    )  # white space in JSON is not content
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds content"):
        loading.load_base_model(ModelChoice("./mine", content), root, "cpu", Letters(QUICK))


def test_overwriting_weight_files_does_not_change_a_loaded_model(folder: Path, root: Path) -> None:
    """On a CPU, safetensors maps the file into memory, but its content is verified only on loading."""
    content = model_catalogue.prepare_base_model(str(folder), root, silent)
    base_model = loading.load_base_model(ModelChoice(str(folder), content), root, "cpu", Letters(QUICK))
    before = {name: tensor.clone() for name, tensor in base_model.model.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(b"\x3f" * 4096)
    assert base_store.content_hash(folder) != content
    after = base_model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_folder_without_the_tokenizers_words_is_refused(kind: str, root: Path, tmp_path: Path) -> None:
    """transformers would make a tokenizer of special tokens alone, which cannot distinguish texts."""
    folder = encoders.save(kind, tmp_path / kind)
    choice = ModelChoice(str(folder), base_store.content_hash(folder))
    assert len(loading.load_processor(choice, root, catalogue.get("reviews"))) > 5
    for file in folder.glob("*token*"):
        file.unlink()
    choice = ModelChoice(str(folder), base_store.content_hash(folder))
    with pytest.raises(UsageError, match=r"has no words; put the tokenizer's files \(tokenizer\.json"):
        loading.load_processor(choice, root, catalogue.get("reviews"))


def test_a_model_with_custom_code_is_refused_without_a_prompt(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at the terminal whether to run the code."""
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match="custom code"):
        loading.build_meta_model(
            ModelChoice(str(folder), base_store.content_hash(folder)), root, Letters(QUICK)
        )


# -- names, the hub, the package -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub cache of a machine that cannot reach the hub.

    huggingface_hub reads HF_HUB_OFFLINE and HF_HUB_CACHE on import, so the fixture sets its constants.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_unreachable_hub_model_is_one_line_with_remedies(root: Path, cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        model_catalogue.prepare_base_model("some-lab/some-model", root, silent)
    message = str(caught.value)
    assert message.startswith("Model 'some-lab/some-model' cannot be read from the model hub")
    assert "\n" not in message
    assert all(way in message for way in ("HF_TOKEN", "HF_HUB_OFFLINE=1", "local folder"))


def test_a_cached_hub_model_is_pinned_to_its_commit_and_loads(folder: Path, root: Path, cache: Path) -> None:
    name, commit, newer = "some-lab/some-model", "1" * 40, "2" * 40
    repository = cache / "models--some-lab--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder.rename(repository / "snapshots" / commit)
    assert model_catalogue.find_content(name, root) is None
    assert model_catalogue.prepare_base_model(name, root, silent) == commit
    (repository / "refs" / "main").write_text(newer)
    assert (
        model_catalogue.prepare_base_model(name, root, silent)
        == model_catalogue.find_content(name, root)
        == commit
    )
    base_model = loading.load_base_model(ModelChoice(name, commit), root, "cpu", Letters(QUICK))
    assert (type(base_model.model).__name__, base_model.tokenizer.pad_token) == ("LlamaForCausalLM", "<eos>")

    os.truncate(repository / "snapshots" / commit / "model.safetensors", 5000)
    with pytest.raises(UsageError, match="remove a damaged file from the hub's cache") as refused:
        loading.load_base_model(ModelChoice(name, commit), root, "cpu", Letters(QUICK))
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="with the blob that it links to"):  # before Ray is started
        model_catalogue.find_content(name, root)
