"""The options that all commands on a store share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.study.option_groups import default_output
from orchestrator.study.study_name import DEFAULT_STORE_NAME


@dataclass(frozen=True, kw_only=True)
class StoreLocation:
    """The options of a command that works on a store."""

    output: Path = field(default_factory=default_output)
    """Folder with a subfolder for each study. Default: ORCHESTRATOR_OUTPUT, else `results`."""
    store: Path | None = None
    """Folder of the records; by default OUTPUT/store."""

    @property
    def store_folder(self) -> Path:
        """The folder of the store: --store, else `store` in the output folder."""
        return self.store or self.output / DEFAULT_STORE_NAME
