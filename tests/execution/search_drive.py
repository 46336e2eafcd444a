"""A driver of the searcher in place of Ray Tune, with real Optuna, a real store and a formula as score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from points import configuration
from ray.tune.search import Searcher

from orchestrator.execution.search import journal
from orchestrator.execution.search.budget import SearchBudget, open_search
from orchestrator.execution.search.searcher import PerGroupSearcher
from orchestrator.finetune.resolve.option_names import variant_hyperparameters
from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, LRSchedule, Value
from orchestrator.study.space import Space, apply_values, parse_space

STEPS = 90
ASHA = "asha loss=min first=30 eta=4 last=30"


def build(variant: str, values: Mapping[str, Value]) -> Configuration:
    point = replace(configuration(variant), lr_schedule=LRSchedule(STEPS), evaluations=3)
    return apply_values(point, values)


def own(*variants: str) -> dict[str, Mapping[str, Value]]:
    """Return the settings of variants."""
    return {variant: variant_hyperparameters(variant) for variant in variants}


def space(*words: str, variants: tuple[str, ...] = ("lora", "hira")) -> Space:
    return parse_space(words, own(*variants), (1e-4, 1.0))


def score(point: Configuration) -> float:
    """Return a score that is highest at a learning rate of 1e-2 and rank 16."""
    rate = abs(math.log10(point.optimizer.learning_rate) + 2)
    return round(1 - rate / 4 - abs(point.variant.rank - 16) / 64, 6)


def record(point: Configuration, state: str = "finished") -> Record:
    steps = 30 if state == "stopped" else STEPS
    seen = tuple(
        Evaluation(s, "validation", {"loss": 1.0, "exact_match": score(point)})
        for s in range(30, steps + 1, 30)
    )
    stopped = {"stopping_settings": ASHA, "stopped_at": 30} if state == "stopped" else {}
    return Record(point.fingerprint, point, state, steps, evaluations=seen, **stopped)  # type: ignore[arg-type]


def asked(folder: Path) -> list[str]:
    """Return the fingerprints in the journal of the study in `folder`, in the order of the suggestions."""
    trials = [t for each in journal.read_trials(folder / journal.JOURNAL_FILE).values() for t in each]
    points = [trial.user_attrs for trial in trials if journal.FINGERPRINT in trial.user_attrs]
    return [each[journal.FINGERPRINT] for each in sorted(points, key=lambda each: each[journal.ORDER])]


class Drive:
    """A driver that calls a searcher as Ray Tune does."""

    def __init__(
        self,
        folder: Path,
        over: Space,
        points: int = 6,
        sampler: str = "tpe",
        scheduler: str = "none",
        lanes: int = 2,
        replicates: int = 1,
    ) -> None:
        self.store = Store(folder / "store")
        self.study = folder / "study"
        self.study.mkdir(exist_ok=True)
        templates = [build(variant, {}) for variant in over]
        spaces = {"letters": over}
        self.budget: SearchBudget = open_search(self.study, sampler, points, spaces, templates, replicates)
        self.budget.save()
        asha = ASHA if scheduler == "asha" else ""
        known = {f for f in self.budget.configurations if self.store.get_reusable(f, asha)}
        self.search = PerGroupSearcher(self.budget, self.store, scheduler, lanes, known)
        self.running: dict[str, Configuration] = {}
        self.given: list[Configuration] = []
        self.calls = 0

    def ask(self) -> Configuration | str | None:
        trial = f"t{self.calls}"
        self.calls += 1
        found = self.search.suggest(trial)
        if not isinstance(found, dict):
            return found
        point: Configuration = found["configuration"]
        self.running[trial] = point
        self.given.append(point)
        return point

    def end(self, trial: str, state: str = "finished") -> None:
        """Write the record of a lane, then report the end of its trial."""
        point = self.running.pop(trial)
        self.store.put(record(point, state))
        result: dict[str, Any] = {"step": 30, "score": score(point), "state": "training"}
        if state == "stopped":
            self.search.on_trial_complete(trial, {**result, "done": True})
            return
        self.search.on_trial_result(trial, result)
        value = 0.0 if state == "diverged" else score(point)
        self.search.on_trial_complete(trial, {**result, "step": STEPS, "state": state, "score": value})

    def all(self, at_once: int = 4) -> Counter[str]:
        """Run the search to its end, and return the number of points of each variant."""
        while True:
            found = self.ask() if len(self.running) < at_once else None
            if found == Searcher.FINISHED and not self.running:
                return Counter(point.variant.name for point in self.given)
            if not isinstance(found, Configuration):
                assert self.running, "nothing runs and nothing can be suggested"
                self.end(next(iter(self.running)))

    def asked(self) -> list[str]:
        """Return the fingerprints in the journal on disk, in the order in which they were asked for."""
        return asked(self.study)

    def optuna_trials(self, variant: str) -> list[Any]:
        """Return the trials in a group's Optuna study, without rejected suggestions."""
        trials = self.search.searches[variant].study.trials
        return [trial for trial in trials if journal.REJECTED not in trial.user_attrs]
