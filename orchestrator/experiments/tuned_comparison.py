"""Does tuned LoRA match or beat most of its variants?

    lora-orchestrator tuned --dry-run         a rehearsal, no GPU, two tasks
    lora-orchestrator tuned                   the study, on GPUs
    lora-orchestrator tuned --search optuna   tuned by searches

Every variant, LoRA among them, is tuned --replicates times with the same budget: on the grid of learning
rates, shifted by a random offset that all variants of a replicate share, or by a --search of its own. Of each
tuning, the run with the best validation score is chosen, and its test score is compared with LoRA's in the
same replicate. The differences give simultaneous intervals, an outcome for each variant, and the answer for
most of the variants, on each --task and over all tasks. Results are kept: the same command again trains
nothing, and more --replicates train only what is new, up to the --max-replicates that were planned.

The rehearsal tunes three variants over four rates in five replicates on two tasks: 120 fine-tunes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.launch.script_options import ComparisonOptions
from orchestrator.util.errors import UsageError
from variants.variant_names import canonical_name

if TYPE_CHECKING:
    from orchestrator.launch.experiment import StudyRequest

OPTIONS = ComparisonOptions


def run(options: ComparisonOptions, request: StudyRequest) -> int:
    """Run the study, or print its plan, and return the exit code."""
    options.check_comparison()
    from orchestrator.launch.designs import ReplicatesDesign
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.run import run_study
    from orchestrator.record.study_file import AnalysisSettings

    settings = AnalysisSettings(
        kind="replicates", margin=options.margin, max_replicates=options.max_replicates or 0
    )
    experiment = Experiment(
        name="tuned",
        script="tuned_comparison",
        question="Does tuned LoRA match or beat most of its variants?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("chain_sum",),
        dry_run_tasks=("letters", "digits"),
        dry_run_variants=("lora", "rslora", "pissa"),
        settings=settings,
        request=request,
    )
    compared = options.variants or experiment.default_variants(options.dry_run)
    variants = tuple({canonical_name(name): name for name in (settings.baseline, *compared)}.values())
    if len(variants) < 2:
        raise UsageError(
            f"--variants {settings.baseline}: it is what the others are compared with; name one more, for "
            "example pissa."
        )
    replicates = options.replicate_count
    return run_study(
        experiment,
        replace(options.with_rehearsal_grid(), variants=variants),
        make_design=None if options.search != "grid" else lambda given: ReplicatesDesign(given, replicates),
        replicates=replicates,
    )
