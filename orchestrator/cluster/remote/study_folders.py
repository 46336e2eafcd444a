"""Look-up of the studies that a command has written. Runs on a cluster's head, which knows the output folder.

python -m orchestrator.cluster.remote.study_folders COMMAND      prints their folders
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orchestrator.record.study_file import read_studies
from orchestrator.study.option_groups import default_output


def find_study_folders(command: str, output: Path) -> list[str]:
    """Return the folders of the studies that were last run by this command; a script may run two studies.

    Args:
        command: The command without secrets, as study.json holds it.
        output: The folder of all studies.
    """
    studies = read_studies(output).values()
    return [str(folder.resolve()) for folder, study in studies if study.command == command]


if __name__ == "__main__":
    print(json.dumps(find_study_folders(sys.argv[1], default_output())))
