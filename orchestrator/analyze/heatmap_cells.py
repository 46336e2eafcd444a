"""The cells of a heat map of scores, variant x learning rate.

The static and the interactive picture share them.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.analyze.results import CurvePoint, Panel
from orchestrator.analyze.run_labels import RunLabel

_SYMBOLS: tuple[tuple[RunLabel, str], ...] = (("collapsed", "▽"), ("diverged", "\N{MULTIPLICATION SIGN}"))
_MAX_COLUMNS_WITH_TEXT = 12
"""Largest number of rates for which the texts of the cells fit a page that is 1,200 pixels wide."""


@dataclass(frozen=True)
class HeatMap:
    """The cells of one panel: a row for each curve, the best first, and a column for each rate, ascending."""

    labels: tuple[str, ...]
    rates: tuple[float, ...]
    scores: tuple[tuple[float | None, ...], ...]
    """The mean validation score; None without a score."""
    broken: tuple[tuple[str, ...], ...]
    """The numbers of collapsed (▽) and diverged (x) runs, for example "▽2 x1 /3": two of three collapsed, one
    diverged. Empty if no run did."""
    points: tuple[tuple[CurvePoint | None, ...], ...]
    """The points of the curves; None at a rate without a run."""
    best_columns: tuple[int | None, ...]
    """The column of each curve's best rate; None without a score, or if the best score is at both edges."""

    @property
    def has_text_on_page(self) -> bool:
        """Whether the cells of the interactive figure show their scores and broken runs."""
        return len(self.rates) <= _MAX_COLUMNS_WITH_TEXT


def heat_map(panel: Panel) -> HeatMap:
    """Return the cells of a panel."""
    rates = tuple(sorted({p.learning_rate for c in panel.curves for p in c.points}))
    points = tuple(tuple(c.point_at_rate(rate) for rate in rates) for c in panel.curves)
    return HeatMap(
        labels=tuple(c.label for c in panel.curves),
        rates=rates,
        scores=tuple(tuple(p.validation.mean if p else None for p in row) for row in points),
        broken=tuple(tuple(_broken_text(p) if p else "" for p in row) for row in points),
        points=points,
        best_columns=tuple(
            None if c.named_best_rate is None else rates.index(c.named_best_rate) for c in panel.curves
        ),
    )


def _broken_text(point: CurvePoint) -> str:
    counts = [f"{symbol}{n}" for label, symbol in _SYMBOLS if (n := point.count_runs(label))]
    return f"{' '.join(counts)} /{len(point.runs)}" if counts else ""
