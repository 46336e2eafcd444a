"""The results of a study: every frame from which its report, its verdicts and its exports are made.

`analysis.analyze` makes them from records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import costs, runs
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tables import make_curves

if TYPE_CHECKING:
    import pandas as pd


def _empty() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()


@dataclass(frozen=True)
class Results:
    """The results of a study as pandas frames.

    Scores are values of the task's metric; higher is better. A missing number is NaN. An interval is a pair
    of columns that end in `_low` and `_high`, at 95 % confidence. `panel` is the title of a task and base
    model, with the settings whose values may not be compared. `curve` is a variant, with the settings in
    which its curves differ. Frames that do not belong to the kind of the study are empty.
    """

    study: StudyFile
    records: Sequence[Record] = field(repr=False)
    """The records, under the names of this study."""
    runs: pd.DataFrame
    """One row a configuration with a record: the columns of `records.parquet` and those of
    `runs.run_frame`, such as panel, curve and label. With `--select published` the validation scores are the
    test scores, by which the rates are chosen."""
    points: pd.DataFrame
    """One row a point: the runs that differ in the seed alone. See `curves.make_points`. The best validation
    score is first."""
    best: pd.DataFrame
    """One row a curve, search or tuning: its best point, which validation chose. Columns: panel, variant,
    curve, learning_rate, `rates` (all equal best rates as text), both scores with intervals, seeds,
    `gain` over the untrained base, `nothing_learned`, the numbers of `usable` and `ended` runs, and the
    `fingerprint` of its best run. For curves the shape: `width` and `width_90` (decades of rate within
    0.01 of the best score, and with 90 % of the way from the floor to it; `_is_bound` if they are at
    least that wide), `lost` (validation score lost at the panel's common rate) and `lost_near` (mean
    within half a decade), `cliff` (the first rate that breaks down), `bracket` (whether the grid brackets
    the best rate) and `test_at_common_rate`. For searches and tunings: `replicate`, `settings`, `edges`,
    `points`, `steps` and `max_steps`."""
    panels: pd.DataFrame
    """One row a panel: task, model, metric, floor, mean scores of the untrained base, `reference` (the label
    of LoRA's curve) and `common_rate`, at which the curves are compared."""
    comparison: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: one row a panel and variant, the baseline first. `difference` of the test score from
    the baseline's, `outcome`, `counts` (whether the baseline matches or beats it), usable tunings."""
    tuned: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: one row a panel, with the numbers of variants that the baseline matches or beats."""
    pooled: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: validation score over learning rate of each variant, from all replicates."""
    fixed_rate: pd.DataFrame = field(default_factory=_empty)
    """One row a panel and variant: its `regret` at the baseline's best rate, its differences from the
    baseline there and at its own best rate, and whether the order is reversed (`reversal`)."""
    winners: pd.DataFrame = field(default_factory=_empty)
    """One row a panel and learning rate: the variant with the best mean test score."""
    factors: pd.DataFrame = field(default_factory=_empty)
    """Sensitivity: one row a panel, variant and factor. `misset` (A), `retuned` (B), `gain` (C), `off_by_2`
    and `off_by_half_decade` (D) are defined in `effects`."""
    claims: pd.DataFrame = field(default_factory=_empty)
    """Sensitivity: one row a panel and variant, with the test of "the learning rate matters most"."""
    costs: pd.DataFrame = field(default_factory=_empty)
    """One row a panel and curve, see `costs.cost_frame`."""
    verdicts: pd.DataFrame = field(default_factory=_empty)
    """One row a verdict, the most important first. The columns are the fields of `verdicts.Verdict`."""
    warnings: Sequence[str] = ()
    """The limits of what the results show, one line each; faults of the data first."""
    best_lanes: pd.DataFrame = field(default_factory=_empty)
    """One row a task, base model and variant: the best point, and its best run, whose adapter is kept. It is
    chosen as `best` is, over all curves of the variant; with `--select published` by validation scores all
    the same."""

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study.name

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row a configuration and step, with the columns of `curves.parquet`."""
        return make_curves(self.records).to_pandas()

    @cached_property
    def missing(self) -> int:
        """The number of the study's configurations without a record."""
        return len(set(self.study.configurations) - set(self.runs["fingerprint"]))

    @property
    def states(self) -> dict[str, int]:
        """The number of runs with each label."""
        counts = self.runs["label"].value_counts()
        return {label: int(counts.get(label, 0)) for label in runs.LABELS}

    def __repr__(self) -> str:
        return f"<Results of {self.name}: {len(self.runs)} runs, {len(self.points)} points>"

    def to_json(self) -> dict[str, Any]:
        """Return all numbers of the report as JSON types, with None in place of NaN.

        The frames of `runs` and `curves` are left out; they are in the store's Parquet files.
        """
        left_out = ("study", "records", "runs", "warnings", "best_lanes")
        names = [each.name for each in fields(self) if each.name not in left_out]
        return {
            "states": self.states,
            "warnings": list(self.warnings),
            "provenance": runs.count_provenance(self.records),
            "time_use": costs.time_use(self.runs),
            **{name: frame_rows(getattr(self, name)) for name in names},
        }


def frame_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as JSON objects. Columns that only group rows are left out."""
    shown = frame.drop(columns=["group", "point"], errors="ignore").astype(object)
    return [{str(name): _plain(value) for name, value in row.items()} for row in shown.to_dict("records")]


def _plain(value: Any) -> Any:
    """Return a value of a frame as a JSON type."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
