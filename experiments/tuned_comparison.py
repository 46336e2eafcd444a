"""Is any variant better than LoRA when both are tuned with the same budget?

    python experiments/tuned_comparison.py --dry-run      a rehearsal on this machine, no GPU, some minutes
    python experiments/tuned_comparison.py                the study, on a GPU or a Ray cluster
    python experiments/tuned_comparison.py --search optuna --space rank=4,8,16     tuned by a search

First every variant, LoRA among them, is tuned with the same budget: the grid of learning rates, or a
--search. The point of each is chosen on the validation split. Then the chosen points alone are trained with
fresh seeds; from these comes the verdict, with intervals. A choice once made is kept: the same command again
trains nothing, and more --confirm-seeds train only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.study import bounds
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions, parse_options
from orchestrator.util.command import main
from orchestrator.util.errors import StudyError, UsageError

if TYPE_CHECKING:
    from orchestrator.analyze.comparison import TunedChoice

BASELINE = "lora"
FIRST_CONFIRM_SEED = 1000
"""Seeds from here on confirm; tuning has those below."""


@dataclass(frozen=True)
class ComparisonOptions(StudyOptions):
    confirm_seeds: int = 10
    """How many fresh seeds train each chosen point; fix the number before you look."""
    margin: float = 0.01
    """The smallest difference of the test score that matters to you, fixed before you look: 0.01 is one
    point."""


def run() -> int:
    options = parse_options(__doc__, ComparisonOptions)
    assert isinstance(options, ComparisonOptions)
    _check_options(options)
    from orchestrator.analyze import selection
    from orchestrator.analyze.comparison import TunedChoice
    from orchestrator.launch.run_study import Experiment, run_study

    experiment = Experiment(
        script="tuned_comparison",
        question="Is any variant better than LoRA when both are tuned with the same budget?",
        variants=(BASELINE, "rslora", "dora", "hira", "pissa"),
        task="chain_sum",
        dry_run_task="letters",
    )
    requested = [name.replace("-", "_") for name in options.variants or experiment.variants]
    variants = tuple(dict.fromkeys([BASELINE, *requested]))
    if len(variants) < 2:
        raise UsageError(
            f"--variants {BASELINE}: it is what the others are compared with; name one more, pissa say."
        )
    default_task = experiment.dry_run_task if options.dry_run else experiment.task
    study_name = selection.two_stage_study_name(experiment.script, options, default_task)
    tune_options = replace(options, variants=variants, study=f"{study_name}-tune")
    confirm_options = _confirm_options(tune_options, f"{study_name}-confirm")
    assert tune_options.study is not None
    _check_margin(confirm_options)
    code = run_study(
        replace(experiment, question=f"Tuning for: {experiment.question}"),
        tune_options,
        check=partial(_check_tuning, tune_options),
    )
    folder = tune_options.output / tune_options.study
    if options.plan and selection.read_choice(folder, TunedChoice) is None:
        each = f"{len(variants)} variants at their chosen points x {options.confirm_seeds} fresh seeds"
        print(f"\nThen            {each}, {len(variants) * options.confirm_seeds} configurations")
        return code
    if not options.plan and (code not in (0, 1) or not _is_tuning_complete(tune_options)):
        return code
    read_choice, current_choice = (
        partial(selection.read_choice, folder, TunedChoice),
        partial(_current_choice, tune_options),
    )
    choice = (
        read_choice() if options.plan else selection.load_or_make_choice(folder, TunedChoice, current_choice)
    )
    assert choice is not None
    _refuse_new_variants(choice, tune_options)  # a plan has not been checked
    chosen = _chosen_configurations(choice, variants)
    configurations = [
        replace(point, seed=FIRST_CONFIRM_SEED + k) for k in range(options.confirm_seeds) for point in chosen
    ]
    comparison = replace(experiment, baseline=BASELINE, margin=options.margin, tuning=tune_options.study)
    print()
    confirm_exit_code = run_study(comparison, confirm_options, requested=configurations)
    if confirm_exit_code in (0, 1) and not options.plan:
        _record_look(confirm_options)
    return confirm_exit_code or code


def _confirm_options(tune_options: ComparisonOptions, study_name: str) -> ComparisonOptions:
    """The options of the second stage. Its configurations are given: nothing is searched, and a rate that was
    fixed for the search stands in them."""
    fixed = tuple(
        word for word in tune_options.set if word.partition("=")[0].rpartition(".")[2] != "learning_rate"
    )
    return replace(
        tune_options,
        study=study_name,
        seeds=tune_options.confirm_seeds,
        search="grid",
        sampler=None,
        space=None,
        points=None,
        set=fixed,
        scheduler="none",
    )


def _record_look(confirm_options: ComparisonOptions) -> None:
    """Writes down that a verdict has been read from so many seeds."""
    from orchestrator.record.study_file import find_study

    assert confirm_options.study is not None
    folder, study = find_study(confirm_options.output, confirm_options.study)
    study.with_look(confirm_options.confirm_seeds).write(folder)


def _check_options(options: ComparisonOptions) -> None:
    if options.confirm_seeds < 2:
        raise UsageError(
            f"--confirm-seeds {options.confirm_seeds}: must be 2 or more, for an interval; take 10."
        )
    bounds.check_bound("--confirm-seeds", options.confirm_seeds, bounds.MAX_POINTS)
    if not (math.isfinite(options.margin) and options.margin > 0):
        raise UsageError(f"--margin {options.margin:g}: must be a finite number above 0, for example 0.01.")
    if options.seed_count > FIRST_CONFIRM_SEED:
        raise UsageError(
            f"--seeds {options.seeds}: seeds from {FIRST_CONFIRM_SEED} on are for the verdict; take {FIRST_CONFIRM_SEED}."
        )


def _check_tuning(tune_options: ComparisonOptions, configurations: Sequence[Configuration]) -> None:
    """Raises BadInput where a choice has been made and this command would make another, and where the study
    has begun with other configurations: what is tuned is what one command asks for."""
    from orchestrator.analyze import selection
    from orchestrator.analyze.comparison import TunedChoice
    from orchestrator.record.study_file import StudyFile

    assert tune_options.study is not None
    folder, advice = tune_options.output / tune_options.study, "; the choice is kept; take another --study"
    fingerprints = [c.fingerprint for c in configurations]
    choice = selection.read_choice(folder, TunedChoice)
    if choice is None:
        study = StudyFile.read(folder)
        others = set(study.configurations).difference(fingerprints) if study else ()
        if others:
            raise UsageError(
                f"--study {tune_options.study!r}: it has begun with {len(others)} configurations that this command "
                "does not ask for (other steps, rates, variants, ..., or an earlier version's numerics), and "
                "a choice among both would compare unlike runs; repeat its options, or take another --study."
            )
        return
    _refuse_new_variants(choice, tune_options)
    selection.check_same_candidates(folder, tune_options.study, fingerprints, "tuning", advice)
    points = _points_per_variant(tune_options)
    if choice.points != points:
        raise UsageError(
            f"--points: tuning of {tune_options.study!r} has chosen among {choice.points} points a variant and now "
            f"there would be {points}{advice}."
        )


def _refuse_new_variants(choice: TunedChoice, tune_options: ComparisonOptions) -> None:
    """Raises BadInput on a variant that was not there when the choice was made."""
    if new := [name for name in tune_options.variants or () if name not in choice.variants]:
        raise UsageError(
            f"--variants {' '.join(new)}: tuning of {tune_options.study!r} has chosen for {' '.join(choice.variants)} "
            "alone; the choice is kept; take another --study."
        )


def _check_margin(confirm_options: ComparisonOptions) -> None:
    """Raises BadInput on a margin other than the one that was fixed before."""
    from orchestrator.record.study_file import StudyFile

    assert confirm_options.study is not None
    study = StudyFile.read(confirm_options.output / confirm_options.study)
    if study is not None and study.margin != confirm_options.margin:
        raise UsageError(
            f"--margin {confirm_options.margin:g}: study {confirm_options.study!r} began with {study.margin:g}, and a margin "
            f"is fixed before there are results; take --margin {study.margin:g}."
        )


def _points_per_variant(tune_options: ComparisonOptions) -> int | None:
    """Points of a search, None for a grid, whose configurations say it all."""
    return None if tune_options.search == "grid" else tune_options.point_count


def _is_tuning_complete(tune_options: ComparisonOptions) -> bool:
    """Whether every configuration of the first stage has a result or has failed for good."""
    from orchestrator.record.schema import MAX_FAILURES
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import find_study

    assert tune_options.study is not None
    store = Store(tune_options.store_folder)
    study = find_study(tune_options.output, tune_options.study)[1]
    states = store.states()
    return all(
        states.get(f, "failed") != "failed" or store.count_failures(f) >= MAX_FAILURES
        for f in study.configurations
    )


def _current_choice(tune_options: ComparisonOptions) -> TunedChoice:
    """What tuning chooses now. The study holds nothing but what this command asked for, see `_check`."""
    from orchestrator.analyze.comparison import ChosenPoint, TunedChoice
    from orchestrator.analyze.tuning import summarize_tuning
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import find_study

    assert tune_options.study is not None
    study = find_study(tune_options.output, tune_options.study)[1]
    records = list(filter(None, map(Store(tune_options.store_folder).get, study.configurations)))
    best_points = {each.variant: ChosenPoint.from_tuning(each) for each in summarize_tuning(records)}
    chosen = {variant: best_points.get(variant) for variant in tune_options.variants or ()}
    if chosen.get(BASELINE) is None:
        raise StudyError(
            f"study {tune_options.study!r}: {BASELINE} has no score at any point; nothing can be compared with it."
        )
    return TunedChoice(tuple(sorted(study.configurations)), _points_per_variant(tune_options), chosen)


def _chosen_configurations(choice: TunedChoice, variants: Sequence[str]) -> list[Configuration]:
    """The chosen configurations of these variants, with the first seed. Says which have none."""
    configurations = []
    for variant in variants:
        point = choice.variants[variant]  # any other was refused
        if point is None:
            print(f"{variant} has no score at any point: it is not compared, and counts as unknown.")
        else:
            configurations.append(point.configuration)
    return configurations


if __name__ == "__main__":
    main(run)
