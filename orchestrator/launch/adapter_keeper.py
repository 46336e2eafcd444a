"""Removal of adapters in a study with `--save-adapters best`, by the driver.

Which lane of a variant is the best is known only at the end, when all seeds of its points have ended. Until
then the study keeps the adapter of the best run of each point, the best points first, as long as all of them
together have less than `MAX_RUNNING_BYTES`. It always keeps the best one so far of each variant and task.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from orchestrator.analyze.best_lanes import LaneGoal, ScoredLane, rank_lanes, score_lane
from orchestrator.record.kept_adapters import StudyAdapters, file_name
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings

_log = logging.getLogger(__name__)

MAX_RUNNING_BYTES = 2 * 2**30
"""The total size up to which a running study keeps more adapters than the best one of each goal."""


@dataclass
class AdapterKeeper:
    """Keeps the adapters of a study's best lanes and removes those of the others.

    An error of the disk is logged and not raised, because a study's results do not need the kept adapters.
    """

    adapters: StudyAdapters
    settings: AnalysisSettings
    """The settings of the study's analysis, by which lanes are compared."""
    lanes: dict[LaneGoal, dict[str, ScoredLane]] = field(default_factory=lambda: defaultdict(dict))
    """Goal -> fingerprint -> the lane, of all records that were added."""
    ranked: dict[LaneGoal, list[ScoredLane]] = field(default_factory=dict)
    """The result of `rank_lanes` for `lanes`."""
    names: dict[str, str] = field(default_factory=dict)
    """Fingerprint -> the name of the file of its adapter."""

    def add(self, records: Iterable[Record]) -> None:
        """Add records, and remove the adapters that the study need not keep any more."""
        changed = set()
        for record in records:
            lane = score_lane(record, self.settings)
            self.lanes[lane.goal][lane.fingerprint] = lane
            self.names[lane.fingerprint] = file_name(record)
            changed.add(lane.goal)
        for goal in changed:  # not all goals for every record: a study may have thousands
            self.ranked |= rank_lanes(self.lanes[goal].values())
        self._remove_others({self.names[lane.fingerprint] for lane in self._running()}, is_final=False)

    def finish(self, records: Iterable[Record]) -> None:
        """Remove all adapters but those of the best lanes, at the end of a complete study.

        Args:
            records: All records of the study. The adapter of a best lane that another study of the store has
                trained, and keeps, is kept for this study too.
        """
        by_fingerprint = {record.fingerprint: record for record in records}
        ranked = rank_lanes(score_lane(record, self.settings) for record in by_fingerprint.values())
        best = [by_fingerprint[lanes[0].fingerprint] for lanes in ranked.values()]
        for record in best:
            try:
                self.adapters.take_over(record)
            except OSError as error:
                _log.warning("the adapter of %s is not kept: %s", record.fingerprint[:12], error)
        self._remove_others({file_name(record) for record in best}, is_final=True)

    def _running(self) -> Iterator[ScoredLane]:
        """Yield the lanes whose adapters a running study keeps."""
        sizes = {}
        for path in self.adapters.files("best"):
            try:
                sizes[path.name] = path.stat().st_size
            except FileNotFoundError:  # another driver of this study's folder, or the user, has removed it
                continue
        ranked, total = self.ranked.values(), 0
        for place in range(max(map(len, ranked), default=0)):
            for lane in (lanes[place] for lanes in ranked if len(lanes) > place):
                total += sizes.get(self.names[lane.fingerprint], 0)
                if place == 0 or total <= MAX_RUNNING_BYTES:
                    yield lane

    def _remove_others(self, kept: set[str], is_final: bool) -> None:
        try:
            self.adapters.remove_others(kept, None if is_final else set(self.names.values()))
        except OSError as error:
            _log.warning("adapters in %s are not removed: %s", self.adapters.root, error)
