"""Generation that runs out of memory, in a separate process that writes the results to a file."""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from short_of_memory import MALLOPT, limit, status
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.finetune.evaluation.cached_forward import CachedForward
from orchestrator.finetune.evaluation.evaluated_lanes import EvaluatedLanes
from orchestrator.finetune.evaluation.generate import generate_answers
from orchestrator.finetune.failures import free_memory
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local.letters import VOCABULARY, tokenizer
from variants import catalogue as variants
from variants.api import VariantSettings
from variants.attach import attach

ROWS = 64
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
WORDS_TASK = str(Path(__file__).with_name("words_task.py"))


def make_base_model() -> BaseModel:
    """Return a model whose cache takes 64 KiB for each token, 88 MiB for half of the rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=256,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=VOCABULARY.index("<pad>"),
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return BaseModel(model, tokenizer(), torch.device("cpu"))


def halve_rows(folder: Path) -> None:
    """Generate answers with memory for half of the rows of a batch."""
    if sys.platform == "linux":
        for option in (M_ARENA_MAX, M_MMAP_THRESHOLD):
            assert ctypes.CDLL(None).mallopt(option, MALLOPT[option]) == 1
    torch.set_num_threads(1)
    base_model, task = make_base_model(), type(tasks.get(WORDS_TASK))()
    task.max_new_tokens = 12  # type: ignore[misc]
    adapters = attach(base_model.model, variants.get("lora"), VariantSettings(rank=4, alpha=8.0), "blocks")
    adapters.add_lane("x", adapters.variant.validate_settings(VariantSettings(rank=4, alpha=8.0)), seed=0)
    prompts = [(item, [4 + item % 8] * 32) for item in range(ROWS)]
    rows: list[int] = []
    sizes: list[int] = []
    call = CachedForward._call

    def counting(self: CachedForward, *inputs: torch.Tensor) -> torch.Tensor:
        rows.append(len(inputs[0]))
        logits = call(self, *inputs)
        sizes.append(status("VmSize"))
        return logits

    CachedForward._call = counting  # type: ignore[method-assign]

    def generate(count: int) -> Any:
        rows.clear()
        sizes.clear()
        return generate_answers(
            base_model,
            task,
            prompts[:count],
            32,
            EvaluatedLanes.of(adapters, ["x"], [0]),
            SINGLE_PROCESS_GROUP,
        )

    peaks, answers = [], []
    generate(ROWS)  # what torch allocates once per process is no part of the peaks
    free_memory()
    for count in (ROWS // 2, ROWS):
        answers = generate(count)
        free_memory()
        peaks.append(max(sizes))
    limit((peaks[0] + peaks[1]) // 2)
    share_before = base_model.generation.memory_share
    answers_short = generate(ROWS)
    first_rows, share_after = list(rows), base_model.generation.memory_share
    generate(ROWS)
    limit(resource.RLIM_INFINITY)
    results = {
        "answers": answers,
        "answers_short": answers_short,
        "share_before": share_before,
        "share_after": share_after,
        "rows": first_rows,
        "later_rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(results))


def read_results(folder: Path) -> dict[str, Any]:
    """Return what `halve_rows` has written."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results
