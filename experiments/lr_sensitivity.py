"""How sensitive are LoRA and its variants to the learning rate?

    python experiments/lr_sensitivity.py --dry-run      a rehearsal on this machine, no GPU, a few minutes
    python experiments/lr_sensitivity.py                the study, on a GPU or a Ray cluster

Every variant is fine-tuned at every learning rate with every seed; with --search, at points of a wider space,
as many of each variant. Results are kept: the same command again trains nothing, and one more rate or variant
trains only what is new.
"""

from __future__ import annotations

from orchestrator.study.command import main
from orchestrator.study.options import parse


def run() -> int:
    options = parse(__doc__)
    from orchestrator.schedule.run import Experiment, run_study

    return run_study(
        Experiment(
            script="lr_sensitivity",
            question="How sensitive are LoRA and its variants to the learning rate?",
            variants=("lora", "rslora", "dora", "hira", "pissa"),
            task="chain_sum",
            dry_run_task="letters",
        ),
        options,
    )


if __name__ == "__main__":
    main(run)
