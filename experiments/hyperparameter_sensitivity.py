"""Which hyperparameter matters most: the learning rate? The same as `lora-orchestrator sensitivity`."""

from __future__ import annotations

from orchestrator.cli.program import run_script
from orchestrator.util.command import main


def run() -> int:
    """Run the experiment with the options of the command line, and return the exit code."""
    return run_script("sensitivity")


if __name__ == "__main__":
    main(run)
