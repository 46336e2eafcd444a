"""The experiments by the name of their command.

Their files are in the folder `experiments/` beside this package, one for each question. They are imported as
`orchestrator.experiments.NAME`, because a user's folder may be called `experiments` as well.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.util.errors import UsageError, suggest_nearest

if TYPE_CHECKING:
    from orchestrator.launch.experiment import Experiment
    from orchestrator.study.options import StudyOptions

__path__ = [str(Path(__file__).parents[1] / "experiments")]

MODULES = {
    "study": "lr_sensitivity",
    "tuned": "tuned_comparison",
    "sensitivity": "hyperparameter_sensitivity",
    "transfer": "lr_transfer",
}
"""Name of the command that runs an experiment -> its file without `.py`."""


def load(name: str) -> Experiment:
    """Return the experiment of a command.

    Raises:
        UsageError: There is no such experiment.
    """
    if name not in MODULES:
        raise UsageError(f"experiment {name!r}: there is none. {suggest_nearest(name, MODULES)}")
    experiment: Experiment = importlib.import_module(f"{__name__}.{MODULES[name]}").EXPERIMENT
    return experiment


def options_of(name: str) -> type[StudyOptions]:
    """Return the class of the options of an experiment, for `study.config.make_options`.

    Raises:
        UsageError: There is no such experiment.
    """
    return load(name).options_class
