"""How sensitive are LoRA and its variants to the learning rate?

    python experiments/lr_sensitivity.py --dry-run      a rehearsal on this machine, no GPU, a few minutes
    python experiments/lr_sensitivity.py                the study, on a GPU or a Ray cluster

Every variant is fine-tuned at every learning rate with every seed; with --search, at points of a wider space,
as many of each variant. Results are kept: the same command again trains nothing, and one more rate or variant
trains only what is new.

The study: Qwen3-0.6B-Base on MetaMathQA, asked GSM8K; 5 variants x 11 rates x 3 seeds = 165 fine-tunes of
1,562 steps of 64 rows, one pass over the 100,000 that the survey takes. Reckoned, not measured: rows of 250
tokens padded to about 380 are 38 million tokens, at 4 x 0.6e9 operations each (forward, and backward without
the weights' gradients) 0.9e17, or 5 minutes of an H100 at 30 % of its peak; 1,819 answers of up to 512 tokens
take about 3 more. That makes 165 x 8 minutes = 22 GPU hours, and twice as long a training for DoRA and HiRA.
After the first fine-tune --plan says what it took here.
"""

from __future__ import annotations

from orchestrator.study.options import parse_options
from orchestrator.util.command import main


def run() -> int:
    options = parse_options(__doc__)
    from orchestrator.launch.run_study import Experiment, run_study

    return run_study(
        Experiment(
            script="lr_sensitivity",
            question="How sensitive are LoRA and its variants to the learning rate?",
            variants=("lora", "rslora", "dora", "hira", "pissa"),
            task="metamathqa",
            dry_run_task="letters",
        ),
        options,
    )


if __name__ == "__main__":
    main(run)
