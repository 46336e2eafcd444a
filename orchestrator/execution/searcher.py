"""The searcher of a search that Ray Tune calls: it passes on points, and their results to Optuna."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.trial import TrialState

from orchestrator.execution.search import Point, Search
from orchestrator.execution.tune import ConfigurationQueue
from orchestrator.study.configuration import Configuration


class PerGroupSearcher(ConfigurationQueue):
    """Suggest the points of a search to Ray Tune: those of earlier runs, then new ones of each group in turn.

    Under early stopping, Tune also gets the points that have a result, because the scheduler compares new
    lanes with them.
    """

    def __init__(
        self,
        call_broker: Callable[..., object],
        search: Search,
        scheduler: str,
        block: int,
        cached: set[str],
        max_concurrent: int,
    ) -> None:
        """Look up the results of the points.

        Args:
            call_broker: Calls a method of the broker, and waits for its answer.
            search: The search, after `Search.begin`.
            scheduler: The name of the early stopping scheduler.
            block: Number of points of one group that are suggested in a row.
            cached: Fingerprints with a usable result. Points that have a result already are added.
            max_concurrent: The largest number of unfinished trials; it may change at any time.
        """
        self.search, self.scheduler, self.block, self.cached = search, scheduler, block, cached
        self.points: dict[str, Point] = {}
        """Fingerprint -> the point, if Optuna has no result of it."""
        replayed, lost = list[Configuration](), list[Configuration]()
        waiting = {fingerprint for group in search.groups.values() for fingerprint in group.waiting}
        for fingerprint, configuration in search.configurations.items():
            if fingerprint in waiting:
                continue
            record = search.settled(fingerprint)
            if record is None:  # Optuna has a result, and the store has none any more
                lost.append(configuration)
            elif record.state != "failed":
                cached.add(fingerprint)
                replayed.append(configuration)
        known = replayed if scheduler != "none" else []
        super().__init__(call_broker, [*known, *lost], max_concurrent)

    def suggest(self, trial_id: str) -> Any:
        """Return the next point of the search as a trial's configuration.

        Returns:
            None if Tune must ask again later: `max_concurrent` trials are unfinished, or the search has no
            point to suggest until one of them ends. `Searcher.FINISHED` if the search is complete or aborted.
        """
        if not self.queue and len(self.unfinished) < self.max_concurrent:
            self.queue.extend(self._next_points())
        return super().suggest(trial_id)

    def _next_points(self) -> list[Configuration]:
        """Return a point that is to be trained, or replayed to the scheduler; empty at the end."""
        while (group := self.search.next_group(self.block)) is not None:
            point = self.search.ask(group)
            if point is None:
                continue
            fingerprint = point.configuration.fingerprint
            record = self.search.settled(fingerprint)  # trainers of a killed driver may still write records
            if record is None:
                self.points[fingerprint] = point
                return [point.configuration]
            point.tell_record(record)
            if record.state != "failed":
                self.cached.add(fingerprint)
                if self.scheduler != "none":
                    return [point.configuration]
        return []

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an intermediate result to Optuna."""
        if point := self.points.get(self.unfinished[trial_id].fingerprint):
            point.report(result["step"], result["score"])

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Pass the end of a trial to Optuna, unless its point is to be trained again."""
        point, state = self.points.get(self.unfinished[trial_id].fingerprint), (result or {}).get("state")
        super().on_trial_complete(trial_id, result, error)
        if error or point is None or state is None:
            return
        if state == "training":
            if result["done"]:  # the scheduler has stopped the trial at this result
                point.report(result["step"], result["score"])
                point.tell(TrialState.PRUNED, point.score)
        elif record := self.search.settled(point.configuration.fingerprint):
            point.tell_record(record)
        elif state != "failed":  # another node's record may become visible here later
            point.tell(TrialState.COMPLETE, result["score"])
