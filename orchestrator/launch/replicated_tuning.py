"""Comparison of tuned variants: each variant is tuned in several replicates, by a grid or by a search."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.launch.design import DesignInput
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.run_study import run_study
from orchestrator.launch.script_options import ComparisonOptions
from orchestrator.launch.study_context import StudyContext
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.rates import round_rate
from orchestrator.study.space import build_grid
from orchestrator.util.errors import UsageError
from variants.variant_names import canonical_name

MIN_RATES = 2
MIN_SPACING = 0.0199
"""Smallest spacing of a grid in decades. In a finer grid rounding to three digits could undo the shift."""


@dataclass(frozen=True)
class ReplicatesDesign:
    """Every template at every rate of its task's shifted grid, once in each replicate.

    The training seed of replicate k is k, and the offset of its grid depends on k alone. All variants and
    tasks of a replicate therefore have the same offset, and more replicates do not change the earlier ones.
    """

    given: DesignInput
    replicates: int

    def __post_init__(self) -> None:
        """Check the grids.

        Raises:
            UsageError: The grid of a task has fewer than `MIN_RATES` rates, or is finer than `MIN_SPACING`.
        """
        for task, rates in self.given.learning_rates.items():
            if len(rates) < MIN_RATES:
                raise UsageError(
                    f"--learning-rates: {task} has {len(rates)} rate, so there is nothing to tune; take two "
                    "or more, for example 1e-4:1e-2:2."
                )
            if min(log_gaps(rates)) < MIN_SPACING:
                raise UsageError(
                    f"--learning-rates: rates of {task} are closer than a shift that three digits can show; "
                    "take at most 50 points a decade."
                )

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations, one replicate after another."""
        return self.outline()

    def outline(self) -> list[Configuration]:
        """Return all configurations, one replicate after another."""
        return [
            configuration
            for replicate in range(self.replicates)
            for task, templates in self.given.templates_by_task().items()
            for configuration in build_grid(
                templates, shifted_grid(self.given.learning_rates[task], replicate), [replicate]
            )
        ]


def grid_offset(replicate: int) -> float:
    """Return the offset of a replicate's grid in units of its spacing: a uniform draw from [-0.5, 0.5)."""
    return random.Random(f"grid offset of replicate {replicate}").random() - 0.5


def shifted_grid(rates: Sequence[float], replicate: int) -> tuple[float, ...]:
    """Shift the grid of a task by the offset of a replicate, on a log scale.

    Without the shift, the distance between a variant's optimum and the nearest rate would be the same in all
    replicates. Equally good variants would then differ by the loss that the coarse grid causes for each.

    Args:
        rates: Grid of the task, at least two rates, ascending.
        replicate: Index of the replicate.

    Returns:
        As many rates as in `rates`, with three significant digits.
    """
    offset = grid_offset(replicate)
    gaps = log_gaps(rates)
    gaps = [*gaps, gaps[-1]] if offset >= 0 else [gaps[0], *gaps]
    return tuple(round_rate(rate * 10 ** (offset * gap)) for rate, gap in zip(rates, gaps, strict=True))


def log_gaps(rates: Sequence[float]) -> list[float]:
    """Return the distances between neighboring rates in decades."""
    return [math.log10(b / a) for a, b in pairwise(rates)]


def run_replicated_tuning(experiment: Experiment, options: ComparisonOptions) -> int:
    """Run the study, or print its plan.

    Args:
        experiment: Question and defaults of the script, including the baseline.
        options: Options of the command line.

    Returns:
        The exit code of `run_study`.

    Raises:
        UsageError: The value of an option is wrong, or is not that of the first run of the study.
    """
    options.check_comparison()
    settings = replace(experiment.settings, margin=options.margin, max_replicates=options.max_replicates or 0)
    variants = _with_baseline(experiment, options)
    replicates = options.replicate_count
    return run_study(
        replace(experiment, settings=settings),
        replace(options.with_rehearsal_grid(), variants=variants),
        make_design=None if options.search != "grid" else lambda given: ReplicatesDesign(given, replicates),
        check=_refuse_other_runs,
        replicates=replicates,
    )


def _with_baseline(experiment: Experiment, options: ComparisonOptions) -> tuple[str, ...]:
    """Return the baseline, followed by the variants to compare with it.

    Raises:
        UsageError: The baseline is the only variant.
    """
    baseline = experiment.settings.baseline
    typed = options.variants or experiment.default_variants(options.dry_run)
    variants = tuple({canonical_name(name): name for name in (baseline, *typed)}.values())
    if len(variants) < 2:
        raise UsageError(
            f"--variants {baseline}: it is what the others are compared with; name one more, for example "
            "pissa."
        )
    return variants


def _refuse_other_runs(context: StudyContext, study: StudyFile, requested: Iterable[Configuration]) -> None:
    """Check that the study has no earlier runs of the same tunings that this command does not request.

    A tuning consists of the runs of one task, variant and replicate. If some of them had other settings, the
    best one would be chosen among runs that are not comparable.

    Args:
        context: The run.
        study: The study before this run.
        requested: Configurations of this run.

    Raises:
        UsageError: The study has such runs.
    """
    asked = {c.fingerprint for c in requested}
    tunings = {
        (template.task.name, template.variant.name, replicate)
        for template in context.templates
        for replicate in range(context.replicates)
    }
    others = [f for f in study.configurations if f not in asked]
    unlike = sum(_tuning_of(context.store, fingerprint) in tunings for fingerprint in others)
    if unlike:
        raise UsageError(
            f"--study {study.name!r}: it has {unlike} runs of the same tunings that this command does not "
            "ask for (other steps, rates, rank, ..., or other numerics), and a choice among "
            "both would compare unlike runs; repeat its options, or take another --study."
        )


def _tuning_of(store: Store, fingerprint: str) -> tuple[str, str, int] | None:
    """Return task, variant and replicate of a recorded run; None without a record."""
    record = store.get(fingerprint)
    if record is None:
        return None
    c = record.configuration
    return c.task.name, c.variant.name, c.seed
