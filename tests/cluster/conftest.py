"""Fixtures of the cluster tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import lab as machines
import pytest
from in_process import restored

__all__ = ["restored"]

WORDS = Path(__file__).parents[1] / "finetune" / "words_task.py"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all nodes see, with a tiny model and a task."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from orchestrator.finetune.sources import base_store
    from orchestrator.finetune.tasks.local.letters import tokenizer

    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(WORDS, folder / "words.py")
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with base_store.suppress_transformers_logging():
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def can_have_a_lab() -> None:
    """Skip the test where a lab cannot be created. The reason says what is missing."""
    if reason := machines.missing_requirements():
        pytest.skip(reason)


@pytest.fixture
def lab(can_have_a_lab: None, tmp_path: Path) -> Iterator[machines.Lab]:
    """Yield a lab whose hosts share `tmp_path/shared`. The test fails if processes or mounts remain."""
    folder = tmp_path / "shared"
    folder.mkdir()
    with machines.Lab(read_only=[machines.ROOT], shared=folder) as network:
        yield network
