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
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import main


def run() -> int:
    """Run the study of the command line, and return the exit code."""
    options = parse_options(__doc__, StudyOptions)
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.run_study import run_study
    from orchestrator.record.study_file import AnalysisSettings

    experiment = Experiment(
        script="tuned_comparison",
        question="Is any variant better than LoRA when both are tuned with the same budget?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("chain_sum",),
        dry_run_tasks=("letters",),
        settings=AnalysisSettings(kind="replicates"),
    )
    return run_study(experiment, options)


if __name__ == "__main__":
    main(run)
