"""The searcher that Ray Tune calls: one Optuna study and sampler per group, with equal budgets."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Study, Trial
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from orchestrator.execution.rungs import find_settled
from orchestrator.execution.search import journal, samplers
from orchestrator.execution.search.budget import SearchBudget
from orchestrator.execution.search.groups import SearchGroup
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, Value


@dataclass(frozen=True)
class PointResult:
    """The result of a point, as its sampler receives it."""

    state: str
    """The name of an Optuna trial state: COMPLETE, PRUNED (stopped early), FAIL, or WAITING (no result)."""
    score: float | None = None
    """The validation score: the last one if the point was stopped early, None if it failed."""
    scores: tuple[float, ...] = ()
    """If the point was stopped early: all validation scores that the scheduler has seen."""


@dataclass
class _GroupSearch:
    """One group with its Optuna study."""

    group: SearchGroup
    study: Study

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name

    def ask(self) -> tuple[Trial, dict[str, Value]]:
        """Return Optuna's next trial, and its parameters as values of a configuration."""
        dimensions = self.group.dimensions
        trial = self.study.ask(fixed_distributions=samplers.distributions(dimensions))
        return trial, samplers.from_optuna_params(dimensions, trial.params)


@dataclass
class _SearchTrial:
    """Optuna's trial of the point that a trial of Tune trains."""

    search: _GroupSearch
    trial: Trial | None
    """None if Optuna has the result already and the point is only replayed to the scheduler."""
    last_reported_step: int = 0
    reports: int = 0

    def report(self, result: Mapping[str, Any]) -> None:
        """Pass an intermediate score to Optuna, unless a restarted trial process repeats it."""
        if self.trial is not None and result["step"] > self.last_reported_step:
            self.last_reported_step = result["step"]
            self.trial.report(result["score"], self.reports)
            self.reports += 1

    def tell(self, state: str, score: float | None = None) -> None:
        """Pass the final state to Optuna, with the score if the trial is COMPLETE."""
        if self.trial is not None:
            value = score if state == "COMPLETE" else None
            self.search.study.tell(self.trial, value, state=TrialState[state])


_NewPoint = tuple[Trial, dict[str, Value], Configuration]


class PerGroupSearcher(Searcher):
    """Tune's searcher, which suggests the points of earlier runs, then new points of each group in turn.

    Points of earlier runs that have no result are trained. Under early stopping, points with a result are
    replayed to the scheduler, so that they fill its rungs. Then the groups of the first replicate take turns
    until all their points are asked for, then those of the next replicate. In a turn, a group gets as many
    new points as fill a lane group. Tune neither saves nor restores the search, because the study's folder
    and the store contain its whole state.
    """

    def __init__(
        self, budget: SearchBudget, store: Store, scheduler: str, points_per_turn: int, cached: set[str]
    ) -> None:
        """Write the journal anew with the results that the store has, and open it.

        Args:
            budget: The points of the search.
            store: The store of records.
            scheduler: The name of the early stopping scheduler.
            points_per_turn: Number of new points of one group that are sampled in a row.
            cached: Fingerprints with a usable result. New points that have a result already are added.
        """
        super().__init__(metric="score", mode="max")
        self.budget, self.store, self.scheduler = budget, store, scheduler
        self.points_per_turn, self.cached = points_per_turn, cached
        self.trials: dict[str, _SearchTrial] = {}
        # The results are looked up once, because trainers of a killed driver may still write records.
        self.results = {f: r for f, c in budget.configurations.items() if (r := self._stored_result(c))}
        cached.update(f for f, result in self.results.items() if result.state != "FAIL")
        self.searches = self._open_group_searches()
        self.to_resubmit = deque(self._points_to_resubmit())
        self.turn_order, self.points_this_turn = deque(self.searches.values()), 0

    # -- Tune's interface -------------------------------------------------------------------------------

    def set_search_properties(self, *properties: Any, **spec: Any) -> bool:
        """Accept the properties that Tune sets: metric, mode and space are known already."""
        return True

    def suggest(self, trial_id: str) -> Any:  # Tune's own type leaves out FINISHED
        """Return the next configuration for Tune's trial, or FINISHED when the budget is spent."""
        found = self._next_resubmitted(trial_id) if self.to_resubmit else self._next_new(trial_id)
        return Searcher.FINISHED if found is None else {"configuration": found}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an intermediate result to the sampler."""
        self.trials[trial_id].report(result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Pass the end of a trial to the sampler."""
        trial = self.trials.pop(trial_id, None)
        if trial is None:
            return
        state = (result or {}).get("state")
        if error or state == "failed":
            trial.tell("FAIL")
        elif result and state != "training":
            trial.tell("COMPLETE", result["score"])
        else:  # the scheduler has stopped the trial at this result
            if result:
                trial.report(result)
            trial.tell("PRUNED")

    def save(self, checkpoint_path: str) -> None:
        """Save nothing; see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Raise NotImplementedError; see the class."""
        raise NotImplementedError("a search is continued by the command of its study")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the searcher into its scratch folder

    # -- points -----------------------------------------------------------------------------------------

    def _open_group_searches(self) -> dict[str, _GroupSearch]:
        """Write the journal anew, with the results that the store has, and open its studies."""
        budget, folder, file = self.budget, self.budget.folder, self.budget.file
        order = {fingerprint: number for number, fingerprint in enumerate(budget.points)}
        trials, made = dict(budget.other_trials), {}
        for name, group in budget.groups.items():
            own = [self._restore_trial(p, order[p.fingerprint]) for p in budget.points_of(name)]
            trials[name] = own
            complete = [trial for trial in own if trial.value is not None and trial.state.name == "COMPLETE"]
            made[name] = samplers.make_sampler(file.sampler, file.points, len(own), complete, group.replicate)
        journal.write_journal(folder, trials)
        studies = journal.open_studies(folder, made)
        return {name: _GroupSearch(budget.groups[name], study) for name, study in studies.items()}

    def _restore_trial(self, point: journal.Point, order: int) -> FrozenTrial:
        """Return the Optuna trial of an earlier run's point, in state WAITING if the point has no result."""
        result = self.results.get(point.fingerprint, PointResult("WAITING"))
        state, before = TrialState[result.state], point.trial
        if before is not None and (before.state, before.value) == (state, result.score):
            return before  # this trial has its start and end times
        seen = dict(enumerate(result.scores))
        dimensions = self.budget.groups[point.group].dimensions
        return journal.make_trial(
            point, order, dimensions, state=state, value=result.score, intermediate_values=seen
        )

    def _stored_result(self, configuration: Configuration) -> PointResult | None:
        """Return the result in the store, or None if the point is to be trained."""
        task, record = configuration.task, find_settled(self.store, configuration.fingerprint, self.scheduler)
        if record is None:
            return None
        if record.state == "failed":
            return PointResult("FAIL")
        if record.state != "stopped":
            return PointResult("COMPLETE", record.score("validation"))
        seen = [
            e.scores.get(task.metric, task.floor)  # as the trial has reported it
            for e in record.evaluations
            if e.split == "validation" and e.step <= (record.stopped_at or record.steps)
        ]
        scores = tuple(score for score in seen if math.isfinite(score))
        return PointResult("PRUNED", scores[-1] if scores else None, scores)

    def _points_to_resubmit(self) -> Iterator[Configuration]:
        """Yield points of earlier runs in the order of their submission; see `rungs.submission_order`."""
        if self.scheduler != "none":
            yield from (c for f, c in self.budget.configurations.items() if f in self.cached)
        yield from (c for f, c in self.budget.configurations.items() if f not in self.results)

    def _next_resubmitted(self, trial_id: str) -> Configuration:
        configuration = self.to_resubmit.popleft()
        search = self.searches[self.budget.points[configuration.fingerprint].group]
        # Optuna returns waiting trials in the order of their numbers, so this trial is that of the point.
        trial = None if configuration.fingerprint in self.cached else search.ask()[0]
        self.trials[trial_id] = _SearchTrial(search, trial)
        return configuration

    def _next_new(self, trial_id: str) -> Configuration | None:
        """Return a new point of the group whose turn it is, or of the next group with points left."""
        while remaining := [s for s in self.turn_order if self.budget.num_remaining(s.name)]:
            replicate = min(s.group.replicate for s in remaining)
            current = next(s for s in remaining if s.group.replicate == replicate)
            while self.turn_order[0] is not current:
                self.turn_order.rotate(-1)
                self.points_this_turn = 0
            configuration = self._ask_new_point(current, trial_id)
            self.points_this_turn += 1
            if self.points_this_turn >= self.points_per_turn:
                self.turn_order.rotate(-1)
                self.points_this_turn = 0
            if configuration is not None:
                return configuration
        return None

    def _ask_new_point(self, search: _GroupSearch, trial_id: str) -> Configuration | None:
        """Ask for one new point.

        Returns:
            The configuration of the point. None if there is no further point, or if the result of the point
            exists and the scheduler need not see it.
        """
        found = self._suggest_point(search) or self._random_point(search)
        if found is None:
            self.budget.mark_exhausted(search.name)
            return None
        trial, parameters, configuration = found
        trial.set_user_attr(journal.TASK, configuration.task.name)
        trial.set_user_attr(journal.ORDER, len(self.budget.points))
        trial.set_user_attr(journal.FINGERPRINT, configuration.fingerprint)  # this makes the trial a point
        self.budget.add_point(search.name, parameters, configuration)
        result, search_trial = self._stored_result(configuration), _SearchTrial(search, trial)
        if result is None:
            self.trials[trial_id] = search_trial
            return configuration
        for number, score in enumerate(result.scores, 1):
            search_trial.report({"score": score, "step": number})
        search_trial.tell(result.state, result.score)
        if result.state == "FAIL":
            return None
        self.cached.add(configuration.fingerprint)
        if self.scheduler == "none":
            return None
        self.trials[trial_id] = _SearchTrial(search, None)
        return configuration

    def _suggest_point(self, search: _GroupSearch) -> _NewPoint | None:
        """Return a point that the sampler suggests, or None if it suggests only known or refused points."""
        for _ in range(samplers.MAX_REJECTED_SUGGESTIONS):
            trial, parameters = search.ask()
            configuration = self._build_if_new(search, parameters)
            if configuration is not None:
                return trial, parameters, configuration
            trial.set_user_attr(journal.REJECTED, True)
            # The suggestion counts as failed: a good result twice would draw the sampler to its point.
            _SearchTrial(search, trial).tell("FAIL")
        return None

    def _random_point(self, search: _GroupSearch) -> _NewPoint | None:
        """Return a random point, for a sampler that keeps suggesting its best points."""
        seed = len(self.budget.configurations)  # another seed each time, also after a restart
        for parameters in samplers.random_points(search.group.dimensions, seed):
            configuration = self._build_if_new(search, parameters)
            if configuration is not None:
                search.study.enqueue_trial(samplers.to_optuna_params(search.group.dimensions, parameters))
                return search.ask()[0], parameters, configuration
        return None

    def _build_if_new(self, search: _GroupSearch, parameters: Mapping[str, Value]) -> Configuration | None:
        configuration = search.group.build(parameters)
        is_known = configuration is None or configuration.fingerprint in self.budget.configurations
        return None if is_known else configuration
