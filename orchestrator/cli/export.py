"""The command `lora-orchestrator export`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestrator.cli.store_location import StoreLocation
from orchestrator.util.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Export(StoreLocation):
    """Export a trained lane of a study: an adapter in PEFT's format, or a merged plain model.

    A variant without such an adapter, such as `full`, is merged, or written as exact tensors.
    Without FINGERPRINT, the lane with the best validation score is exported, which `--save-adapters best`
    keeps. A lane whose adapter was not kept is refused with the command that trains it with its adapter.
    """

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """The study's name."""
    fingerprint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[FINGERPRINT]")] = ""
    """First digits of the fingerprint of a lane, in place of the best one."""
    variant: str | None = None
    """The best lane of this variant."""
    task: str | None = None
    """The best lane on this task; needed in a study of several tasks."""
    merge: bool = False
    """Write a plain model of transformers, with the adapter in its weights, in place of the adapter."""
    raw: bool = False
    """Write the exact tensors of the lane, which every variant has, for `variants.storage.load_lane`."""
    to: Path | None = None
    """The new folder. Default: VARIANT-FINGERPRINT in the folder `export` of the study's folder."""

    def run(self) -> int:
        """Export the lane and return the exit code."""
        from rich.filesize import decimal

        from orchestrator.export.export import export_lane
        from orchestrator.export.lane_choice import LaneQuery
        from orchestrator.record.store import Store

        if self.merge and self.raw:
            raise UsageError("--merge with --raw: an export has one form; leave one of them out.")
        form: Literal["merged", "raw"] | None = "merged" if self.merge else "raw" if self.raw else None
        query = LaneQuery(self.study, self.fingerprint, self.variant, self.task)
        done = export_lane(Store(self.store_folder, create=False), self.output, query, form, self.to)
        print(f"{shlex.quote(str(done.folder))}: {decimal(done.bytes)}; README.md says how to load it")
        return 0
