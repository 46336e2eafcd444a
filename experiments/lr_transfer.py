"""Does the best learning rate carry over when the rank, the batch or the base model changes?

    lora-orchestrator transfer --dry-run   a rehearsal without a GPU
    lora-orchestrator transfer             the study, on GPUs

Every variant is fine-tuned at several levels of one factor (--factor, --levels), at each level on a grid of
learning rates with the same seeds. A level's grid widens while its best rate lies at an end. With --link
another setting moves with the factor: alpha with the rank, or the steps with the batch. The report gives the
best rate as a power of the factor, with an interval over seeds and the published power beside it, the score
that is lost by carrying a rate over, and a rule for the rate at another level.

    transfer --factor batch_size --levels 16 32 64 128 --link none examples
    transfer --factor targets --levels attention MLP all --link parameters
    transfer --factor model --levels Qwen/Qwen3-0.6B-Base Qwen/Qwen3-1.7B-Base

Results are kept: the same command again trains nothing; one more level, link or seed trains what is new.
The rehearsal has the ranks 2, 4, 8 and 16 of LoRA with fixed alpha and with fixed alpha/rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from orchestrator.experiments.hyperparameter_sensitivity import SensitivityOptions
from orchestrator.experiments.lr_sensitivity import CurveOptions
from pydantic import Field

from orchestrator.launch.experiment import Experiment
from orchestrator.study.levels import LINKS, MODEL, FactorName, LinkName, parse_levels
from orchestrator.study.option import Option, Words
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.launch.designs import Design, DesignInput


@dataclass(frozen=True, kw_only=True)
class TransferOptions(CurveOptions):
    """The factor, its levels, and what moves with it."""

    unused: ClassVar[Mapping[str, str]] = SensitivityOptions.unused
    default_config: ClassVar[str] = ""

    factor: FactorName = "rank"
    """What changes besides the learning rate; `model`: the base model, by its width."""
    levels: Annotated[Words | None, Option("LEVEL", commas=True, paths=True)] = None
    """Values of the factor, three to six: numbers; for targets `all attention MLP`; for model names as in
    --model. Default for the rank: 2 4 8 16 32; with --dry-run: 2 4 8 16."""
    link: Annotated[tuple[LinkName, ...] | None, Field(min_length=1), Option(commas=True)] = None
    """What moves with the factor; with several, each makes a curve. `none`: nothing. `alpha`: alpha/rank
    stays. `examples`: steps x batch stay. `epochs`: the steps grow with the training examples. `parameters`:
    the rank gives all targets as many trainable parameters. Default for the rank: none alpha; else none."""
    by: Literal["loss", "score"] = "loss"
    """What chooses the best rate on the validation split: `loss`, which does not saturate, or the `score`."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Largest loss of score at which a rate carries over, fixed before the study begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is None and self.factor != "rank":
            raise UsageError(f"--factor {self.factor}: name its levels, for example --levels 16 32 64.")
        parse_levels(self.factor, self.level_words)
        if self.factor == MODEL and self.model is not None:
            raise UsageError(f"{self.shown('model')} with --factor model: name the models with --levels.")
        for link in self.links:
            if LINKS[link].moved and self.factor not in LINKS[link].moved:
                known = [name for name, each in LINKS.items() if self.factor in each.moved]
                rule = f"nothing of it moves with {self.factor}; take {' or '.join(['none', *known])}"
                raise UsageError(f"--link {link}: {rule}.")

    @property
    def level_words(self) -> tuple[str, ...]:
        """The levels as words."""
        return self.levels or tuple(["2", "4", "8", "16"] if self.dry_run else ["2", "4", "8", "16", "32"])

    @property
    def links(self) -> tuple[LinkName, ...]:
        """The links of the study, each of them once."""
        return tuple(dict.fromkeys(self.link or (("none", "alpha") if self.factor == "rank" else ("none",))))

    @property
    def refinement(self) -> int:
        """Rates a decade to which the task's grid is refined: a parabola needs three within a decade."""
        return 4 if self.rates_per_decade is None and self.learning_rates is None else super().refinement

    @property
    def models(self) -> tuple[str, ...]:
        """The base models of a study in which they are the factor."""
        return self.level_words if self.factor == MODEL else ()

    @property
    def design_name(self) -> str:
        """The factor, which is a part of the default name of a study."""
        return self.factor


def make_design(options: TransferOptions, given: DesignInput) -> Design:
    """Return a grid of learning rates for each variant, link and level."""
    from orchestrator.launch.designs import WideningGrid, make_transfer
    from orchestrator.record.store import Store

    grid = WideningGrid(
        given.refined(options.refinement), range(options.seed_count), options.widen, options.by
    )
    levels = parse_levels(options.factor, options.level_words)
    return make_transfer(grid, options.factor, levels, options.links, Store(options.store_folder).bases)


EXPERIMENT = Experiment(
    name="transfer",
    description=__doc__,
    options_class=TransferOptions,
    make_design=make_design,
    kind="transfer",
    variants=("lora", "rslora"),
    tasks=("metamathqa",),
    dry_run_variants=("lora",),
    dry_run_tasks=("letters",),
)

if __name__ == "__main__":
    from orchestrator.cli.program import main

    main(EXPERIMENT.name)
