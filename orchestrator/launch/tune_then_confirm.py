"""A comparison in two stages: tune every variant alike, then train the chosen points with fresh seeds.

The first stage chooses a point for every variant by its validation score and keeps the choice in
`choice.json`. The second stage trains the chosen points alone, with seeds that took no part in the choice;
its report has the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.analyze import selection
from orchestrator.analyze.comparison import ChosenPoint, TunedChoice
from orchestrator.analyze.tuning import summarize_tuning
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.run_study import run_study
from orchestrator.launch.two_stage_options import FIRST_CONFIRM_SEED, ComparisonOptions
from orchestrator.record.schema import MAX_FAILURES
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.study.configuration import Configuration
from orchestrator.study.study_name import default_study_name
from orchestrator.util.errors import StudyError, UsageError


def run_tuned_comparison(experiment: Experiment, options: ComparisonOptions) -> int:
    """Run both stages, or print their plan.

    Args:
        experiment: The script's question and defaults, with the baseline that all variants are compared with.
        options: The options of the command line.

    Returns:
        The exit code, as `run_study` returns it.

    Raises:
        UsageError: An option has a value that cannot work, or that differs from the choice already made.
        StudyError: The baseline has no score at any point.
    """
    options.check_comparison()
    variants = _all_variants(experiment, options)
    name = options.study or default_study_name(
        experiment.script, options.task or experiment.default_task(options.dry_run), options.model
    )
    tuning = TuningStage(replace(options, variants=variants), f"{name}-tune", experiment.baseline)
    confirming = confirm_options(tuning.options, f"{name}-confirm")
    _check_margin(confirming, f"{name}-confirm")
    code = run_study(
        replace(experiment, question=f"Tuning for: {experiment.question}", baseline=""),
        replace(tuning.options, study=tuning.study_name),
        check=tuning.check,
    )
    choice = tuning.read_choice()
    if options.plan and choice is None:
        points = f"{len(variants)} variants at their chosen points x {options.confirm_seeds} fresh seeds"
        print(f"\nThen            {points}, {len(variants) * options.confirm_seeds} configurations")
        return code
    if not options.plan:
        if code not in (0, 1) or not tuning.is_complete():
            return code
        choice = selection.load_or_make_choice(tuning.folder, TunedChoice, tuning.current_choice)
    assert choice is not None
    tuning.refuse_new_variants(choice)  # a plan has not been checked
    chosen = chosen_configurations(choice, variants)
    configurations = [
        replace(point, seed=FIRST_CONFIRM_SEED + k) for k in range(options.confirm_seeds) for point in chosen
    ]
    print()
    comparison = replace(experiment, margin=options.margin, tuning_study=tuning.study_name)
    confirm_code = run_study(comparison, confirming, requested=configurations)
    if confirm_code in (0, 1) and not options.plan:
        record_look(confirming, f"{name}-confirm")
    return confirm_code or code


def _all_variants(experiment: Experiment, options: ComparisonOptions) -> tuple[str, ...]:
    """Return the baseline and the variants that are compared with it."""
    names = [name.replace("-", "_") for name in options.variants or experiment.variants]
    variants = tuple(dict.fromkeys([experiment.baseline, *names]))
    if len(variants) < 2:
        raise UsageError(
            f"--variants {experiment.baseline}: it is what the others are compared with; "
            "name one more, pissa say."
        )
    return variants


def confirm_options(tune_options: ComparisonOptions, study_name: str) -> ComparisonOptions:
    """Return the options of the second stage.

    Its configurations are given, so that there is no search, and no early stopping. A learning rate that
    --set fixed for the search is part of them.
    """
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


def _check_margin(options: ComparisonOptions, study_name: str) -> None:
    """Refuse a margin other than the one that the comparison began with."""
    study = StudyFile.read(options.output / study_name)
    if study is not None and study.margin != options.margin:
        raise UsageError(
            f"--margin {options.margin:g}: study {study_name!r} began with {study.margin:g}, and a margin "
            f"is fixed before there are results; take --margin {study.margin:g}."
        )


def record_look(options: ComparisonOptions, study_name: str) -> None:
    """Write into `study.json` that a verdict has been read from this many seeds."""
    folder, study = find_study(options.output, study_name)
    study.with_look(options.confirm_seeds).write(folder)


@dataclass(frozen=True)
class TuningStage:
    """The first stage: a study that tunes every variant, and the choice made from it."""

    options: ComparisonOptions
    """The options of the first stage; `variants` has the baseline and all others."""
    study_name: str
    baseline: str

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.options.output / self.study_name

    @property
    def points_per_variant(self) -> int | None:
        """The points that a search samples of each variant; None for a grid, which needs no such number."""
        return None if self.options.search == "grid" else self.options.point_count

    def read_choice(self) -> TunedChoice | None:
        """Return the choice that has been made, if any."""
        return selection.read_choice(self.folder, TunedChoice)

    def check(self, configurations: Sequence[Configuration]) -> None:
        """Check that the study's configurations are those of this command.

        Args:
            configurations: The configurations of this command.

        Raises:
            UsageError: A choice has been made among others, or the study has begun with others.
        """
        fingerprints = [c.fingerprint for c in configurations]
        choice = self.read_choice()
        if choice is None:
            study = StudyFile.read(self.folder)
            others = set(study.configurations).difference(fingerprints) if study else ()
            if others:
                raise UsageError(
                    f"--study {self.study_name!r}: it has begun with {len(others)} configurations that this "
                    "command does not ask for (other steps, rates, variants, ..., or an earlier version's "
                    "numerics), and a choice among both would compare unlike runs; repeat its options, or "
                    "take another --study."
                )
            return
        self.refuse_new_variants(choice)
        advice = "; the choice is kept; take another --study"
        selection.check_same_candidates(self.folder, self.study_name, fingerprints, "tuning", advice)
        if choice.points != self.points_per_variant:
            raise UsageError(
                f"--points: tuning of {self.study_name!r} has chosen among {choice.points} points a variant "
                f"and now there would be {self.points_per_variant}{advice}."
            )

    def refuse_new_variants(self, choice: TunedChoice) -> None:
        """Raise UsageError if a variant took no part in the choice."""
        if new := [name for name in self.options.variants or () if name not in choice.variants]:
            raise UsageError(
                f"--variants {' '.join(new)}: tuning of {self.study_name!r} has chosen for "
                f"{' '.join(choice.variants)} alone; the choice is kept; take another --study."
            )

    def is_complete(self) -> bool:
        """Return whether every configuration has a result or has failed too often to be tried again."""
        store = Store(self.options.store_folder)
        states = store.states()
        return all(
            states.get(f, "failed") != "failed" or store.count_failures(f) >= MAX_FAILURES
            for f in find_study(self.options.output, self.study_name)[1].configurations
        )

    def current_choice(self) -> TunedChoice:
        """Choose a point for every variant by its validation score.

        `check` has made sure that the study holds no configurations but those of this command.

        Raises:
            StudyError: The baseline has no score at any point.
        """
        study = find_study(self.options.output, self.study_name)[1]
        records = list(filter(None, map(Store(self.options.store_folder).get, study.configurations)))
        best_points = {each.variant: ChosenPoint.from_tuning(each) for each in summarize_tuning(records)}
        chosen = {variant: best_points.get(variant) for variant in self.options.variants or ()}
        if chosen.get(self.baseline) is None:
            raise StudyError(
                f"study {self.study_name!r}: {self.baseline} has no score at any point; "
                "nothing can be compared with it."
            )
        return TunedChoice(tuple(sorted(study.configurations)), self.points_per_variant, chosen)


def chosen_configurations(choice: TunedChoice, variants: Sequence[str]) -> list[Configuration]:
    """Return the chosen configurations of `variants`, with the first seed. Print which variants have none."""
    configurations = []
    for variant in variants:
        point = choice.variants[variant]  # present: `refuse_new_variants` was called
        if point is None:
            print(f"{variant} has no score at any point: it is not compared, and counts as unknown.")
        else:
            configurations.append(point.configuration)
    return configurations
