"""Comparison of tuned variants: each variant is tuned in several replicates, by a grid or by a search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.launch.designs.replicates import ReplicatesDesign
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.run_study import run_study
from orchestrator.launch.script_options import ComparisonOptions
from orchestrator.launch.study_context import StudyContext
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError
from variants.variant_names import canonical_name


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
