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
from orchestrator.execution.search.budget import Ledger
from orchestrator.execution.tune.rungs import settings
from orchestrator.record.schema import FAILURES_ALLOWED
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Dimension, Value

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Outcome:
    """What a sampler is told of a point. `score`: the validation score; of one that was stopped early the
    last, of one that failed none. `scores`: of one that was stopped, all that the scheduler has seen."""

    state: str
    score: float | None = None
    scores: tuple[float, ...] = ()


@dataclass
class _Group:
    """A variant's part of the search. `optuna` is None where there is nothing to vary."""

    variant: str
    dimensions: tuple[Dimension, ...]
    optuna: OptunaSearch | None
    study: Study | None = None
    """Optuna's own, of that OptunaSearch."""


@dataclass
class _Trial:
    """Tune's trial: whose it is, its name in the group's OptunaSearch, how far that has seen it. A name of
    None: the sampler knows its result already, only the scheduler sees it again."""

    group: _Group
    name: str | None
    step: int = 0
    reports: int = field(default=0)


_New = tuple[str, dict[str, Value], Configuration]  # its name in the OptunaSearch, and what it is


class PerGroupSearch(Searcher):
    """Passes whatever concerns a trial to the OptunaSearch of its variant. First come the points that were
    asked before: those without a record to be trained, under early stopping also the others, whose results
    fill the rungs. Then each variant in turn gets new ones, as many as fill a pack.

    Nothing of this is restored by Tune: the study's folder and the store hold all there is to know."""

    def __init__(self, ledger: Ledger, store: Store, scheduler: str, lanes: int, known: set[str]) -> None:
        """`known`: fingerprints with results; new points that have one already are added."""
        super().__init__(metric="score", mode="max")
        self.ledger, self.store, self.scheduler = ledger, store, scheduler
        self.lanes, self.known = lanes, known
        self.trials: dict[str, _Trial] = {}
        # Looked up once: seats of a driver that was killed may still be writing.
        self.outcomes = {f: o for f, c in ledger.asked.items() if (o := self._outcome(c)) is not None}
        known.update(f for f, outcome in self.outcomes.items() if outcome.state != "failed")
        self.groups = {
            variant: self._group(variant, dimensions) for variant, dimensions in ledger.space.variants.items()
        }
        self.again = deque(self._again())
        self.turns, self.in_block = deque(self.groups.values()), 0

    # -- Tune's side ------------------------------------------------------------------------------------

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:  # Tune's own type leaves out FINISHED
        """A point to train; FINISHED when the budget is spent."""
        found = self._next_again(trial_id) if self.again else self._next_new(trial_id)
        return Searcher.FINISHED if found is None else {"configuration": found.to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self.trials[trial_id]
        # A trial whose process died begins again; Optuna wants each report once.
        if trial.name is None or trial.group.optuna is None or result["step"] <= trial.step:
            return
        trial.step = result["step"]
        trial.group.optuna.on_trial_result(trial.name, {**result, "training_iteration": trial.reports})
        trial.reports += 1

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self.trials.pop(trial_id, None)
        if trial is None:
            return
        if trial.name is None or trial.group.optuna is None:
            return
        state = (result or {}).get("state")
        if error or state == "failed":
            trial.group.optuna.on_trial_complete(trial.name, None, error=True)
        elif result and state != "training":
            trial.group.optuna.on_trial_complete(trial.name, result)
        else:  # the scheduler has stopped it, at this result
            self.trials[trial_id] = trial
            if result:
                self.on_trial_result(trial_id, result)
            del self.trials[trial_id]
            trial.group.optuna.on_trial_complete(trial.name, None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on by its study's command")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings into its scratch folder

    # -- points -----------------------------------------------------------------------------------------

    def _group(self, variant: str, dimensions: tuple[Dimension, ...]) -> _Group:
        from optuna import load_study, logging
        from optuna.storages import InMemoryStorage
        from optuna.trial import create_trial

        if not dimensions:
            return _Group(variant, dimensions, None)
        logging.set_verbosity(logging.WARNING)  # a line about each study otherwise
        ledger, file = self.ledger, self.ledger.file
        made_of = samplers.distributions(dimensions)
        asked = ledger.of(variant)
        told = {p.fingerprint: o for p in asked if (o := self.outcomes.get(p.fingerprint))}
        drawn = {p.fingerprint: samplers.drawn(dimensions, p.parameters) for p in asked}
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
            sampler=samplers.sampler(file.sampler, file.points, len(asked), complete),
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
        return _Group(variant, dimensions, optuna, load_study(study_name=variant, storage=storage))

    def _outcome(self, configuration: Configuration) -> Outcome | None:
        """What the store knows of it; None when it is to be trained."""
        fingerprint, task = configuration.fingerprint, configuration.task
        record = self.store.meets(fingerprint, settings(self.scheduler, configuration))
        if record is None:
            failed = self.store.failures(fingerprint) >= FAILURES_ALLOWED
            return Outcome("failed") if failed else None
        if record.state != "stopped":
            return Outcome("complete", record.score("validation"))
        seen = [
            e.scores.get(task.metric, task.floor)  # as the trial said
            for e in record.evaluations
            if e.split == "validation" and e.step <= (record.stopped_at or record.steps)
        ]
        scores = tuple(score for score in seen if math.isfinite(score))
        return Outcome("stopped", scores[-1] if scores else None, scores)

    def _again(self) -> Iterator[Configuration]:
        """Points asked before, in the order in which Tune gets them: see rungs.entry."""
        asked = self.ledger.asked.items()
        new = [c for f, c in asked if f not in self.outcomes]
        if self.scheduler == "none":
            return iter(new)
        return iter([*(c for f, c in asked if f in self.known), *new])

    def _next_again(self, trial_id: str) -> Configuration:
        configuration = self.again.popleft()
        group = self.groups[configuration.variant.name]
        if configuration.fingerprint in self.known:
            self.trials[trial_id] = _Trial(group, None)
            return configuration
        if group.optuna is not None:
            group.optuna.suggest(trial_id)  # this very point
        self.trials[trial_id] = _Trial(group, trial_id)
        return configuration

    def _next_new(self, trial_id: str) -> Configuration | None:
        """Of the variant whose turn it is, or of the next one that can be asked."""
        while open_groups := [g for g in self.turns if self.ledger.left(g.variant)]:
            while self.turns[0] is not open_groups[0]:
                self.turns.rotate(-1)
                self.in_block = 0
            configuration = self._ask(open_groups[0], trial_id)
            self.in_block += 1
            if self.in_block >= self.lanes:
                self.turns.rotate(-1)
                self.in_block = 0
            if configuration is not None:
                return configuration
        return None

    def _ask(self, group: _Group, trial_id: str) -> Configuration | None:
        """A point that was not asked before; None for one whose result is known and that nobody need see, and
        when there is none."""
        found = self._suggested(group, trial_id) or self._other(group, trial_id)
        if found is None:
            self.ledger.exhaust(group.variant)
            return None
        name, parameters, configuration = found
        self.ledger.ask(group.variant, parameters, configuration)
        outcome = self._outcome(configuration)
        if outcome is None:
            self.trials[trial_id] = _Trial(group, name)
            return configuration
        self._tell(group, name, outcome)
        if outcome.state == "failed":
            return None
        self.known.add(configuration.fingerprint)
        if self.scheduler == "none":
            return None
        self.trials[trial_id] = _Trial(group, None)
        return configuration

    def _suggested(self, group: _Group, trial_id: str) -> _New | None:
        """What the sampler suggests; None when all its suggestions were asked before, or are refused."""
        if group.optuna is None:
            return None
        for attempt in range(samplers.REPEATS):
            name = f"{trial_id}-{attempt}"
            parameters = samplers.values(group.dimensions, group.optuna.suggest(name) or {})
            configuration = self._unasked(group, parameters)
            if configuration is not None:
                return name, parameters, configuration
            # As if it had failed: a sampler told twice of a good point comes back to it the more.
            group.optuna.on_trial_complete(name, None, error=True)
        return None

    def _other(self, group: _Group, trial_id: str) -> _New | None:
        """One at random, for a sampler that cannot leave its best points: it knows nothing of repeats."""
        seed = len(self.ledger.asked)  # elsewhere each time, also after a restart
        for parameters in samplers.others(group.dimensions, seed):
            configuration = self._unasked(group, parameters)
            if configuration is None:
                continue
            if group.optuna is not None and group.study is not None:
                group.study.enqueue_trial(samplers.drawn(group.dimensions, parameters))
                group.optuna.suggest(trial_id)  # this very point
            return trial_id, parameters, configuration
        return None

    def _unasked(self, group: _Group, parameters: Mapping[str, Value]) -> Configuration | None:
        configuration = self.ledger.build(group.variant, parameters)
        known = configuration is None or configuration.fingerprint in self.ledger.asked
        return None if known else configuration

    def _tell(self, group: _Group, name: str, outcome: Outcome) -> None:
        if group.optuna is None:
            return
        for number, score in enumerate(outcome.scores):
            group.optuna.on_trial_result(name, {"score": score, "training_iteration": number})
        value = {"score": outcome.score} if outcome.state == "complete" else None
        group.optuna.on_trial_complete(name, value, error=outcome.state == "failed")
