"""The section of the runs without a useful result, with the reason of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.analyze.report_parts import ReportData, Section
from orchestrator.analyze.run_labels import RunLabel, label_runs
from orchestrator.record.schema import Record

_MEANINGS: Mapping[RunLabel, str] = {
    "failed": "missing: the same command tries them again",
    "stopped": "stopped early, so part of no mean",
    "diverged": "counted as the floor",
    "collapsed": "finished, but no better than the untrained model; counted as their score",
}
"""Label of a run -> how the analysis counts such runs."""


def _values(data: ReportData) -> Mapping[str, Any]:
    return {"runs": _runs_without_result(data), "meanings": _MEANINGS}


def _runs_without_result(data: ReportData) -> dict[RunLabel, list[tuple[str, str, Record]]]:
    """Return the runs without a useful result, sorted by panel, curve, learning rate and seed.

    Returns:
        Label of the run -> its curve's label, its panel's title, and its record. Labels without a run are
        left out.
    """
    where = {
        run.fingerprint: (curve.label, panel.title)
        for panel in data.summary.panels
        for curve in panel.curves
        for point in curve.points
        for run in point.runs
    }
    labels = label_runs(data.records)
    runs: dict[RunLabel, list[tuple[str, str, Record]]] = {label: [] for label in _MEANINGS}
    for r in sorted(
        data.records, key=lambda r: (r.configuration.optimizer.learning_rate, r.configuration.seed)
    ):
        if (label := labels[r.fingerprint]) in runs:
            c = r.configuration
            curve, title = where.get(r.fingerprint, (c.variant.name, f"{c.task.name} on {c.model.name}"))
            runs[label].append((curve, title, r))
    return {label: sorted(own, key=lambda run: (run[1], run[0])) for label, own in runs.items() if own}


RUNS = Section("runs", "Runs without a useful result", values=_values)
