"""How sensitive are LoRA and its variants to the learning rate?

    lora-orchestrator study --dry-run   a rehearsal without a GPU
    lora-orchestrator study             the study, on GPUs

Every variant is fine-tuned at every learning rate with every seed. With --search, a sampler chooses points of
a wider space instead, the same number for each variant. A grid is widened for all variants alike if a best
rate lies on its edge (--widen). Results are kept: the same command again trains nothing, and one more rate or
variant trains only what is new.

The study: Qwen3-0.6B-Base is fine-tuned on MetaMathQA and scored on GSM8K; 5 variants x 11 rates x 3 seeds =
165 fine-tunes of 1,562 steps of 64 rows, one pass over the 100,000 rows that the survey takes.

The study has never been run. --plan --plan-gpu H100 guesses 14 to 38 hours of an H100, without evaluations.
After the first fine-tune on a GPU --plan estimates the cost from measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.launch.script_options import CurveOptions

if TYPE_CHECKING:
    from orchestrator.launch.experiment import StudyRequest

OPTIONS = CurveOptions


def run(options: CurveOptions, request: StudyRequest) -> int:
    """Run the study, or print its plan, and return the exit code."""
    options.check_widening()
    from orchestrator.launch.designs import WideningGrid
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.run import run_study

    experiment = Experiment(
        name="study",
        script="lr_sensitivity",
        question="How sensitive are LoRA and its variants to the learning rate?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("metamathqa",),
        dry_run_tasks=("letters",),
        dry_run_variants=("lora", "rslora", "hira", "pissa"),
        request=request,
    )
    if options.search != "grid":
        return run_study(experiment, options)
    seeds = range(options.seed_count)
    return run_study(
        experiment,
        options,
        make_design=lambda given: WideningGrid(given.refined(options.refinement), seeds, options.widen),
    )
