"""How sensitive are LoRA and its variants to the learning rate?

    lora-orchestrator study --dry-run   a rehearsal without a GPU
    lora-orchestrator study             the study, on GPUs

Every variant is fine-tuned at every learning rate with every seed. With --search, a sampler chooses points of
a wider space instead, the same number for each variant. A grid is widened for all variants alike if a best
rate lies on its edge (--widen). Results are kept: the same command again trains nothing, and one more rate or
variant trains only what is new.

The study is the preset lr-matters-qwen3-0.6b, the protocol of arXiv 2602.04998, with whose scores the report
compares its own: Qwen3-0.6B-Base is fine-tuned on MetaMathQA and scored on GSM8K; 5 variants x 13 rates x 3
seeds = 195 fine-tunes of 1,562 steps of 64 rows.

It has never been run. --plan --plan-gpu H100 guesses 17 to 45 hours of an H100, without evaluations.
After the first fine-tune on a GPU --plan estimates the cost from measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from orchestrator.launch.experiment import Experiment
from orchestrator.study.option import Option
from orchestrator.study.options import StudyOptions

if TYPE_CHECKING:
    from orchestrator.launch.designs import Design, DesignInput


@dataclass(frozen=True, kw_only=True)
class CurveOptions(StudyOptions):
    """Refinement and widening of the grid of learning rates."""

    default_config: ClassVar[str] = "lr-matters-qwen3-0.6b"

    rates_per_decade: Annotated[int | None, Field(ge=0, le=100), Option(rival="learning_rates")] = None
    """Without --learning-rates: refine the task's grid to about this number of rates a decade; 0 leaves it as
    it is. Default: 4 for a --dry-run or a transfer, else 0, because each rate costs."""
    widen: Annotated[float, Field(ge=0, le=5)] = 1.0
    """Decades by which the grid may grow at each end, half a decade at a time and for every variant alike,
    while the best rate of a variant lies on its edge; 0: the grid stays as it is."""

    @property
    def refinement(self) -> int:
        """Rates a decade to which the task's grid is refined; 0 for no refinement."""
        if self.learning_rates is not None:
            return 0
        return (4 if self.dry_run else 0) if self.rates_per_decade is None else self.rates_per_decade


def make_design(options: CurveOptions, given: DesignInput) -> Design:
    """Return the grid of learning rates."""
    from orchestrator.launch.designs import WideningGrid

    return WideningGrid(given.refined(options.refinement), range(options.seed_count), options.widen)


EXPERIMENT = Experiment(
    name="study",
    description=__doc__,
    options_class=CurveOptions,
    make_design=make_design,
    variants=("lora", "rslora", "dora", "hira", "pissa"),
    tasks=("metamathqa",),
    dry_run_variants=("lora", "rslora", "hira", "pissa"),
    dry_run_tasks=("letters",),
)

if __name__ == "__main__":
    from orchestrator.cli.program import main

    main(EXPERIMENT.name)
