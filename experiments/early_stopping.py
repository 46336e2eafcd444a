"""Does early stopping choose the rate that the full grid chooses? Or: `lora-orchestrator early-stopping`."""

from __future__ import annotations

from orchestrator.cli.program import run_script
from orchestrator.util.command import main


def run() -> int:
    """Run the experiment with the options of the command line, and return the exit code."""
    return run_script("early-stopping")


if __name__ == "__main__":
    main(run)
