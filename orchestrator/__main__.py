"""`python -m orchestrator`: show records, rebuild the files derived from them, and maintain a store.

python -m orchestrator sync                    # write Parquet and MLflow again from the store
python -m orchestrator sync --rebuild          # the same, with a new SQLite file for MLflow
python -m orchestrator show 3fa9               # print the record whose fingerprint starts with 3fa9
python -m orchestrator report STUDY            # write a study's report again
python -m orchestrator fetch-model NAME        # prepare a base model before a study needs it
python -m orchestrator fetch-data TASK         # download the data of a local task
python -m orchestrator gc                      # remove files that a crash left behind
python -m orchestrator merge OTHER/store       # copy the records that only another store has
python -m orchestrator check                   # check whether a study could run here, at no cost
"""

from __future__ import annotations

from orchestrator.cli.commands import run_command
from orchestrator.util.command import main

if __name__ == "__main__":
    main(run_command)
