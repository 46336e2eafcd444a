"""The section of the trained adapters: the best lane of each variant, and the command that exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.analyze.best_lanes import best_lanes, sort_lanes
from orchestrator.analyze.report_parts import ReportData, Section
from orchestrator.record.schema import Record
from orchestrator.study.names import store_command


def _values(data: ReportData) -> Mapping[str, Any]:
    return {"adapters": _adapters(data)}


def _adapters(data: ReportData) -> Sequence[tuple[Record, str]]:
    """Return by task, in the order of `sort_lanes`, each best lane and the command that exports it."""
    records = {record.fingerprint: data.study.rename(record) for record in data.records}
    lanes = sort_lanes(best_lanes(data.study, data.records))
    lanes.sort(key=lambda item: item[0].task)
    return [
        (
            records[lane.fingerprint],
            store_command(
                "export", data.study.name, lane.fingerprint[:12], output=data.output, store=data.store
            ),
        )
        for _, lane in lanes
    ]


ADAPTERS = Section("adapters", "Trained adapters", values=_values)
