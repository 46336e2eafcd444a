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
from orchestrator.study.options import StudyOptions, parse
from orchestrator.util.command import main
from orchestrator.util.errors import BadInput, Trouble

if TYPE_CHECKING:
    from orchestrator.analyze.comparison import TunedChoice

BASELINE = "lora"
FIRST_FRESH = 1000
"""Seeds from here on confirm; tuning has those below."""


@dataclass(frozen=True)
class ComparisonOptions(StudyOptions):
    confirm_seeds: int = 10
    """How many fresh seeds train each chosen point; fix the number before you look."""
    margin: float = 0.01
    """The smallest difference of the test score that matters to you, fixed before you look: 0.01 is one
    point."""


def run() -> int:
    options = parse(__doc__, ComparisonOptions)
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
    typed = [name.replace("-", "_") for name in options.variants or experiment.variants]
    variants = tuple(dict.fromkeys([BASELINE, *typed]))
    if len(variants) < 2:
        raise BadInput(
            f"--variants {BASELINE}: it is what the others are compared with; name one more, pissa say."
        )
    default_task = experiment.dry_run_task if options.dry_run else experiment.task
    name = selection.study_name(experiment.script, options, default_task)
    tune = replace(options, variants=variants, study=f"{name}-tune")
    confirm = _confirm(tune, f"{name}-confirm")
    assert tune.study is not None
    _check_margin(confirm)
    code = run_study(
        replace(experiment, question=f"Tuning for: {experiment.question}"), tune, check=partial(_check, tune)
    )
    folder = tune.output / tune.study
    if options.plan and selection.read(folder, TunedChoice) is None:
        each = f"{len(variants)} variants at their chosen points x {options.confirm_seeds} fresh seeds"
        print(f"\nThen            {each}, {len(variants) * options.confirm_seeds} configurations")
        return code
    if not options.plan and (code not in (0, 1) or not _all_ended(tune)):
        return code
    read, found = partial(selection.read, folder, TunedChoice), partial(_found, tune)
    kept = read() if options.plan else selection.keep(folder, TunedChoice, found)
    assert kept is not None
    _refuse_new(kept, tune)  # a plan has not been checked
    points = _points(kept, variants)
    wanted = [replace(point, seed=FIRST_FRESH + k) for k in range(options.confirm_seeds) for point in points]
    compare = replace(experiment, baseline=BASELINE, margin=options.margin, tuning=tune.study)
    print()
    ended = run_study(compare, confirm, wanted=wanted)
    if ended in (0, 1) and not options.plan:
        _looked(confirm)
    return ended or code


def _confirm(tune: ComparisonOptions, study: str) -> ComparisonOptions:
    """The options of the second stage. Its configurations are given: nothing is searched, and a rate that was
    fixed for the search stands in them."""
    fixed = tuple(word for word in tune.set if word.partition("=")[0].rpartition(".")[2] != "learning_rate")
    return replace(
        tune,
        study=study,
        seeds=tune.confirm_seeds,
        search="grid",
        sampler=None,
        space=None,
        points=None,
        set=fixed,
        scheduler="none",
    )


def _looked(confirm: ComparisonOptions) -> None:
    """Writes down that a verdict has been read from so many seeds."""
    from orchestrator.record.study_file import find_study

    assert confirm.study is not None
    folder, study = find_study(confirm.output, confirm.study)
    study.looked(confirm.confirm_seeds).write(folder)


def _check_options(options: ComparisonOptions) -> None:
    if options.confirm_seeds < 2:
        raise BadInput(
            f"--confirm-seeds {options.confirm_seeds}: must be 2 or more, for an interval; take 10."
        )
    bounds.check("--confirm-seeds", options.confirm_seeds, bounds.POINTS)
    if not (math.isfinite(options.margin) and options.margin > 0):
        raise BadInput(f"--margin {options.margin:g}: must be a finite number above 0, for example 0.01.")
    if options.seed_count > FIRST_FRESH:
        raise BadInput(
            f"--seeds {options.seeds}: seeds from {FIRST_FRESH} on are for the verdict; take {FIRST_FRESH}."
        )


def _check(tune: ComparisonOptions, wanted: Sequence[Configuration]) -> None:
    """Raises BadInput where a choice has been made and this command would make another, and where the study
    has begun with other configurations: what is tuned is what one command asks for."""
    from orchestrator.analyze import selection
    from orchestrator.analyze.comparison import TunedChoice
    from orchestrator.record.study_file import StudyFile

    assert tune.study is not None
    folder, rule = tune.output / tune.study, "; the choice is kept; take another --study"
    asked = [c.fingerprint for c in wanted]
    kept = selection.read(folder, TunedChoice)
    if kept is None:
        begun = StudyFile.read(folder)
        others = set(begun.configurations).difference(asked) if begun else ()
        if others:
            raise BadInput(
                f"--study {tune.study!r}: it has begun with {len(others)} configurations that this command "
                "does not ask for (other steps, rates, variants, ..., or an earlier version's numerics), and "
                "a choice among both would compare unlike runs; repeat its options, or take another --study."
            )
        return
    _refuse_new(kept, tune)
    selection.refuse_another(folder, tune.study, asked, "tuning", rule)
    points = _budget(tune)
    if kept.points != points:
        raise BadInput(
            f"--points: tuning of {tune.study!r} has chosen among {kept.points} points a variant and now "
            f"there would be {points}{rule}."
        )


def _refuse_new(kept: TunedChoice, tune: ComparisonOptions) -> None:
    """Raises BadInput on a variant that was not there when the choice was made."""
    if new := [name for name in tune.variants or () if name not in kept.variants]:
        raise BadInput(
            f"--variants {' '.join(new)}: tuning of {tune.study!r} has chosen for {' '.join(kept.variants)} "
            "alone; the choice is kept; take another --study."
        )


def _check_margin(confirm: ComparisonOptions) -> None:
    """Raises BadInput on a margin other than the one that was fixed before."""
    from orchestrator.record.study_file import StudyFile

    assert confirm.study is not None
    study = StudyFile.read(confirm.output / confirm.study)
    if study is not None and study.margin != confirm.margin:
        raise BadInput(
            f"--margin {confirm.margin:g}: study {confirm.study!r} began with {study.margin:g}, and a margin "
            f"is fixed before there are results; take --margin {study.margin:g}."
        )


def _budget(tune: ComparisonOptions) -> int | None:
    """Points of a search, None for a grid, whose configurations say it all."""
    return None if tune.search == "grid" else tune.point_count


def _all_ended(tune: ComparisonOptions) -> bool:
    """Whether every configuration of the first stage has a result or has failed for good."""
    from orchestrator.record.schema import FAILURES_ALLOWED
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import find_study

    assert tune.study is not None
    store = Store(tune.store_folder)
    study = find_study(tune.output, tune.study)[1]
    states = store.states()
    return all(
        states.get(f, "failed") != "failed" or store.failures(f) >= FAILURES_ALLOWED
        for f in study.configurations
    )


def _found(tune: ComparisonOptions) -> TunedChoice:
    """What tuning chooses now. The study holds nothing but what this command asked for, see `_check`."""
    from orchestrator.analyze.comparison import Chosen, TunedChoice
    from orchestrator.analyze.tuning import tuned
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import find_study

    assert tune.study is not None
    study = find_study(tune.output, tune.study)[1]
    records = list(filter(None, map(Store(tune.store_folder).get, study.configurations)))
    known = {each.variant: Chosen.of(each) for each in tuned(records)}
    chosen = {variant: known.get(variant) for variant in tune.variants or ()}
    if chosen.get(BASELINE) is None:
        raise Trouble(
            f"study {tune.study!r}: {BASELINE} has no score at any point; nothing can be compared with it."
        )
    return TunedChoice(tuple(sorted(study.configurations)), _budget(tune), chosen)


def _points(kept: TunedChoice, variants: Sequence[str]) -> list[Configuration]:
    """The chosen configurations of these variants, with the first seed. Says which have none."""
    found = []
    for variant in variants:
        point = kept.variants[variant]  # any other was refused
        if point is None:
            print(f"{variant} has no score at any point: it is not compared, and counts as unknown.")
        else:
            found.append(point.configuration)
    return found


if __name__ == "__main__":
    main(run)
