"""A search: an Optuna study for each task, variant and replicate, in the study's folder. Imports no Ray.

The file `optuna.journal` is the only account of a search, and is only appended to. User attributes of an
Optuna study are its task, its sampler, its number of points and its space. A trial with the user attribute
`fingerprint` is a point; the other trials are suggestions that were known or that the variant refuses.
Results come from the records in the store. `optuna-dashboard <study>/optuna.journal` shows the search, also
while it runs.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, product, takewhile, tee
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, create_study, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator.finetune.resolve.templates import find_settings_error
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Dimension, Space, apply_values
from orchestrator.util.errors import UsageError, format_error

optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise Optuna logs a line for each study
warnings.filterwarnings("ignore", category=ExperimentalWarning)

JOURNAL_FILE = "optuna.journal"
FINGERPRINT = "fingerprint"
"""User attribute of a trial that is a point."""
SPACE = "space"
"""The last user attribute that a new Optuna study gets: without it, the study has no points."""
NON_ADAPTIVE_SAMPLERS = ("random", "qmc")
"""Samplers that do not use results, so that all their points can be drawn in advance."""
MAX_REPEATED_SUGGESTIONS = 8
"""After this many known or refused suggestions in a row, the point comes from `random_points`."""
MAX_IDLE_DRAWS = 100
"""After this many draws in a row without a new point, `design_points` continues with `random_points`."""
MAX_RANDOM_POINTS = 2000
"""A space of at most this many points is gone through; of a larger one this many points are drawn."""

Params = Mapping[str, Any]
"""Parameters of an Optuna trial: name of a dimension -> value, or its index in a choice of numbers."""


@dataclass
class SearchGroup:
    """The search of one variant on one task in one replicate."""

    name: str
    """Name of the Optuna study: task/variant/replicate, without the first task and without replicate 0."""
    template: Configuration
    """The configuration whose values a point replaces. Its seed is the replicate."""
    dimensions: tuple[Dimension, ...]
    points: int
    """Number of points that each group may have."""
    num_asked: int = 0
    waiting: set[str] = field(default_factory=set)
    """Fingerprints of the points that wait: they have no result, and Optuna suggests them next."""
    drawn: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Fingerprints and parameters of the points drawn ahead that the journal does not have yet."""
    is_exhausted: bool = False
    """True if no further point was found."""

    @property
    def specs(self) -> dict[str, str]:
        """Name of each dimension -> its specification as it was typed."""
        return {d.key: d.spec_text for d in self.dimensions}

    @property
    def num_remaining(self) -> int:
        """The number of points that may still be asked for."""
        size = math.prod(d.size or math.inf for d in self.dimensions)
        return 0 if self.is_exhausted else max(0, int(min(self.points, size)) - self.num_asked)

    def build(self, params: Params) -> Configuration | None:
        """Return the configuration of a point; None if the variant refuses its values."""
        values = {}
        for d in self.dimensions:
            value = params[d.key]
            values[d.key] = (d.choices[value] if d.is_numeric else value) if d.choices else d.to_value(value)
        configuration = apply_values(self.template, values)
        return None if find_settings_error(configuration) else configuration


@dataclass
class Point:
    """A point that has no result in Optuna yet.

    Its result is written to Optuna's storage directly. `Study.tell` refuses a trial in the state WAITING, and
    Optuna gives no `Trial` object, which could report scores, for a trial of an earlier process.
    """

    configuration: Configuration
    storage: BaseStorage
    trial_id: int
    """The id of its trial in the storage."""
    last_step: int = 0
    score: float | None = None
    """The last intermediate score."""

    def report(self, step: int, score: float) -> None:
        """Pass on an intermediate score, unless a restarted process repeats it."""
        if step > self.last_step:
            self.storage.set_trial_intermediate_value(self.trial_id, step, score)
            self.last_step, self.score = step, score

    def tell(self, state: TrialState, score: float | None = None) -> None:
        """Set the state of the trial, and its score if it has one.

        A trial that is complete without a finite score has failed, as for `Study.tell`.
        """
        if state == TrialState.COMPLETE and (score is None or not math.isfinite(score)):
            state, score = TrialState.FAIL, None
        self.storage.set_trial_state_values(self.trial_id, state, None if score is None else [score])

    def tell_record(self, record: Record) -> None:
        """Pass on the result in a record."""
        if record.state == "failed":
            self.tell(TrialState.FAIL)
        elif record.state != "stopped":
            self.tell(TrialState.COMPLETE, record.score("validation"))
        else:
            task = record.configuration.task
            for each in record.evaluations:
                score = each.scores.get(task.metric, task.floor)  # as the trial reports it
                is_seen = each.split == "validation" and each.step <= (record.stopped_at or record.steps)
                if is_seen and math.isfinite(score):
                    self.report(each.step, score)
            self.tell(TrialState.PRUNED, self.score)


class Search:
    """The points of a search. Each group has the same number of points, counted over all runs of the study.

    Attributes:
        path: The journal.
        sampler: The sampler's name.
        points: Number of points of each group.
        groups: The groups that are searched now, by name.
        configurations: The configurations of all points by fingerprint: earlier ones by group, then new ones.
        settled: Returns the record of a configuration that is not trained any further; else None.
        on_point: Called with the configuration of each new point after the point was written.
    """

    storage: BaseStorage

    def __init__(self, path: Path, sampler: str, points: int, groups: Mapping[str, SearchGroup]) -> None:
        """Make a search without points."""
        self.path, self.sampler, self.points, self.groups = path, sampler, points, groups
        self.configurations: dict[str, Configuration] = {}
        self.settled: Callable[[str], Record | None] = lambda fingerprint: None
        self.on_point: Callable[[Configuration], object] = lambda configuration: None
        self.studies: dict[str, Study] = {}

    @property
    def total(self) -> int:
        """The number of points, including those that may still be asked for."""
        return len(self.configurations) + sum(group.num_remaining for group in self.groups.values())

    def restore(self, studies: Mapping[str, Study]) -> None:
        """Take over the points of earlier runs.

        Raises:
            UsageError: A point would be another configuration now.
        """
        for group in self.groups.values():
            trials = studies[group.name].get_trials(deepcopy=False) if group.name in studies else []
            for trial in trials:
                if FINGERPRINT not in trial.user_attrs:
                    continue
                configuration = group.build(trial.params)
                if configuration is None or configuration.fingerprint != trial.user_attrs[FINGERPRINT]:
                    raise UsageError(
                        f"study {self.path.parent.name!r}: its search has asked for points with other "
                        "settings (steps, rank, model, the program, ...); repeat its options, or take "
                        "another --study."
                    )
                self._register(group, configuration)

    def draw_ahead(self) -> None:
        """Draw all remaining points, for a sampler that does not use results.

        All variants take their values from one sequence over the whole space, so that they have equal values
        of the dimensions that they share. More points begin with the same points as fewer. A variant that is
        added later may add dimensions, which changes the sequence. The other variants then take their missing
        points from the new sequence.
        """
        together: dict[tuple[str, int], list[SearchGroup]] = defaultdict(list)
        for group in self.groups.values():
            together[group.template.task.name, group.template.seed].append(group)
        for (_, replicate), groups in together.items():
            distinct = {d.key: d for group in groups for d in group.dimensions}
            dimensions = sorted(distinct.values(), key=lambda d: d.variant != "")  # first those of all
            sequence = draw_sequence(self.sampler, dimensions, replicate)
            for group, own in zip(groups, tee(sequence, len(groups)), strict=True):
                for params, configuration in design_points(group, own):
                    if not group.num_remaining:
                        break
                    if configuration.fingerprint not in self.configurations:
                        self._register(group, configuration)
                        group.drawn.append((configuration.fingerprint, params))
                else:
                    group.is_exhausted = True

    def begin(self, settled: Callable[[str], Record | None]) -> None:
        """Open the journal to continue the search. The caller has the study's lock.

        Optuna gets the results that are in the store. Points of a killed run without a result are enqueued.

        Args:
            settled: Returns the record of a configuration that is not trained any further; else None.
        """
        self.settled = settled
        _repair(self.path)
        self.storage = JournalStorage(JournalFileBackend(str(self.path)))
        names = optuna.get_all_study_names(self.storage)
        for name, group in self.groups.items():
            seed = f"{group.template.seed}/{group.num_asked}"  # no draws are repeated after a restart
            sampler = make_sampler(self.sampler, seed, self.points)
            make = optuna.load_study if name in names else partial(create_study, direction="maximize")
            self.studies[name] = study = make(study_name=name, storage=self.storage, sampler=sampler)
            attributes = {"task": group.template.task.name, "sampler": self.sampler, "points": self.points}
            for key, value in {**attributes, SPACE: group.specs}.items():
                if study.user_attrs.get(key) != value:
                    study.set_user_attr(key, value)
            made_of = distributions(group.dimensions)
            for fingerprint, params in group.drawn:
                attrs, waits = {FINGERPRINT: fingerprint}, TrialState.WAITING
                study.add_trial(
                    create_trial(state=waits, params=params, distributions=made_of, user_attrs=attrs)
                )
            for trial in study.get_trials(deepcopy=False):
                if not trial.state.is_finished():
                    self._settle(group, trial)

    def _settle(self, group: SearchGroup, trial: FrozenTrial) -> None:
        """Tell Optuna the result of an unfinished trial of an earlier run, or enqueue the trial."""
        fingerprint = trial.user_attrs.get(FINGERPRINT, "")
        point = self._make_point(group, trial.number, self.configurations.get(fingerprint, group.template))
        if not fingerprint:  # the driver was killed while Optuna made the suggestion
            point.tell(TrialState.FAIL)
        elif record := self.settled(fingerprint):
            point.tell_record(record)
        else:
            group.waiting.add(fingerprint)
            if trial.state != TrialState.WAITING:
                point.tell(TrialState.WAITING)

    def next_group(self, block: int) -> SearchGroup | None:
        """Return the group whose turn it is; None if no group has further points.

        The groups of the first replicate take turns, then those of the next one. Points that wait come before
        new ones.

        Args:
            block: Number of points that a group gets in a row.
        """

        def order(group: SearchGroup) -> tuple[bool, int, int]:
            num_suggested = group.num_asked - len(group.waiting)
            return not group.waiting, group.template.seed, num_suggested // block

        return min((g for g in self.groups.values() if g.waiting or g.num_remaining), key=order, default=None)

    def ask(self, group: SearchGroup) -> Point | None:
        """Return a point of this group: one that waits, else a new one; None if there is no further point."""
        study, made_of = self.studies[group.name], distributions(group.dimensions)
        if group.waiting:  # Optuna returns trials that wait first
            trial = study.ask(made_of)
            fingerprint = trial.user_attrs[FINGERPRINT]
            group.waiting.remove(fingerprint)
            return self._make_point(group, trial.number, self.configurations[fingerprint])
        for _ in range(MAX_REPEATED_SUGGESTIONS):
            trial = study.ask(made_of)
            if (configuration := self._build_if_new(group, trial.params)) is not None:
                return self._add_point(group, trial, configuration)
            # It counts as failed: a good result twice would draw the sampler to its point.
            study.tell(trial, state=TrialState.FAIL)
        for params in random_points(group.dimensions, f"{len(self.configurations)}"):
            if (configuration := self._build_if_new(group, params)) is not None:
                study.enqueue_trial(dict(params))
                return self._add_point(group, study.ask(made_of), configuration)
        group.is_exhausted = True
        return None

    def _build_if_new(self, group: SearchGroup, params: Params) -> Configuration | None:
        configuration = group.build(params)
        is_known = configuration is None or configuration.fingerprint in self.configurations
        return None if is_known else configuration

    def _add_point(self, group: SearchGroup, trial: optuna.Trial, configuration: Configuration) -> Point:
        trial.set_user_attr(FINGERPRINT, configuration.fingerprint)
        self._register(group, configuration)
        self.on_point(configuration)
        return self._make_point(group, trial.number, configuration)

    def _make_point(self, group: SearchGroup, number: int, configuration: Configuration) -> Point:
        study_id = self.storage.get_study_id_from_name(group.name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return Point(configuration, self.storage, trial_id)

    def _register(self, group: SearchGroup, configuration: Configuration) -> None:
        self.configurations[configuration.fingerprint] = configuration
        group.num_asked += 1


def open_search(
    folder: Path,
    sampler: str,
    points: int,
    spaces: Mapping[str, Space],
    templates: Sequence[Configuration],
    replicates: int = 1,
) -> Search:
    """Open the search of the study in `folder`, new or resumed. Writes nothing.

    All remaining points of a sampler that does not use results are drawn at once.

    Args:
        folder: The study's folder.
        sampler: The sampler's name.
        points: Points of each variant, on each task and in each replicate.
        spaces: Task -> the space that is searched, by variant.
        templates: One configuration for each task and variant; a point's values replace theirs.
        replicates: Number of replicates. Replicate k trains with seed k, and has a sampler of its own.

    Raises:
        UsageError: The study has searched with other settings, or its journal is damaged.
    """
    path, groups = folder / JOURNAL_FILE, dict[str, SearchGroup]()
    search = Search(path, sampler, points, groups)
    try:
        studies = _load_studies(path)
        first_task = next((s.user_attrs["task"] for s in studies.values()), templates[0].task.name)
        for replicate, template in product(range(replicates), templates):
            task, variant = template.task.name, template.variant.name
            name = f"{task}/{variant}/{replicate}".removeprefix(f"{first_task}/").removesuffix("/0")
            own = replace(template, seed=replicate)
            groups[name] = SearchGroup(name, own, spaces[task][variant], points)
        _refuse_changes(search, studies)
        search.restore(studies)
    except UsageError:
        raise
    except Exception as error:  # replaying a damaged journal raises errors of many kinds
        raise UsageError(
            f"{path}: not the journal of a search ({format_error(error)}); put the whole file back, or take "
            "another --study"
        ) from error
    if sampler in NON_ADAPTIVE_SAMPLERS:
        search.draw_ahead()
    return search


def _load_studies(path: Path) -> dict[str, Study]:
    """Return the studies of a journal by name, as created, without one whose creation was interrupted."""
    if not path.exists():  # Optuna would make the file
        return {}
    storage = JournalStorage(JournalFileBackend(str(path)))
    names = optuna.get_all_study_names(storage)
    studies = {name: optuna.load_study(study_name=name, storage=storage) for name in names}
    return {name: study for name, study in studies.items() if SPACE in study.user_attrs}


def _refuse_changes(search: Search, studies: Mapping[str, Study]) -> None:
    """Raise UsageError if the sampler or a space differs from the journal, or if there are fewer points."""
    study, now, other = f"study {search.path.parent.name!r}", search.sampler, "take another --study."
    for name, attributes in [(name, each.user_attrs) for name, each in studies.items()]:
        before, space, most = attributes["sampler"], attributes[SPACE], attributes["points"]
        if now != before:
            raise UsageError(f"--search: {study} has searched with {before}, not {now}; {other}")
        specs = search.groups[name].specs if name in search.groups else space
        for key in {**space, **specs}:
            if space.get(key) != specs.get(key):
                raise UsageError(
                    f"--space: {study} has searched {name}'s {key} in {space.get(key, 'nothing')}, now it "
                    f"would be {specs.get(key, 'nothing')}; {other}"
                )
        if search.points < most:
            raise UsageError(
                f"--points {search.points}: {study} asks for {most} of each variant, and budgets stay equal; "
                f"take {most} or more, or another --study."
            )


def _repair(path: Path) -> None:
    """Remove what a killed process has left: Optuna's lock, and an incomplete last line of the journal.

    The point of that line was not trained. Optuna skips the line too, but would append to it.
    """
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


# -- spaces and samplers


def distributions(dimensions: Iterable[Dimension]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions by name.

    A choice of numbers becomes an integer distribution over the index, so that samplers know the order.
    """

    def one(d: Dimension) -> BaseDistribution:
        if d.choices and d.is_numeric:
            return IntDistribution(0, len(d.choices) - 1)
        if d.choices:
            return CategoricalDistribution(d.choices)
        if d.has_integer_steps:
            return IntDistribution(int(d.low), int(d.high), log=d.log)
        return FloatDistribution(d.low, d.high, log=d.log)

    return {d.key: one(d) for d in dimensions}


def make_sampler(name: str, seed: str, points: int = 0) -> samplers.BaseSampler:
    """Make a sampler.

    Args:
        name: `tpe`, `cma-es`, `qmc` or `random`.
        seed: Any text.
        points: Number of points that the group may have.
    """
    number = random.Random(seed).getrandbits(31)
    if name == "random":
        return samplers.RandomSampler(seed=number)
    if name == "qmc":
        return samplers.QMCSampler(scramble=True, seed=number, warn_independent_sampling=False)
    if name == "cma-es":
        return samplers.CmaEsSampler(seed=number, warn_independent_sampling=False)
    return samplers.TPESampler(
        seed=number,
        n_startup_trials=min(10, max(4, points // 4)),  # with few points, most should use results
        multivariate=True,
        constant_liar=True,  # suggestions keep a distance from points in training
    )


def draw_sequence(name: str, dimensions: Sequence[Dimension], seed: object) -> Iterator[Params]:
    """Yield the points of a sampler that uses no results, without end; a point may come twice."""
    study, made_of = create_study(sampler=make_sampler(name, f"{seed}/0")), distributions(dimensions)
    ends = {key: each.to_external_repr(float(getattr(each, "low", 0))) for key, each in made_of.items()}
    # QMC infers the space from the first trial, and would draw a first trial of its own at random.
    study.add_trial(create_trial(params=ends, distributions=made_of, value=0.0))
    while True:
        yield study.ask(made_of).params


def random_points(dimensions: Sequence[Dimension], seed: str) -> Iterator[Params]:
    """Yield random points: each point of a small space once, MAX_RANDOM_POINTS draws of a larger one."""
    if math.prod(d.size or math.inf for d in dimensions) > MAX_RANDOM_POINTS:
        yield from islice(draw_sequence("random", dimensions, seed), MAX_RANDOM_POINTS)
        return
    made_of: Mapping[str, Any] = distributions(dimensions)
    axes = [getattr(one, "choices", None) or range(one.low, one.high + 1) for one in made_of.values()]
    points = list(product(*axes))
    for point in random.Random(seed).sample(points, len(points)):
        yield dict(zip(made_of, point, strict=True))


def design_points(
    group: SearchGroup, sequence: Iterable[Params]
) -> Iterator[tuple[dict[str, Any], Configuration]]:
    """Yield the parameters and the configuration of each point of a group, without repetition.

    Args:
        group: The group.
        sequence: An endless sequence of Optuna parameters. It may repeat points, and may have parameters that
            the group does not search. After MAX_IDLE_DRAWS repeated or refused points in a row, the remaining
            points come from `random_points`.
    """
    found: set[str] = set()
    idle = 0
    drawn = takewhile(lambda params: idle < MAX_IDLE_DRAWS, sequence)
    for params in chain(drawn, random_points(group.dimensions, str(group.template.seed))):
        configuration = group.build(params)
        idle += 1
        if configuration is not None and configuration.fingerprint not in found:
            found.add(configuration.fingerprint)
            idle = 0
            yield {d.key: params[d.key] for d in group.dimensions}, configuration
