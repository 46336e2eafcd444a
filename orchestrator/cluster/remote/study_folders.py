"""Which studies a command has written: on a cluster's head, whose output folder is its own.

python -m orchestrator.cluster.remote.study_folders COMMAND      prints their folders
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orchestrator.record.study_file import read_studies
from orchestrator.study.options import default_output


def find_study_folders(command: str, output: Path) -> list[str]:
    """Whose last command was this one: a script of two stages has two."""
    studies = read_studies(output).values()
    return [str(folder.resolve()) for folder, study in studies if study.command == command]


if __name__ == "__main__":
    print(json.dumps(find_study_folders(sys.argv[1], default_output())))
