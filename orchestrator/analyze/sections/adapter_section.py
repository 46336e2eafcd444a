"""The section of the trained adapters: the best lane of each variant, and the command that exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.analyze.best_lanes import best_lanes
from orchestrator.analyze.report_parts import ReportData, Section
from orchestrator.record.schema import Record
from orchestrator.study.own_commands import own_command


@dataclass(frozen=True)
class AdapterRow:
    """The best lane of a variant on a task and a base model."""

    record: Record
    command: str
    """The command that exports the lane."""


def _values(data: ReportData) -> Mapping[str, Any]:
    return {"adapters": adapter_rows(data)}


def adapter_rows(data: ReportData) -> Sequence[AdapterRow]:
    """Return the best lanes, sorted by task, base model and descending validation score."""
    records = {record.fingerprint: data.study.rename(record) for record in data.records}
    lanes = best_lanes(data.study, data.records)
    ordered = sorted(
        lanes.items(), key=lambda item: (item[0].task, item[0].model, -(item[1].validation or 0))
    )
    return [
        AdapterRow(
            records[lane.fingerprint],
            own_command(
                ["export", data.study.name, lane.fingerprint[:12]],
                data.study.command,
                data.output,
                data.store,
            ),
        )
        for _, lane in ordered
    ]


ADAPTERS = Section("adapters", "Trained adapters", values=_values)
