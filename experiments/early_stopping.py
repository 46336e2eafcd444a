"""Does early stopping choose the rate that the full grid chooses?

    python experiments/early_stopping.py --dry-run   a rehearsal without a GPU
    python experiments/early_stopping.py             the study, on GPUs

The study has two stages. First the grid runs under --scheduler; then, in the same store, it runs to the end,
and the lanes that were stopped continue from their checkpoints. --search, --sampler, --space and --points are
refused, because the study compares grids. A store that has results of the same configurations already, and a
grid that is extended later, are refused: early stopping cannot stop what was trained to the end before.
"""

from __future__ import annotations

from orchestrator.cli.arguments import parse_options
from orchestrator.launch.script_options import EarlyStoppingOptions
from orchestrator.util.command import main


def run() -> int:
    """Run the study of the command line, and return the exit code."""
    options = parse_options(__doc__, EarlyStoppingOptions)
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.stop_then_complete import run_early_stopping_comparison

    experiment = Experiment(
        script="early_stopping",
        question="Does early stopping choose the rate that the full grid chooses?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("chain_sum",),
        dry_run_tasks=("letters",),
    )
    return run_early_stopping_comparison(experiment, options)


if __name__ == "__main__":
    main(run)
