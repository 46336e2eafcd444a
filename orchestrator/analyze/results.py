"""The results of a study: the frames from which its report, its verdicts and its exports are made.

`analysis.analyze` computes the results from the records of the study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import costs, runs
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tables import make_curves

if TYPE_CHECKING:
    import pandas as pd

HARNESS_COLUMNS = (
    *("panel", "curve", "fingerprint", "task", "settings", "subtask", "metric", "score", "items"),
    *("untrained", "difference", "difference_low", "difference_high", "is_whole"),
)
"""The columns of `Results.harness`."""


def _empty() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()


@dataclass(frozen=True)
class Results:
    """The results of a study, as pandas data frames.

    Scores are values of the task's metric; a higher score is better. A missing number is NaN. Two columns
    that end in `_low` and `_high` are the ends of a 95 % confidence interval.

    The column `panel` names a task and a base model, with the settings that may not differ between compared
    runs. The column `curve` names a variant, with the settings in which its curves differ.

    A frame that does not belong to the kind of the study is empty.
    """

    study: StudyFile
    records: Sequence[Record] = field(repr=False)
    """The records, with the names that tasks, models and variants have in this study."""
    runs: pd.DataFrame
    """One row for each configuration with a record. The columns are those of `records.parquet` and those of
    `runs.run_frame`, such as panel, curve and label. With `--select published`, the validation scores are the
    test scores, which choose the learning rates."""
    points: pd.DataFrame
    """One row for each point, a set of runs that differ in the seed alone. `curves.make_points` describes the
    columns. The point with the best validation score is first."""
    best: pd.DataFrame
    """One row for each curve, search or tuning, about its best point, which validation chose.

    All studies have the columns panel, variant, curve, learning_rate, validation_score, test_score and seeds,
    and these:

    - `rates`: all learning rates with the best score, as text.
    - `gain`: the test score minus that of the untrained base model.
    - `forgetting`, `forgetting_bits_per_byte`: the loss on the split "general" minus that of the untrained
      base model, in nats per token and in bits per byte (`orchestrator.finetune.evaluation.general_text`).
    - `test_bits_per_byte`: the loss of the test answers.
    - `nothing_learned`: whether the best score is no better than the untrained base model or a constant
      answer.
    - `usable`, `ended`: the number of runs that finished without collapsing, and the number of runs that
      finished, collapsed or diverged.
    - `fingerprint`: the best run of the best point.

    Curves have these columns:

    - `width`: the width in decades of the range of rates whose score is within 0.01 of the best score.
    - `width_90`: the same for scores of at least floor + 0.9 (best score - floor).
    - `width_is_bound`, `width_90_is_bound`: whether the true width may be larger.
    - `lost`: the validation score that the curve loses at the panel's common rate against its best rate.
    - `lost_near`: the mean loss within half a decade of the best rate.
    - `cliff`: the first rate above the best rate at which training breaks down.
    - `bracket`: "yes" if the best rate lies inside the grid, else the ends of the grid that have the best
      score.
    - `test_at_common_rate`: the test score at the panel's common rate.

    Searches and tunings have the columns that `curves.best_of_groups` describes.
    """
    panels: pd.DataFrame
    """One row for each panel: task, model, metric, floor, mean scores of the untrained base model,
    `reference` (the label of LoRA's curve) and `common_rate` (the learning rate at which the curves are
    compared)."""
    comparison: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: one row for each panel and variant, the baseline first. `difference` is the
    variant's test score minus that of the baseline, and `forgetting_difference` likewise. `outcome` is the
    word for the difference of the scores. `counts` says whether the baseline matches or beats the variant.
    `usable` is the number of usable tunings."""
    tuned: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: one row for each panel. It has lower 95 % confidence bounds of the number of
    variants that the baseline matches or beats (`holds_at_least`) and of the number of variants that beat the
    baseline (`beaten_at_least`)."""
    pooled: pd.DataFrame = field(default_factory=_empty)
    """Replicated tuning: the validation score of each variant over the learning rate, averaged over all
    replicates."""
    fixed_rate: pd.DataFrame = field(default_factory=_empty)
    """One row for each panel and variant, about the claim that the winner at one fixed rate depends on the
    rate. `regret` is the score that the variant loses at the baseline's best rate. `at_baseline_rate` and
    `at_own_rate` are its differences from the baseline at the baseline's best rate and at its own. `reversal`
    says whether the variant loses at one of these rates and wins at the other."""
    ratios: pd.DataFrame = field(default_factory=_empty)
    """Grid, replicated tuning and sensitivity study: one row for each panel and curve (of a tuning: variant)
    that has an optimum. `rate` is its best learning rate. `ratio` is this rate over that of the curve
    `baseline`: LoRA's, and for LoRA that of full fine-tuning. With an optimum at an `edge` of a grid there is
    no ratio, and `ratio_low` or `ratio_high` is a bound. `published` is the ratio that `source` reports. The
    module `orchestrator.analyze.ratios` explains the intervals."""
    winners: pd.DataFrame = field(default_factory=_empty)
    """One row for each panel and learning rate: the variant with the best mean test score."""
    factors: pd.DataFrame = field(default_factory=_empty)
    """Sensitivity study: one row for each panel, variant and factor (hyperparameter). The module
    `orchestrator.analyze.effects` defines the losses `misset` (A), `retuned` (B), `off_by_2` and
    `off_by_half_decade` (D), and the gain `gain` (C)."""
    replacements: pd.DataFrame = field(default_factory=_empty)
    """Sensitivity study: one row for each panel, variant, tested factor and level: whether the learning rate
    could replace the factor (`outcome`), such as alpha. `difference` is the test score of the level, which is
    `times` the default, minus that of the default, each at its best rate. `rate_ratio` is the ratio of these
    rates. It is `hidden` if the grid of rates, not noise, leaves the level open. The module
    `orchestrator.analyze.replacement` explains the test."""
    claims: pd.DataFrame = field(default_factory=_empty)
    """Sensitivity study: one row for each panel and variant, with the test of the claim that the learning
    rate matters more than any other hyperparameter."""
    transfer: pd.DataFrame = field(default_factory=_empty)
    """Transfer of the rate: one row for each panel and curve, that is, variant and link. `slope` is that of
    log10 of the best rate over log10 of the factor, from the `inside` levels whose best rate is not at an
    edge, and `known_slope` is the published one. `worst` is the largest test score that a level loses at the
    best rate of another one. `p_carries` and `p_moves` are the p values of "the rate carries over" and of "it
    does not", see `analyze.transfer`."""
    transfer_levels: pd.DataFrame = field(default_factory=_empty)
    """Transfer of the rate: one row for each level of a curve, with its best rate. `position` is the value of
    the factor. `quality` has the mean at each of `rates` of what chose the rate: the validation score, or the
    inverse perplexity exp(-loss)."""
    carried: pd.DataFrame = field(default_factory=_empty)
    """Transfer of the rate: one row for each pair of levels of a curve. `lost` is the test score that the
    level `target` loses at the best rate of the level `source` against its own."""
    costs: pd.DataFrame = field(default_factory=_empty)
    """One row for each panel and curve, see `costs.cost_frame`."""
    verdicts: pd.DataFrame = field(default_factory=_empty)
    """One row for each verdict, the most important verdict first. The columns are the fields of
    `verdicts.Verdict`."""
    answers: pd.DataFrame = field(default_factory=_empty)
    """One row for each published number of the study's answer key: `what` it is, `published` and `measured`
    with its interval, the `distance` of the two and the `tolerance` (`study.expected` has the units), the
    `outcome` (reproduced, not reproduced, not tested), the `reason` of the last, and the `source`. `order`
    has the measured order of best rates as text."""
    warnings: Sequence[str] = ()
    """The limits of what the results show, one line each. Faults of the data come first."""
    best_lanes: pd.DataFrame = field(default_factory=_empty)
    """One row for each task, base model and variant: its best point over all curves, and the best run of that
    point, whose adapter is kept. Validation scores choose the point even with `--select published`."""

    harness: pd.DataFrame = field(default_factory=_empty)
    """One row for each lane that `evaluate` has scored, task of the harness, subtask and metric, with the
    columns `HARNESS_COLUMNS`. `settings` says what was changed in the task ("5 shots, 100 items"), and
    `metric` is the harness's "METRIC,FILTER". `untrained` is the score of the base model without a lane. The
    interval of the difference is over items, where the score is a mean over items. `is_whole` is false for
    the parts of a group."""

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study.name

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row for each configuration and step, with the columns of `curves.parquet`."""
        return make_curves(self.records).to_pandas()

    def of_panel(self, panel: str) -> Results:
        """Return the results of one panel: the rows of this panel in each frame that has a column `panel`."""
        frames = {each.name: getattr(self, each.name) for each in fields(self)}
        own = {n: f[f["panel"] == panel] for n, f in frames.items() if "panel" in getattr(f, "columns", ())}
        return replace(self, **own)

    @cached_property
    def missing(self) -> int:
        """The number of the study's configurations without a record."""
        return len(set(self.study.configurations) - {record.fingerprint for record in self.records})

    @property
    def states(self) -> dict[str, int]:
        """The number of runs with each label."""
        counts = self.runs["label"].value_counts()
        return {label: int(counts.get(label, 0)) for label in runs.LABELS}

    def __repr__(self) -> str:
        return f"<Results of {self.name}: {len(self.runs)} runs, {len(self.points)} points>"

    def to_json(self) -> dict[str, Any]:
        """Return all numbers of the report as JSON types, with None in place of NaN.

        The frames `runs` and `curves` are left out, because the Parquet files of the store have them.
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
    """Return the rows of a frame as JSON objects, without the internal columns `group` and `point`."""
    shown = frame.drop(columns=["group", "point"], errors="ignore").astype(object)
    return [{str(name): _plain(value) for name, value in row.items()} for row in shown.to_dict("records")]


def _plain(value: Any) -> Any:
    """Return a value of a frame as a JSON type, with None for NaN and infinity."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
