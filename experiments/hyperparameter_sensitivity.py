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
five around the best rate, and that of the published default. A level of alpha or of LoRA+'s ratio has 8
to 15, because it may have a best rate of its own. Eight factors with two further levels each, and 5 seeds,
take about 600 fine-tunes a variant; --plan gives the number, the time and the price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from orchestrator.launch.experiment import Experiment
from orchestrator.study.grids import parse_learning_rates
from orchestrator.study.option import Option, Words
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.launch.designs import Design, DesignInput

FACTORS = ("alpha", "rank", "batch_size", "dropout", "warmup", "weight_decay", "schedule", "steps")
MIN_CURVE_RATES = 5
"""Smallest number of rates of the curve in a star design."""


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(StudyOptions):
    """The factors of a study of all hyperparameters."""

    unused: ClassVar[Mapping[str, str]] = {
        "search": "the design of this study is fixed; take grid",
        **dict.fromkeys(("sampler", "points", "space"), "it is for a search; leave it out"),
        "scheduler": "a stopped run has no final score to compare; take none",
    }

    factors: Annotated[Words | None, Option("NAME", commas=True)] = None
    """Hyperparameters to compare with the learning rate: names of orchestrator/study/factors.toml (alpha rank
    batch_size dropout warmup weight_decay schedule beta2 steps train_size targets), VARIANT.NAME for a
    setting that one variant has alone, or `all`. Default: alpha rank batch_size dropout warmup weight_decay
    schedule steps; with --dry-run: alpha batch_size."""
    levels: Annotated[int, Field(ge=1, le=3)] = 2
    """Levels of each factor besides its default, 1 to 3. The first two are the ends of its range; a choice,
    such as the schedule, has all of its levels."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Smallest difference of the score that matters, fixed before the study begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.learning_rates
        if rates is not None and len(parse_learning_rates(rates)) < MIN_CURVE_RATES:
            raise UsageError(
                f"--learning-rates: a curve needs {MIN_CURVE_RATES} rates or more; for example 1e-4:1e-2:4."
            )

    @property
    def seed_count(self) -> int:
        """Number of seeds per point."""
        return self.seeds or (2 if self.dry_run else 5)


def make_design(options: SensitivityOptions, given: DesignInput) -> Design:
    """Return the curve of every variant, and then one factor after another at further levels."""
    from orchestrator.launch.designs import make_star
    from orchestrator.record.store import Store

    curves = given.refined(0 if options.learning_rates else 4)
    factors = options.factors or (("alpha", "batch_size") if options.dry_run else FACTORS)
    bases = Store(options.store_folder).bases
    return make_star(curves, range(options.seed_count), factors, options.levels, bases)


EXPERIMENT = Experiment(
    name="sensitivity",
    description=__doc__,
    options_class=SensitivityOptions,
    make_design=make_design,
    kind="factors",
    variants=("lora", "rslora", "dora", "hira", "pissa"),
    tasks=("metamathqa",),
    dry_run_variants=("lora", "hira"),
    dry_run_tasks=("letters",),
)

if __name__ == "__main__":
    from orchestrator.cli.program import main

    main(EXPERIMENT.name)
