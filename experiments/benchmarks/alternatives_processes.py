"""The study of `makespan.py` in plain processes with PEFT, without Ray: a pool that takes run after run.

python alternatives_processes.py STUDY.json SCORES.json --processes 2
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from alternatives_peft import FineTune, Run, Study, read_options

_STATE: dict[str, Any] = {}
"""The study and the base model of this process."""


def start_process(file: Path) -> None:
    """Load the study and the base model once for all runs of this process."""
    torch.set_num_threads(1)
    _STATE["study"] = Study.read(file)
    _STATE["base"] = _STATE["study"].load_base()


def train(run: Run) -> tuple[str, dict[str, float]]:
    """Train a run. Returns its name and scores."""
    return run.key, FineTune(_STATE["study"], _STATE["base"], run).train()


def run() -> None:
    """Train the study of the command line."""
    options = read_options(__doc__)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, start_process, (options.study,)) as pool:
        scores = dict(pool.imap_unordered(train, Study.read(options.study).runs))
    options.scores.write_text(json.dumps(scores))


if __name__ == "__main__":
    run()
