"""Is any variant better than LoRA when both are tuned with the same budget?

    python experiments/tuned_comparison.py --dry-run   a rehearsal without a GPU
    python experiments/tuned_comparison.py             the study, on GPUs
    python experiments/tuned_comparison.py --search optuna   tuned by a search

The study has two stages. First every variant, LoRA among them, is tuned with the same budget: the grid of
learning rates, or a --search. The point of each variant is chosen on the validation split. Then the chosen
points alone are trained with fresh seeds, and the verdict with its intervals comes from these. The choice is
kept: the same command again trains nothing, and more --confirm-seeds train only what is new.
"""

from __future__ import annotations

from orchestrator.cli.arguments import parse_options
from orchestrator.launch.two_stage_options import ComparisonOptions
from orchestrator.util.command import main


def run() -> int:
    """Run the study of the command line, and return the exit code."""
    options = parse_options(__doc__, ComparisonOptions)
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.tune_then_confirm import run_tuned_comparison

    experiment = Experiment(
        script="tuned_comparison",
        question="Is any variant better than LoRA when both are tuned with the same budget?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        task="chain_sum",
        dry_run_task="letters",
        baseline="lora",
    )
    return run_tuned_comparison(experiment, options)


if __name__ == "__main__":
    main(run)
