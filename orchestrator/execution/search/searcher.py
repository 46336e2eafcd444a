"""Tune's OptunaSearch, one a variant and task, so that each variant is tuned with the same budget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.execution.search import samplers
from orchestrator.execution.search.budget import SearchBudget
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.record.schema import MAX_FAILURES
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Dimension, Value

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class PointResult:
    """What a sampler is told of a point. `score`: the validation score; of one that was stopped early the
    last, of one that failed none. `scores`: of one that was stopped, all that the scheduler has seen."""

    state: str
    score: float | None = None
    scores: tuple[float, ...] = ()


@dataclass
class _VariantSearch:
    """A variant's part of the search. `optuna` is None where there is nothing to vary."""

    variant: str
    dimensions: tuple[Dimension, ...]
    optuna: OptunaSearch | None
    study: Study | None = None
    """Optuna's own, of that OptunaSearch."""


@dataclass
class _SearchTrial:
    """Tune's trial: whose it is, its name in the group's OptunaSearch, how far that has seen it. A name of
    None: the sampler knows its result already, only the scheduler sees it again."""

    variant_search: _VariantSearch
    optuna_trial_id: str | None
    last_reported_step: int = 0
    reports: int = field(default=0)


_NewPoint = tuple[str, dict[str, Value], Configuration]  # its name in the OptunaSearch, and what it is


class PerVariantSearcher(Searcher):
    """Passes whatever concerns a trial to the OptunaSearch of its variant. First come the points that were
    asked before: those without a record to be trained, under early stopping also the others, whose results
    fill the rungs. Then each variant in turn gets new ones, as many as fill a pack.

    Nothing of this is restored by Tune: the study's folder and the store hold all there is to know."""

    def __init__(
        self, budget: SearchBudget, store: Store, scheduler: str, points_per_turn: int, cached: set[str]
    ) -> None:
        """`known`: fingerprints with results; new points that have one already are added."""
        super().__init__(metric="score", mode="max")
        self.budget, self.store, self.scheduler = budget, store, scheduler
        self.points_per_turn, self.cached = points_per_turn, cached
        self.trials: dict[str, _SearchTrial] = {}
        # Looked up once: seats of a driver that was killed may still be writing.
        self.results = {
            f: o for f, c in budget.configurations.items() if (o := self._stored_result(c)) is not None
        }
        cached.update(f for f, outcome in self.results.items() if outcome.state != "failed")
        self.variant_searches = {
            variant: self._make_variant_search(variant, dimensions)
            for variant, dimensions in budget.space.variants.items()
        }
        self.to_resubmit = deque(self._points_to_resubmit())
        self.turn_order, self.points_this_turn = deque(self.variant_searches.values()), 0

    # -- Tune's side ------------------------------------------------------------------------------------

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:  # Tune's own type leaves out FINISHED
        """A point to train; FINISHED when the budget is spent."""
        found = self._next_resubmitted(trial_id) if self.to_resubmit else self._next_new(trial_id)
        return Searcher.FINISHED if found is None else {"configuration": found.to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self.trials[trial_id]
        # A trial whose process died begins again; Optuna wants each report once.
        if (
            trial.optuna_trial_id is None
            or trial.variant_search.optuna is None
            or result["step"] <= trial.last_reported_step
        ):
            return
        trial.last_reported_step = result["step"]
        trial.variant_search.optuna.on_trial_result(
            trial.optuna_trial_id, {**result, "training_iteration": trial.reports}
        )
        trial.reports += 1

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self.trials.pop(trial_id, None)
        if trial is None:
            return
        if trial.optuna_trial_id is None or trial.variant_search.optuna is None:
            return
        state = (result or {}).get("state")
        if error or state == "failed":
            trial.variant_search.optuna.on_trial_complete(trial.optuna_trial_id, None, error=True)
        elif result and state != "training":
            trial.variant_search.optuna.on_trial_complete(trial.optuna_trial_id, result)
        else:  # the scheduler has stopped it, at this result
            self.trials[trial_id] = trial
            if result:
                self.on_trial_result(trial_id, result)
            del self.trials[trial_id]
            trial.variant_search.optuna.on_trial_complete(trial.optuna_trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on by its study's command")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings into its scratch folder

    # -- points -----------------------------------------------------------------------------------------

    def _make_variant_search(self, variant: str, dimensions: tuple[Dimension, ...]) -> _VariantSearch:
        from optuna import load_study, logging
        from optuna.storages import InMemoryStorage
        from optuna.trial import create_trial

        if not dimensions:
            return _VariantSearch(variant, dimensions, None)
        logging.set_verbosity(logging.WARNING)  # a line about each study otherwise
        budget, file = self.budget, self.budget.file
        made_of = samplers.distributions(dimensions)
        asked = budget.points_of(variant)
        told = {p.fingerprint: o for p in asked if (o := self.results.get(p.fingerprint))}
        drawn = {p.fingerprint: samplers.to_optuna_params(dimensions, p.parameters) for p in asked}
        complete = [
            create_trial(params=drawn[f], distributions=made_of, value=outcome.score)
            for f, outcome in told.items()
            if outcome.state == "complete"
        ]
        storage = InMemoryStorage()
        optuna = OptunaSearch(
            made_of,
            study_name=variant,
            storage=storage,
            metric="score",
            mode="max",
            sampler=samplers.make_sampler(file.sampler, file.points, len(asked), complete),
            # These it suggests first, in this order.
            points_to_evaluate=[drawn[p.fingerprint] for p in asked if p.fingerprint not in told],
        )
        for fingerprint, outcome in told.items():
            optuna.add_evaluated_point(
                drawn[fingerprint],
                outcome.score,  # type: ignore[arg-type]  # None for one without
                error=outcome.state == "failed",
                pruned=outcome.state == "stopped",
                intermediate_values=list(outcome.scores),
            )
        return _VariantSearch(variant, dimensions, optuna, load_study(study_name=variant, storage=storage))

    def _stored_result(self, configuration: Configuration) -> PointResult | None:
        """What the store knows of it; None when it is to be trained."""
        fingerprint, task = configuration.fingerprint, configuration.task
        record = self.store.get_reusable(fingerprint, scheduler_settings(self.scheduler, configuration))
        if record is None:
            failed = self.store.count_failures(fingerprint) >= MAX_FAILURES
            return PointResult("failed") if failed else None
        if record.state != "stopped":
            return PointResult("complete", record.score("validation"))
        seen = [
            e.scores.get(task.metric, task.floor)  # as the trial said
            for e in record.evaluations
            if e.split == "validation" and e.step <= (record.stopped_at or record.steps)
        ]
        scores = tuple(score for score in seen if math.isfinite(score))
        return PointResult("stopped", scores[-1] if scores else None, scores)

    def _points_to_resubmit(self) -> Iterator[Configuration]:
        """Points asked before, in the order in which Tune gets them: see rungs.entry."""
        asked = self.budget.configurations.items()
        new = [c for f, c in asked if f not in self.results]
        if self.scheduler == "none":
            return iter(new)
        return iter([*(c for f, c in asked if f in self.cached), *new])

    def _next_resubmitted(self, trial_id: str) -> Configuration:
        configuration = self.to_resubmit.popleft()
        group = self.variant_searches[configuration.variant.name]
        if configuration.fingerprint in self.cached:
            self.trials[trial_id] = _SearchTrial(group, None)
            return configuration
        if group.optuna is not None:
            group.optuna.suggest(trial_id)  # this very point
        self.trials[trial_id] = _SearchTrial(group, trial_id)
        return configuration

    def _next_new(self, trial_id: str) -> Configuration | None:
        """Of the variant whose turn it is, or of the next one that can be asked."""
        while open_groups := [g for g in self.turn_order if self.budget.num_remaining(g.variant)]:
            while self.turn_order[0] is not open_groups[0]:
                self.turn_order.rotate(-1)
                self.points_this_turn = 0
            configuration = self._ask_new_point(open_groups[0], trial_id)
            self.points_this_turn += 1
            if self.points_this_turn >= self.points_per_turn:
                self.turn_order.rotate(-1)
                self.points_this_turn = 0
            if configuration is not None:
                return configuration
        return None

    def _ask_new_point(self, variant_search: _VariantSearch, trial_id: str) -> Configuration | None:
        """A point that was not asked before; None for one whose result is known and that nobody need see, and
        when there is none."""
        found = self._suggest_point(variant_search, trial_id) or self._random_point(variant_search, trial_id)
        if found is None:
            self.budget.mark_exhausted(variant_search.variant)
            return None
        name, parameters, configuration = found
        self.budget.add_point(variant_search.variant, parameters, configuration)
        result = self._stored_result(configuration)
        if result is None:
            self.trials[trial_id] = _SearchTrial(variant_search, name)
            return configuration
        self._tell_optuna(variant_search, name, result)
        if result.state == "failed":
            return None
        self.cached.add(configuration.fingerprint)
        if self.scheduler == "none":
            return None
        self.trials[trial_id] = _SearchTrial(variant_search, None)
        return configuration

    def _suggest_point(self, variant_search: _VariantSearch, trial_id: str) -> _NewPoint | None:
        """What the sampler suggests; None when all its suggestions were asked before, or are refused."""
        if variant_search.optuna is None:
            return None
        for attempt in range(samplers.MAX_REJECTED_SUGGESTIONS):
            name = f"{trial_id}-{attempt}"
            parameters = samplers.from_optuna_params(
                variant_search.dimensions, variant_search.optuna.suggest(name) or {}
            )
            configuration = self._build_if_new(variant_search, parameters)
            if configuration is not None:
                return name, parameters, configuration
            # As if it had failed: a sampler told twice of a good point comes back to it the more.
            variant_search.optuna.on_trial_complete(name, None, error=True)
        return None

    def _random_point(self, variant_search: _VariantSearch, trial_id: str) -> _NewPoint | None:
        """One at random, for a sampler that cannot leave its best points: it knows nothing of repeats."""
        seed = len(self.budget.configurations)  # elsewhere each time, also after a restart
        for parameters in samplers.random_points(variant_search.dimensions, seed):
            configuration = self._build_if_new(variant_search, parameters)
            if configuration is None:
                continue
            if variant_search.optuna is not None and variant_search.study is not None:
                variant_search.study.enqueue_trial(
                    samplers.to_optuna_params(variant_search.dimensions, parameters)
                )
                variant_search.optuna.suggest(trial_id)  # this very point
            return trial_id, parameters, configuration
        return None

    def _build_if_new(
        self, variant_search: _VariantSearch, parameters: Mapping[str, Value]
    ) -> Configuration | None:
        configuration = self.budget.build(variant_search.variant, parameters)
        known = configuration is None or configuration.fingerprint in self.budget.configurations
        return None if known else configuration

    def _tell_optuna(self, variant_search: _VariantSearch, name: str, result: PointResult) -> None:
        if variant_search.optuna is None:
            return
        for number, score in enumerate(result.scores):
            variant_search.optuna.on_trial_result(name, {"score": score, "training_iteration": number})
        value = {"score": result.score} if result.state == "complete" else None
        variant_search.optuna.on_trial_complete(name, value, error=result.state == "failed")
