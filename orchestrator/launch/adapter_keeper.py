"""Removal of adapters in a study with `--save-adapters best`, by the driver.

Which lane of a variant is the best is known only at the end, when all seeds of its points have ended. Until
then the study keeps the adapter of the best run of each point, the best points first, as long as all of them
together have less than `MAX_RUNNING_BYTES`. It always keeps the best one so far of each variant and task.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from orchestrator.analyze.best_lanes import LaneGoal, ScoredLane, rank_lanes, score_lane
from orchestrator.record.adapters import list_adapters
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings

_log = logging.getLogger(__name__)

MAX_RUNNING_BYTES = 2 * 2**30
"""The total size up to which a running study keeps more adapters than the best one of each goal."""


@dataclass
class AdapterKeeper:
    """Keeps the adapters of a study's best lanes and removes those of the others.

    An error of the disk is logged and not raised, because a study's results do not need the kept adapters.
    """

    store: Store
    settings: AnalysisSettings
    """The settings of the study's analysis, by which lanes are compared."""
    others: Set[str] = frozenset()
    """Fingerprints of lanes that other studies list or have trained; their adapters are not removed."""
    lanes: dict[LaneGoal, dict[str, ScoredLane]] = field(default_factory=lambda: defaultdict(dict))
    """Goal -> fingerprint -> the lane, of all records that were added."""
    ranked: dict[LaneGoal, list[ScoredLane]] = field(default_factory=dict)
    """The result of `rank_lanes` for `lanes`."""

    def add(self, records: Iterable[Record]) -> None:
        """Add records, and remove the adapters that the study need not keep any more."""
        changed = set()
        for record in records:
            lane = score_lane(record, self.settings)
            self.lanes[lane.goal][lane.fingerprint] = lane
            changed.add(lane.goal)
        for goal in changed:  # not all goals for every record: a study may have thousands
            self.ranked |= rank_lanes(self.lanes[goal].values())
        # Trainers write an adapter before its record, so only lanes with a record are judged.
        known = {fingerprint for lanes in self.lanes.values() for fingerprint in lanes}
        self._remove(known - {lane.fingerprint for lane in self._running()})

    def finish(self, records: Iterable[Record]) -> None:
        """Remove all adapters but those of the best lanes, at the end of a complete study.

        Args:
            records: All records of the study.
        """
        lanes = [score_lane(record, self.settings) for record in records]
        best = {ranked[0].fingerprint for ranked in rank_lanes(lanes).values()}
        self._remove({lane.fingerprint for lane in lanes} - best)

    def _running(self) -> Iterator[ScoredLane]:
        """Yield the lanes whose adapters a running study keeps."""
        sizes = {}
        for path in list_adapters(self.store, "best"):
            try:
                sizes[path.stem] = path.stat().st_size
            except FileNotFoundError:  # another driver, or the user, has removed it
                continue
        ranked, total = self.ranked.values(), 0
        for place in range(max(map(len, ranked), default=0)):
            for lane in (lanes[place] for lanes in ranked if len(lanes) > place):
                total += sizes.get(lane.fingerprint, 0)
                if place == 0 or total <= MAX_RUNNING_BYTES:
                    yield lane

    def _remove(self, fingerprints: Set[str]) -> None:
        """Remove the adapters of lanes, except of those in `others`."""
        for path in list_adapters(self.store, "best"):
            if path.stem in fingerprints and path.stem not in self.others:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    _log.warning("%s is not removed: %s", path, error)
