"""Does tuned LoRA match or beat most of its variants?

    lora-orchestrator tuned --dry-run         a rehearsal, no GPU, two tasks
    lora-orchestrator tuned                   the study, on GPUs
    lora-orchestrator tuned --search optuna   tuned by searches

Every variant, LoRA among them, is tuned --replicates times with the same budget: on the grid of learning
rates, shifted by a random offset that all variants of a replicate share, or by a --search of its own. Of each
tuning, the run with the best validation score is chosen, and its test score is compared with LoRA's in the
same replicate. The differences give simultaneous intervals, an outcome for each variant, and the answer for
most of the variants, on each --task and over all tasks. Results are kept: the same command again trains
nothing, and more --replicates train only what is new.

The rehearsal tunes three variants over four rates in five replicates on two tasks: 120 fine-tunes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from orchestrator.launch.experiment import BASELINE, Experiment
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from variants.variant_settings import canonical_name

if TYPE_CHECKING:
    from orchestrator.launch.designs import Design, DesignInput


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(StudyOptions):
    """Replicates of the tuning, and what counts as a difference."""

    unused: ClassVar[Mapping[str, str]] = {"seeds": "each replicate has a seed of its own; take --replicates"}
    always: ClassVar[tuple[str, ...]] = (BASELINE,)

    replicates: Annotated[int | None, Field(ge=2, le=10_000)] = None
    """How often every variant is tuned. Replicate k has the seed k and a grid shifted by an offset of its
    own; with --search it is a search of its own. Default: 10; in a rehearsal 5, of three variants on four
    rates."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """The smallest difference of the test score that matters to you, fixed before you look: 0.01 is one
    point."""

    @property
    def seed_count(self) -> int:
        """Number of seeds per point, one for each replicate."""
        return self.replicate_count

    @property
    def replicate_count(self) -> int:
        """Number of replicates."""
        return self.replicates or (5 if self.dry_run else 10)


def complete(options: ComparisonOptions) -> ComparisonOptions:
    """Return the options with the baseline among the variants, and with the small grid of a rehearsal.

    Raises:
        UsageError: The baseline is the only variant.
    """
    compared = {canonical_name(name): name for name in (*options.always, *(options.variants or ()))}
    if len(compared) < 2:
        raise UsageError(
            f"--variants {BASELINE}: it is what the others are compared with; name one more, for example "
            "pissa."
        )
    rates = options.learning_rates
    if options.dry_run and options.search == "grid" and rates is None:
        rates = ("1e-3:3.17e-2:2",)
    return replace(options, variants=tuple(compared.values()), learning_rates=rates)


def make_design(options: ComparisonOptions, given: DesignInput) -> Design:
    """Return the shifted grids of all replicates."""
    from orchestrator.launch.designs import ReplicatesDesign

    return ReplicatesDesign(given, options.replicate_count)


EXPERIMENT = Experiment(
    name="tuned",
    description=__doc__,
    options_class=ComparisonOptions,
    make_design=make_design,
    complete=complete,
    kind="replicates",
    variants=("lora", "rslora", "dora", "hira", "pissa"),
    tasks=("chain_sum",),
    dry_run_variants=("lora", "rslora", "pissa"),
    dry_run_tasks=("letters", "digits"),
)

if __name__ == "__main__":
    from orchestrator.cli.program import main

    main(EXPERIMENT.name)
