"""The adapters of trained lanes that a store keeps.

    root/adapters/best/<fingerprint>.safetensors   of studies with `--save-adapters best`
    root/adapters/all/<fingerprint>.safetensors    of studies with `--save-adapters all`

A trainer writes the adapter of a finished lane before its record. A study removes from `best` the adapters of
lanes that it has trained and that are not its best, unless another study lists the lane. `gc` removes the
adapters of lanes that are the best of no study. Nothing removes a file of `all`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

from orchestrator.record.schema import Record
from orchestrator.record.scratch import is_locked
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, STUDY_FILE, StudyFile, read_studies
from orchestrator.util.errors import UsageError

Keep = Literal["best", "all"]
"""Which adapters a study keeps: those of its best lanes, or of all lanes that it trains."""
ChooseBest = Callable[[StudyFile, Sequence[Record]], Collection[str]]
"""Function of a study and its records that returns the fingerprints of the study's best lanes."""


def adapter_file_name(fingerprint: str) -> str:
    """Return the name of the file with the adapter of a lane."""
    return f"{fingerprint}.safetensors"


def list_adapters(store: Store, keep: Keep) -> list[Path]:
    """Return the adapters in the folder `best` or `all`, sorted; the stem of a name is the fingerprint."""
    return sorted((store.adapters / keep).glob("[!.]*.safetensors"))


def find_adapter(store: Store, fingerprint: str) -> Path | None:
    """Return the file with the adapter of a lane; None if it is not kept."""
    files = [store.adapters / keep / adapter_file_name(fingerprint) for keep in ("all", "best")]
    return next((file for file in files if file.is_file()), None)


def lanes_of_others(output: Path, study: StudyFile) -> set[str]:
    """Return the fingerprints of lanes whose adapters a study must not remove, because it shares them."""
    found = set(study.reused)
    for path in output.glob(f"*/{STUDY_FILE}"):
        try:
            other = StudyFile.read(path.parent)
        except UsageError:  # a damaged file of another study must not end this one
            continue
        if other is not None and other.name != study.name:
            found.update(other.configurations)
    return found


def find_needless_adapters(store: Store, output: Path, choose_best: ChooseBest) -> list[Path]:
    """Return the files of `best` that no study in an output folder needs.

    They belong to lanes that a study there has trained and that are the best of no study there. A study that
    is running or incomplete needs all of its lanes.
    """
    needed: set[str] = set()
    trained: set[str] = set()
    files = list_adapters(store, "best")
    present = {file.stem for file in files}
    for folder, study in read_studies(output).values():
        own = present.intersection(study.configurations)
        trained |= own.difference(study.reused)
        if not own:
            continue
        records = [record for record in map(store.get, study.configurations) if record is not None]
        is_complete = len(records) == len(study.configurations)
        if is_complete and not is_locked(folder / LOCK_FILE):
            own &= set(choose_best(study, records))
        needed |= own
    return [file for file in files if file.stem in trained - needed]
