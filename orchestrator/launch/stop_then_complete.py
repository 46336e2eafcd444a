"""Comparison of early stopping with the full grid: two studies of the same configurations in one store.

The first study runs under early stopping, the second one trains all configurations to the end. Lanes that
were stopped continue from their checkpoints. The rates that early stopping chose are saved in `choice.json`,
because the records, and with them the summary of the first study, change when its lanes continue.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.analyze import selection
from orchestrator.analyze.formatting import rate
from orchestrator.analyze.selection import Choice
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.run_study import run_study
from orchestrator.launch.script_options import EarlyStoppingOptions
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.study.configuration import Configuration
from orchestrator.study.study_name import default_study_name
from orchestrator.util.errors import UsageError


@dataclass(frozen=True)
class EarlyStoppingChoice(Choice):
    """Content of `choice.json`: the chosen learning rates and the optimizer steps of a study."""

    rates: Mapping[str, float | None]
    """Variant (and task, if there are several) -> chosen learning rate; None without a score."""
    steps: Mapping[str, int]
    """Variant (and task) -> number of optimizer steps of all its lanes."""


def run_early_stopping_comparison(experiment: Experiment, options: EarlyStoppingOptions) -> int:
    """Run both studies, or print their plans.

    Args:
        experiment: Question and defaults of the script.
        options: Options of the command line.

    Returns:
        The exit code of `run_study`.

    Raises:
        UsageError: The value of an option is wrong, or the store has results of full trainings, which could
            not be told from those of early stopping.
    """
    options.check_comparison()
    name = options.study or default_study_name(
        experiment.script, options.task or experiment.default_tasks(options.dry_run), options.model
    )
    early_name, grid_name = f"{name}-{options.scheduler}", f"{name}-grid"
    code = run_study(
        experiment,
        replace(options, study=early_name),
        check=lambda context, study, requested: _refuse_unusable_results(options, early_name, requested),
    )
    if experiment.request.preflight is not None:
        return code  # the second study has the same requirements
    if code == 0 and not options.plan:
        early_choice = selection.load_or_make_choice(
            options.output / early_name, EarlyStoppingChoice, lambda: _current_choice(options, early_name)
        )
    code = code or run_study(experiment, replace(options, scheduler="none", study=grid_name))
    if code == 0 and not options.plan:
        _print_comparison(options.scheduler, early_choice, _current_choice(options, grid_name))
    return code


def _refuse_unusable_results(
    options: EarlyStoppingOptions, study_name: str, configurations: Sequence[Configuration]
) -> None:
    """Check that no configuration was trained to the end before early stopping could stop it.

    Args:
        options: Options of the command line.
        study_name: Name of the study under early stopping.
        configurations: Configurations of this run.

    Raises:
        UsageError: The store has such results, or the study has chosen among other configurations before.
    """
    folder, store = options.output / study_name, Store(options.store_folder)
    fingerprints = [c.fingerprint for c in configurations]
    advice = "take an --output of its own, without --store"
    explanation = f", some of them trained to the end; {advice}"
    if selection.check_same_candidates(folder, study_name, fingerprints, "early stopping", explanation):
        return
    finished = {f for f in fingerprints if store.get_reusable(f) is not None}
    study = StudyFile.read(folder) or StudyFile(study_name, "", "")
    reused = study.with_configurations(fingerprints, finished).reused
    if finished_before := finished.intersection(reused):
        raise UsageError(
            f"--store {str(store.root)!r}: {len(finished_before)} of the {len(configurations)} "
            "configurations were trained to the end there before this study, too late for early stopping; "
            f"{advice}."
        )


def _current_choice(options: EarlyStoppingOptions, study_name: str) -> EarlyStoppingChoice:
    """Return the best rate of each variant in the summary of a study, and its number of optimizer steps.

    In a study of several tasks the names are those of the variant and the task.
    """
    folder, study = find_study(options.output, study_name)
    panels = json.loads((folder / "summary.json").read_text())["panels"]
    has_tasks = len({panel["task"] for panel in panels}) > 1

    def name(variant: str, task: str) -> str:
        return f"{variant} {task}" if has_tasks else variant

    rates = {
        name(curve["variant"], panel["task"]): curve["best_rate"]
        for panel in panels
        for curve in panel["curves"]
    }
    steps: Counter[str] = Counter()
    for record in filter(None, map(Store(options.store_folder).get, study.configurations)):
        chosen = record.configuration
        steps[name(chosen.variant.name, chosen.task.name)] += record.steps
    return EarlyStoppingChoice(tuple(sorted(study.configurations)), rates, dict(steps))


def _print_comparison(scheduler: str, early: EarlyStoppingChoice, full: EarlyStoppingChoice) -> None:
    """Print the chosen rate and the optimizer steps of each variant, with and without early stopping."""
    width = max(12, *map(len, full.rates))
    print(f"\n{'':{width}} {'chosen rate':^17} {'optimizer steps':^19}")
    print(f"{'variant':{width}} {scheduler:>9} {'grid':>7} {scheduler:>11} {'grid':>7}")
    for variant, full_rate in full.rates.items():
        chosen = f"{rate(early.rates.get(variant)):>9} {rate(full_rate):>7}"
        print(f"{variant:{width}} {chosen} {early.steps.get(variant, 0):11} {full.steps[variant]:7}")
    same = sum(
        early.rates.get(v) == full_rate for v, full_rate in full.rates.items() if full_rate is not None
    )
    share = sum(early.steps.values()) / sum(full.steps.values())
    print(f"The same rate for {same} of {len(full.rates)} variants, in {share:.0%} of the steps.")
