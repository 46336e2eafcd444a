"""The experiments: one file for each question.

A file is a script (`python experiments/lr_sensitivity.py`), a command (`lora-orchestrator study`), and the
example to copy for another question: its options, its defaults and its design. What two questions share is in
`orchestrator.launch`. A new file is added to `MODULES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.launch.experiment import Experiment

MODULES = {
    "study": "lr_sensitivity",
    "tuned": "tuned_comparison",
    "sensitivity": "hyperparameter_sensitivity",
    "published": "published",
}
"""Name of the command -> module."""


def load(name: str) -> Experiment:
    """Return the experiment of a command."""
    experiment: Experiment = importlib.import_module(f"experiments.{MODULES[name]}").EXPERIMENT
    return experiment
