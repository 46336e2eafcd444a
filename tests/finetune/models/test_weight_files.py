"""The checks of weight files, which read headers only, accept and refuse the same files as transformers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources.base_store import content_hash, suppress_transformers_logging
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.letters import RECIPE, Letters
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder `base`, which a test may change."""
    return Path(shutil.copytree(base, tmp_path / "m"))


def weight_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def pop_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Remove the weight file from the folder and return its tensors."""
    found = load_file(weight_file(folder))
    weight_file(folder).unlink()
    return found


def truncate(file: Path, size: int = -1) -> None:
    """Truncate a file to `size` bytes, by default to half its size."""
    os.truncate(file, file.stat().st_size // 2 if size < 0 else size)


def split_into_shards(folder: Path, ending: str = "safetensors") -> Path:
    """Split the weights into two files and an index, and return the second file."""
    found = sorted(pop_tensors(folder).items())
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{k}-of-00002.{ending}" for k in (1, 2)]
    parts = dict(zip(names, (dict(found[::2]), dict(found[1::2])), strict=True))
    for name, part in parts.items():
        if ending == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder / names[1]


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Split the weights and change the index."""
    split_into_shards(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def save_with_torch(folder: Path, **options: Any) -> Path:
    """Replace the weights by a file of torch.save, and return it."""
    torch.save(pop_tensors(folder), folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


class Planted:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


def save_code_in_pickle(folder: Path) -> None:
    torch.save({**pop_tensors(folder), "more": Planted()}, folder / "pytorch_model.bin")


GOOD: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda folder: None,
    "shards": split_into_shards,
    "a file of torch.save": save_with_torch,
    "a file of an old torch.save": lambda folder: save_with_torch(
        folder, _use_new_zipfile_serialization=False
    ),
    "shards of torch.save": lambda folder: split_into_shards(folder, "bin"),
    "safetensors beside rubbish that is not read": lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"x"),
}

BAD: dict[str, Callable[[Path], object]] = {
    "no file": pop_tensors,
    "an empty file": lambda f: weight_file(f).write_bytes(b""),
    "a byte too few": lambda f: truncate(weight_file(f), weight_file(f).stat().st_size - 1),
    "a pickle": lambda f: weight_file(f).write_bytes(pickle.dumps({"a": 1})),
    "a shard missing": lambda f: split_into_shards(f).unlink(),
    "an index cut": lambda f: (split_into_shards(f), truncate(f / SAFE_WEIGHTS_INDEX_NAME)),
    "an index of a file elsewhere": lambda f: change_index(
        f, lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], "../elsewhere.safetensors"))
    ),
    "a plain pickle": lambda f: save_with_torch(f).write_bytes(pickle.dumps({"a": 1})),
    "torch.save's with code": save_code_in_pickle,
    "torch.save's shard missing": lambda f: split_into_shards(f, "bin").unlink(),
}


def load_with_transformers(folder: Path) -> Any:
    with suppress_transformers_logging():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", GOOD)
def test_what_transformers_loads_is_accepted(case: str, folder: Path) -> None:
    expected = load_file(weight_file(folder))
    GOOD[case](folder)
    model_catalogue.check_weight_files(folder, "m")
    found = load_with_transformers(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_what_transformers_cannot_load_is_one_line(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    BAD[case](folder)
    with pytest.raises(UsageError) as refused:
        model_catalogue.check_weight_files(folder, "m")
    text = str(refused.value)
    assert str(folder) in text
    assert "save_pretrained" in text
    assert "\n" not in text
    with pytest.raises(Exception):  # noqa: B017, PT011  # its type depends on the damage
        load_with_transformers(folder)
    assert not (tmp_path / "planted").exists(), "code in a pickle was run"


def test_weights_for_another_model_are_one_line(folder: Path, tmp_path: Path) -> None:
    """transformers would draw the missing weights at random and only log a warning."""
    found = pop_tensors(folder)
    save_file(
        {f"other.{name}": tensor for name, tensor in found.items()}, weight_file(folder), {"format": "pt"}
    )
    content = model_catalogue.find_content(str(folder), tmp_path)
    assert content is not None
    with pytest.raises(UsageError, match=r"no weights for lm_head\.weight and \d+ more"):
        loading.load_base_model(ModelChoice(str(folder), content), tmp_path, "cpu", Letters(RECIPE))


def change_config(folder: Path, **values: Any) -> None:
    """Set values in the model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights in their file."""
    found = pop_tensors(folder)
    change(found)
    save_file(found, weight_file(folder), {"format": "pt"})


def set_first_number(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return a function that sets the first number of the first weight with `key` in its name."""
    return lambda found: next(found[name] for name in sorted(found) if key in name).view(-1)[0].fill_(value)


def remove_weights(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return a function that removes the weights with `key` in their names."""
    return lambda found: [found.pop(name) for name in list(found) if key in name]


QUERY = "encoder.layer.1.attention.self.query"
UNFIT_WEIGHTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "wider layers": (
        "label",
        lambda f: change_config(f, intermediate_size=48),
        r"size \[64\].*asks for \[48\]",
    ),
    "more tokens": (
        "label",
        lambda f: change_config(f, vocab_size=300),
        r"word_embeddings.*asks for \[300, 32\]",
    ),
    "fewer blocks": (
        "label",
        lambda f: change_config(f, num_hidden_layers=1),
        "asks for 1 blocks in bert.encoder.layer",
    ),
    "a layer that is not there": (
        "label",
        lambda f: change_weights(f, remove_weights(QUERY)),
        f"no weights for bert.{QUERY}",
    ),
    "half a layer": (
        "label",
        lambda f: change_weights(f, remove_weights(f"{QUERY}.bias")),
        f"no weights for bert.{QUERY}",
    ),
    "a number that is none": (
        "forced",
        lambda f: change_weights(f, set_first_number("up_proj", float("nan"))),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", UNFIT_WEIGHTS)
def test_weights_that_would_be_drawn_or_left_out_in_silence_are_one_line(
    case: str, folder: Path, tmp_path: Path
) -> None:
    kind_of_answer, damage, message = UNFIT_WEIGHTS[case]
    task = Letters(RECIPE) if kind_of_answer == "forced" else catalogue.get("reviews")
    if kind_of_answer == "label":
        folder = encoders.save("bert", tmp_path / "bert")
    loading.load_base_model(ModelChoice(str(folder), content_hash(folder)), tmp_path, "cpu", task)
    damage(folder)
    with pytest.raises(UsageError, match=message) as refused:
        loading.load_base_model(ModelChoice(str(folder), content_hash(folder)), tmp_path, "cpu", task)
    assert "\n" not in str(refused.value)


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    """transformers would load the adapter and its base model in place of the model in the folder."""
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}'
    )
    with pytest.raises(UsageError, match="merge_and_unload"):
        model_catalogue.check_weight_files(folder, "m")


def test_missing_files_in_a_hub_cache_are_accepted(folder: Path) -> None:
    split_into_shards(folder).unlink()
    model_catalogue.check_weight_files(folder, "m", complete=False)
    truncate(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match=r"model-00001-of-00002.*remove it from the cache, with the blob"):
        model_catalogue.check_weight_files(folder, "m", complete=False)
    for path in folder.glob("model*"):
        path.unlink()
    model_catalogue.check_weight_files(folder, "m", complete=False)
