"""The section of the trained adapters: the best lane of each variant, and the command that exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.analyze.best_lanes import best_lanes, sort_lanes
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
    """Return the best lanes by task, in the order of `sort_lanes`."""
    records = {record.fingerprint: data.study.rename(record) for record in data.records}
    lanes = sort_lanes(best_lanes(data.study, data.records))
    lanes.sort(key=lambda item: item[0].task)
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
        for _, lane in lanes
    ]


ADAPTERS = Section("adapters", "Trained adapters", values=_values)
