"""Does early stopping choose the rate that the full grid chooses?

    lora-orchestrator early-stopping --dry-run   a rehearsal without a GPU
    lora-orchestrator early-stopping             the study, on GPUs

The study has two stages. First the grid runs under --scheduler; then, in the same store, it runs to the end,
and the lanes that were stopped continue from their checkpoints. --search, --sampler, --space and --points are
refused, because the study compares grids. A store that has results of the same configurations already, and a
grid that is extended later, are refused: early stopping cannot stop what was trained to the end before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.launch.script_options import EarlyStoppingOptions

if TYPE_CHECKING:
    from orchestrator.launch.experiment import StudyRequest

OPTIONS = EarlyStoppingOptions


def run(options: EarlyStoppingOptions, request: StudyRequest) -> int:
    """Run both stages, or print their plans, and return the exit code."""
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.stop_then_complete import run_early_stopping_comparison

    experiment = Experiment(
        script="early_stopping",
        question="Does early stopping choose the rate that the full grid chooses?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("chain_sum",),
        dry_run_tasks=("letters",),
        request=request,
    )
    return run_early_stopping_comparison(experiment, options)
