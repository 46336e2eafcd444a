"""A driver of the searcher in place of Ray Tune, with real Optuna, a real store and a formula as score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from points import configuration
from ray.tune.search import Searcher

from orchestrator.execution.schedulers import find_settled
from orchestrator.execution.search import FINGERPRINT, JOURNAL_FILE, Search, open_search
from orchestrator.execution.searcher import PerGroupSearcher
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


def journal(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Return group -> points, read by Optuna from the journal of the study in `folder`."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
    studies = [optuna.load_study(study_name=n, storage=storage) for n in optuna.get_all_study_names(storage)]
    return {s.study_name: [t for t in s.trials if FINGERPRINT in t.user_attrs] for s in studies}


def asked(folder: Path) -> list[str]:
    """Return the fingerprints of the points in the journal, group by group."""
    return [trial.user_attrs[FINGERPRINT] for trials in journal(folder).values() for trial in trials]


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
        self.budget: Search = open_search(self.study, sampler, points, spaces, templates, replicates)
        self.budget.begin(lambda fingerprint: find_settled(self.store, fingerprint, scheduler))
        self.cached: set[str] = set()
        self.search = PerGroupSearcher(
            lambda *call: None, self.budget, scheduler, lanes, self.cached, max_concurrent=1000
        )
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

    def optuna_trials(self, variant: str) -> list[optuna.trial.FrozenTrial]:
        """Return the points of a group in the journal on disk."""
        return journal(self.study)[variant]
