"""Export of one lane of a study: choose the lane, load its adapter, write it in a form, describe it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.export.lane_choice import ChosenLane, LaneQuery, choose_lane
from orchestrator.export.model_card import CardFacts, Form, InputForm, format_scores, render_card
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.names import store_command
from orchestrator.util import atomic_files
from orchestrator.util.atomic_files import DamagedFileError
from orchestrator.util.errors import UsageError
from variants.variant_settings import FILE_SUFFIX, short_name

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from variants.adapters import Adapters
    from variants.api import Variant
    from variants.peft_format import TaskType

CARD_FILE = "README.md"
LANE_FILE = "lane.safetensors"
CONFIGURATION_FILE = "configuration.json"
MARK_FILE = "export.json"
"""Name of the file that marks a folder as an export, with its study, fingerprint and form."""
_FORM_OPTIONS: dict[Form, tuple[str, ...]] = {"peft": (), "merged": ("--merge",), "raw": ("--raw",)}


@dataclass(frozen=True)
class Export:
    """An export in its folder."""

    folder: Path
    form: Form
    record: Record
    """The record of the lane."""

    @property
    def bytes(self) -> int:
        """Size of all files of the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class _Lane:
    """A lane in memory, with its adapter attached to the base model."""

    configuration: Configuration
    task: Task
    variant: Variant
    base_model: BaseModel
    adapters: Adapters
    lora_error: str = ""
    """What a LoRA in place of the lane's own adapter leaves out, as a sentence."""


def export_lane(
    store: Store,
    output: Path,
    query: LaneQuery,
    form: Form | None = None,
    folder: Path | None = None,
    notify: Callable[[str], None] = print,
    lora_rank: int | None = None,
) -> Export:
    """Export a lane of a study. An export that exists is not written again.

    Args:
        store: The store, which is only read.
        output: The output folder with the studies' folders.
        query: The study, and the lane in it.
        form: The form; None for the first one that the variant supports: an adapter in PEFT's format, a
            merged model, the exact tensors.
        folder: The folder to write; None for `export/VARIANT-FINGERPRINT` in the study's folder.
        notify: Called with one line of text about the lane, and one if no adapter can be written, or if a
            LoRA takes its place.
        lora_rank: The rank of a plain LoRA to write in place of the lane's own adapter; None for its own.

    Raises:
        UsageError: There is no such lane, its adapter was not kept or is damaged, the form is not possible,
            the folder cannot be used, or the base model is missing or has changed.
        OSError: The folder cannot be written.
    """
    from orchestrator.finetune.models.loading import load_base_model  # torch

    chosen = choose_lane(store, output, query)
    record = chosen.record
    choice, task_name = record.configuration.variant, record.configuration.task.name
    notify(
        f"{record.fingerprint[:12]}: {choice.name} on {task_name}, {format_scores(record)}; {chosen.reason}"
    )
    task, variant = find_code(record.configuration, store)
    form = "peft" if lora_rank else _choose_form(variant, form, choice.name, notify)
    written = f"lora{lora_rank}" if lora_rank else form
    name = f"{short_name(choice.name)}-{record.fingerprint[:12]}" + (
        "" if written == "peft" else f"-{written}"
    )
    folder = folder or chosen.study.folder / "export" / name
    mark = {"study": chosen.study.name, "fingerprint": record.fingerprint, "form": written}
    if not _is_present(folder, mark):
        (adapter,) = find_adapters(store, chosen.study, [record.fingerprint])
        base_model = load_base_model(record.configuration.model, store.bases, "cpu", task)
        adapters = attach_lane(base_model, record.configuration, variant, adapter)
        lane = _Lane(record.configuration, task, variant, base_model, adapters)
        if lora_rank:
            lane = _as_lora(lane, lora_rank)
            notify(lane.lora_error)
        _write(store, chosen, lane, form, folder, mark)
    return Export(folder, form, record)


def find_code(configuration: Configuration, store: Store) -> tuple[Task, Variant]:
    """Return the task and the variant of a configuration. The store has those of a user's files.

    Raises:
        UsageError: One is missing, or its version is not that of the configuration.
    """
    from orchestrator.finetune.engine.engine import check_versions
    from orchestrator.finetune.tasks import catalogue as tasks

    task = tasks.find(configuration.task, store.data)
    try:
        variant = tasks.find_variant(configuration.variant, store.data)
        check_versions(configuration, variant, task)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"The lane of {configuration.variant.name!r} cannot be used here: {error}"
        ) from error
    return task, variant


def _choose_form(variant: Variant, form: Form | None, name: str, notify: Callable[[str], None]) -> Form:
    """Return the form of an export. If no form was requested and no adapter is possible, report the reason.

    Raises:
        UsageError: The variant cannot be merged; the message names a form that is possible.
    """
    from variants.peft_format import peft_method  # torch

    has_peft, obstacle = peft_method(variant) is not None, variant.merge_obstacle
    if form == "merged" and obstacle:
        written = "its adapter is written" if has_peft else "its exact tensors are written"
        raise UsageError(f"--merge: {name} cannot be merged: {obstacle}; without --merge {written}.")
    if form is not None or has_peft:
        return form or "peft"
    form, what = ("raw", "the exact tensors") if obstacle else ("merged", "a plain model")
    notify(f"{name} has no adapter in PEFT's format: {variant.peft_obstacle}; {what} will be written")
    return form


def _is_present(folder: Path, mark: dict[str, str]) -> bool:
    """Return whether a folder has this export.

    Raises:
        UsageError: The folder has something else, or cannot be created.
    """
    try:
        if folder.exists() or folder.is_symlink():
            file, remedy = folder / MARK_FILE, "remove the folder"
            if atomic_files.read_json(file, dict[str, Any], "an export", remedy, has_checksum=False) != mark:
                raise UsageError(f"--to {folder}: it exists, and is not this export; name a new folder.")
            return True
        parent = next(each for each in folder.absolute().parents if each.exists())
    except OSError as error:  # for example, the name is too long
        raise UsageError(
            f"--to {folder}: it cannot be looked up ({error.strerror}); name a new folder."
        ) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--to {folder}: {parent} is no writable folder; name another one.")
    return False


def find_adapters(store: Store, study: StudyFile, fingerprints: Sequence[str]) -> list[Path]:
    """Return the files with the adapters of lanes of a study.

    Raises:
        UsageError: An adapter was not kept. The message has the command that trains those lanes again.
    """
    files = {fingerprint: store.find_adapter(fingerprint) for fingerprint in fingerprints}
    if missing := [fingerprint for fingerprint, file in files.items() if file is None]:
        command = study.train_again(missing, "--save-adapters", "all", store=store.root)
        raise UsageError(
            f"lane {', '.join(each[:12] for each in missing)}: its adapter was not kept (--save-adapters all "
            f"keeps every one); to train it again, with its adapter: {command}"
        )
    return [file for file in files.values() if file is not None]


def attach_lane(
    base_model: BaseModel, configuration: Configuration, variant: Variant, adapter: Path
) -> Adapters:
    """Attach a lane, whose adapter is in the file `adapter`, to its base model.

    Raises:
        UsageError: The file is damaged or was removed meanwhile.
    """
    from orchestrator.finetune.engine.lane import variant_settings
    from orchestrator.finetune.engine.tensor_files import restore_adapter
    from variants.adapters import attach

    settings, targets = variant_settings(configuration), configuration.variant.targets
    adapters = attach(base_model.model, variant, settings, targets, base_model.head_names)
    try:
        restore_adapter(adapter, adapters, configuration.fingerprint, settings, configuration.seed)
    except DamagedFileError as error:
        raise UsageError(f"{error}; remove the file, and run the same command again") from error
    except FileNotFoundError as error:  # a study has removed it while the base model was loaded
        raise UsageError(f"{adapter} was removed by a running study; run the same command again") from error
    return adapters


def _as_lora(lane: _Lane, rank: int) -> _Lane:
    """Replace the adapter of a lane by the LoRA of a rank that is nearest to it.

    Raises:
        UsageError: The lane cannot be written as a LoRA, or not with this rank.
    """
    from variants.errors import MergeError, UnsupportedError
    from variants.lora_conversion import convert_to_lora

    try:
        adapters, norms = convert_to_lora(lane.adapters, lane.configuration.fingerprint, rank)
    except (MergeError, UnsupportedError) as error:
        raise UsageError(f"--as-lora {rank}: {error}; without --as-lora another form is written.") from error
    errors = {name: lost / (norm or 1.0) for name, (lost, norm) in norms.items()}
    lost, norm = (math.hypot(*each) for each in zip(*norms.values(), strict=True))
    worst = max(errors, key=errors.__getitem__)
    text = (
        f"This LoRA of rank {rank} leaves out {lost / (norm or 1.0):.2g} of the lane's update (relative "
        f"Frobenius norm), and at most {errors[worst]:.2g} of a layer's ({worst}). "
        "The scores are those of the lane before the conversion."
    )
    return replace(lane, variant=adapters.variant, adapters=adapters, lora_error=text)


def _write(
    store: Store, chosen: ChosenLane, lane: _Lane, form: Form, folder: Path, mark: dict[str, str]
) -> None:
    """Write an export to a temporary folder beside `folder`, and rename it when it is complete.

    Raises:
        UsageError: The lane cannot be written in this form, or another process has created the folder.
        OSError: The folder cannot be written.
    """
    from variants.errors import MergeError, UnsupportedError

    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    draft = atomic_files.temporary_path(folder.absolute())
    try:
        with atomic_files.add_path_to_disk_errors(folder.absolute()):
            draft.mkdir()
            _write_files(store, chosen, lane, form, draft)
            (draft / MARK_FILE).write_text(json.dumps(mark, indent=1) + "\n")
            mode = (draft / MARK_FILE).stat().st_mode
            for path in (path for path in draft.rglob("*") if path.is_file()):
                path.chmod(mode)  # safetensors makes files that other users cannot read
                atomic_files.sync_file(path)
        draft.rename(folder)
    except (MergeError, UnsupportedError) as error:
        raise UsageError(f"{error}; try {'--raw' if form == 'merged' else '--merge'}.") from error
    except OSError as error:
        if folder.exists():
            raise UsageError(f"--to {folder}: another process has made it; name a new folder.") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_files(store: Store, chosen: ChosenLane, lane: _Lane, form: Form, folder: Path) -> None:
    """Write the lane's tensors in their form, the tokenizer or image processor, and the model card."""
    from orchestrator.finetune.models.catalogue import locate_pretrained

    base, revision = locate_pretrained(lane.configuration.model, store.bases)
    heads = tuple(lane.adapters.heads)  # merging detaches them
    adapter: dict[str, Any] = {}
    if form == "peft":
        adapter = _write_peft(lane, folder, base, revision)
    elif form == "merged":
        _write_merged(lane, folder)
    else:
        _write_raw(lane, folder)
    processor = lane.base_model.processor
    getattr(processor, "hf_processor", processor).save_pretrained(folder)
    options = ("--as-lora", str(adapter["r"])) if lane.lora_error else _FORM_OPTIONS[form]
    words = ["export", chosen.study.name, chosen.record.fingerprint[:12], *options]
    command = store_command(*words, output=chosen.study.folder.parent, store=store.root)
    facts = CardFacts(form, base, revision, heads, command, _input_form(lane), adapter, lane.lora_error)
    (folder / CARD_FILE).write_text(render_card(chosen, lane.task, facts))


def _input_form(lane: _Lane) -> InputForm:
    """Return the form of the lane's inputs, for the example code on the model card."""
    from orchestrator.finetune.tasks.data_task import DataTask
    from orchestrator.finetune.tasks.hub_tasks import TextLabelTask

    task = lane.task
    form = task.spec.form if isinstance(task, DataTask) else ""
    if form == "chat":
        return "chat" if getattr(lane.base_model.processor, "chat_template", None) else "lines"
    columns = task.text_columns if isinstance(task, TextLabelTask) else ()
    return "pair" if form == "pair" or len(columns) == 2 else "text"


def _write_peft(lane: _Lane, folder: Path, base: str, revision: str | None) -> dict[str, Any]:
    """Write the adapter, and return the content of its adapter_config.json."""
    from variants.storage import CONFIG_FILE, save_peft

    task_type: TaskType | None = "SEQ_CLS" if lane.task.has_head else "CAUSAL_LM"
    if lane.task.inputs == "image":
        task_type = None  # PEFT has no type for images
    save_peft(lane.adapters, lane.configuration.fingerprint, folder, base, task_type, revision)
    return json.loads((folder / CONFIG_FILE).read_text())


def _write_merged(lane: _Lane, folder: Path) -> None:
    from orchestrator.finetune.sources import base_store
    from variants.merging import merge_and_detach

    model: Any = lane.base_model.model
    merge_and_detach(lane.adapters, lane.configuration.fingerprint)
    if labels := lane.task.labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    with base_store.suppress_transformers_logging():
        model.save_pretrained(folder)


def _write_raw(lane: _Lane, folder: Path) -> None:
    from variants.storage import save_lane

    save_lane(lane.adapters, lane.configuration.fingerprint, folder / LANE_FILE)
    text = json.dumps(lane.configuration.to_json(), indent=1)
    (folder / CONFIGURATION_FILE).write_text(f"{text}\n")
    name = lane.configuration.variant.name
    if name.endswith(FILE_SUFFIX):  # the user's file may not exist where the export is loaded
        (folder / name).write_bytes(lane.variant.source_code)
