"""The experiments by the name of their command, and `init`, which copies them into a user's folder.

Their files are in the folder `experiments/` of the repository, one for each question. They are imported as
`orchestrator.experiments.NAME`, because a user's folder may be called `experiments` as well.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from orchestrator.study.option import Option, Options
from orchestrator.util.errors import UsageError, suggest_nearest

if TYPE_CHECKING:
    from orchestrator.launch.experiment import Experiment
    from orchestrator.study.options import StudyOptions

_PACKAGE = Path(__file__).parent
PROJECT = _PACKAGE / "project" if (_PACKAGE / "project").is_dir() else _PACKAGE.parent
"""The folder of what is at the top of the repository: cluster.yaml, constraints.txt, `experiments/`, ...
A wheel has them inside this package."""
__path__ = [str(PROJECT / "experiments")]

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
    return importlib.import_module(f"{__name__}.{MODULES[name]}").EXPERIMENT


def use_script(name: str, path: str) -> None:
    """Take the experiment of a command from the running script, unless it is the one that is installed.

    Args:
        name: Name of the command.
        path: The script, which may be a user's changed copy.
    """
    file = MODULES.get(name, name)
    if Path(path).resolve() != Path(__path__[0], f"{file}.py").resolve():
        sys.modules[f"{__name__}.{file}"] = sys.modules["__main__"]


def options_of(name: str) -> type[StudyOptions]:
    """Return the class of the options of an experiment, for `study.config.make_options`.

    Raises:
        UsageError: There is no such experiment.
    """
    return load(name).options_class


@dataclass(frozen=True, kw_only=True)
class Init(Options):
    """Write cluster.yaml and the scripts of the experiments into a folder of yours.

    `ray up cluster.yaml` there starts a cluster whose nodes get this program as it is installed here; the
    first lines of the file say what comes before. Each script is a command, such as lr_sensitivity.py for
    `study`, and runs as you change it.
    """

    folder: Annotated[Path, Option("FOLDER", position=True)]
    """The folder, new or existing. No file in it is replaced."""

    def run(self) -> int:
        """Write the files and return the exit code."""

        def installed(found: re.Match[str]) -> str:
            path = PROJECT / found[2]
            return f"{found[1]}{path if path.exists() else _PACKAGE.parent / found[2]}"

        source = re.compile(r"(~/lora-orchestrator/.+: |--template-file )(?!experiments)(\S+)")
        names = ["cluster.yaml", *(f"experiments/{each}.py" for each in (*MODULES.values(), "published"))]
        texts = {name: source.sub(installed, (PROJECT / name).read_text()) for name in names}
        if taken := [self.folder / name for name in texts if (self.folder / name).exists()]:
            raise UsageError(f"{taken[0]}: is there, and is not replaced; name another folder.")
        (self.folder / "experiments").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (self.folder / name).write_text(text)
            print(self.folder / name)
        return 0
