"""Which hyperparameter matters most: the learning rate?

    lora-orchestrator sensitivity --dry-run   a rehearsal without a GPU
    lora-orchestrator sensitivity             the study, on GPUs

A star design. First every variant is fine-tuned along the curve of the learning rate, 4 rates a decade, with
everything else at its default. Then one factor after another takes further levels (--factors, --levels),
each at five rates around the best one and with the same seeds. The report gives for each factor, with
intervals over seeds, the loss when it is set blindly (A), the same with the rate tuned again (B), the gain
from tuning it alone (C), and the loss when its value is off by a factor of 2 or 3.16 (D). It answers whether
the learning rate matters most.

Results are kept: the same command again trains nothing; one more factor, level, seed or variant, or a wider
range of rates, trains only what is new. The rehearsal has two variants, two seeds and two factors.

The size of the study: a curve over 4.5 decades has 19 rates. Each further level of a factor has up to 6: the
five around the best rate, and that of the published default. Eight factors with two further levels each, and
5 seeds, take about 600 fine-tunes a variant; --plan gives the number, the time and the price.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.launch.script_options import FactorOptions

if TYPE_CHECKING:
    from orchestrator.launch.experiment import StudyRequest

OPTIONS = FactorOptions


def run(options: FactorOptions, request: StudyRequest) -> int:
    """Run the study, or print its plan, and return the exit code."""
    options.check_factors()
    from orchestrator.launch.designs import Design, DesignInput, make_star
    from orchestrator.launch.experiment import Experiment
    from orchestrator.launch.run import run_study
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import AnalysisSettings

    experiment = Experiment(
        name="sensitivity",
        script="hyperparameter_sensitivity",
        question="Which hyperparameter matters most: the learning rate?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        tasks=("metamathqa",),
        dry_run_tasks=("letters",),
        dry_run_variants=("lora", "hira"),
        settings=AnalysisSettings(kind="factors", margin=options.margin),
        request=request,
    )

    def make_design(given: DesignInput) -> Design:
        curves = given.refined(0 if options.learning_rates else 4)
        bases = Store(options.store_folder).bases
        return make_star(curves, range(options.seed_count), options.factor_names, options.levels, bases)

    return run_study(experiment, options, make_design=make_design)
