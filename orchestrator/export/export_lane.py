"""Export of one lane of a study to a folder: choose, train again if needed, convert, describe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from orchestrator.export import retraining
from orchestrator.export.export_folder import ExportMark, Form, check_target, write_folder
from orchestrator.export.lane_choice import ChosenLane, LaneQuery, choose_lane
from orchestrator.export.model_card import CardFacts, InputForm, format_scores, render_card
from orchestrator.export.trained_lane import LaneCode, TrainedLane, load_trained_lane
from orchestrator.record.kept_adapters import EXPORT_PREFIX, StudyAdapters, file_name, find_adapter
from orchestrator.record.schema import Record
from orchestrator.record.scratch import scratch_folder
from orchestrator.record.store import Store
from orchestrator.study.own_commands import own_command
from orchestrator.util.errors import StudyError, UsageError
from variants.variant_names import FILE_SUFFIX, short_name

if TYPE_CHECKING:
    from variants.peft_format import TaskType

CARD_FILE = "README.md"
LANE_FILE = "lane.safetensors"
CONFIGURATION_FILE = "configuration.json"
FORM_OPTIONS: Mapping[Form, tuple[str, ...]] = {"peft": (), "merged": ("--merge",), "raw": ("--raw",)}
"""Form -> the option that asks for it."""


@dataclass(frozen=True)
class ExportRequest:
    """The lane to export, the form, the folder, and how the lane is trained again if that is needed."""

    query: LaneQuery
    form: Form | None = None
    """The form; None for the first one that the variant has: PEFT's format, a merged model, exact tensors."""
    folder: Path | None = None
    """The folder to write; None for `export/VARIANT-FINGERPRINT` in the study's folder."""
    device: retraining.Device = "auto"
    """The device on which the lane is trained again if its adapter was not kept."""
    retrain_on_cpu: bool = False
    """True to train it again on the CPU although it was trained on a GPU."""


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    form: Form
    record: Record
    """The record of the lane, as the store has it."""
    bytes: int
    """Size of all files of the folder."""
    notes: tuple[str, ...]
    """Lines for the user, such as whether vLLM serves the adapter."""


def export_lane(
    store: Store, output: Path, request: ExportRequest, notify: Callable[[str], None] = print
) -> Export:
    """Export a lane of a study.

    A lane whose adapter was not kept is trained again, in this process; its record stays as it is.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        request: The lane, the form and the folder.
        notify: Called with one line for each part of the work.

    Raises:
        UsageError: There is no such lane, the form or the folder is not possible, the base model is missing
            or has changed, the adapter's file is damaged, or another export is training the lane.
        StudyError: The lane did not finish when it was trained again.
        OSError: The folder cannot be written.
    """
    chosen = choose_lane(store, output, request.query)
    record = chosen.record
    variant = record.configuration.variant.name
    task = record.configuration.task.name
    notify(f"{record.fingerprint[:12]}: {variant} on {task}, {format_scores(record)}; {chosen.reason}")
    code = LaneCode.find(record.configuration, store)
    form = _choose_form(code, request.form, variant, notify)
    name = f"{short_name(variant)}-{record.fingerprint[:12]}"
    name += "" if form == "peft" else f"-{form}"
    folder = request.folder or chosen.folder / "export" / name
    check_target(folder, record.fingerprint)
    with ExitStack() as stack:
        file, retrained = find_adapter(store, record), None
        if file is None:  # else the store may be one that this user can only read
            scratch = stack.enter_context(scratch_folder(store))
            file, retrained = _train_again(store, scratch, chosen, request, notify)
        lane = load_trained_lane(store, record.configuration, code, file)
        notes = _write(store, chosen, lane, form, folder, retrained)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Export(folder, form, record, size, notes)


def _choose_form(code: LaneCode, form: Form | None, name: str, notify: Callable[[str], None]) -> Form:
    """Return the form of an export. If the user named no form and it is no adapter, report the reason.

    Raises:
        UsageError: The variant cannot be merged; the message names a form that is possible.
    """
    from variants.export_forms import export_forms

    forms = export_forms(code.variant)
    if form == "merged" and not forms.merged.possible:
        remedy = "without --merge its exact tensors are written"
        if forms.peft.possible:
            remedy = "without --merge it is an adapter of PEFT"
        raise UsageError(f"--merge: {name} cannot be merged: {forms.merged.note}; {remedy}.")
    if form is not None or forms.peft.possible:
        return form or "peft"
    what = "a plain model of transformers" if forms.merged.possible else "the exact tensors"
    notify(
        f"{name} has no adapter in PEFT's format: {forms.peft.note}; {what} will be written (for an adapter "
        "take another --variant)"
    )
    return "merged" if forms.merged.possible else "raw"


def _train_again(
    store: Store, scratch: Path, chosen: ChosenLane, request: ExportRequest, notify: Callable[[str], None]
) -> tuple[Path, Record | None]:
    """Train the chosen lane again.

    Returns:
        The file with the adapter, and None if the results are those of the lane's record. Then the store
        keeps the file. Else the record of the new run, and the file is in `scratch`.
    """
    record = chosen.record
    notify(f"its adapter was not kept; training it again: {retraining.describe_cost(record)}")
    with _checkpoint_folder(chosen) as checkpoints:
        result = retraining.retrain(
            store, scratch, checkpoints, record, request.device, request.retrain_on_cpu, notify
        )
    if result.is_equal:
        kept = StudyAdapters(store, chosen.folder).folder("all") / file_name(record)
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(result.file, kept)
        notify("the curve and the scores are those of the record")
        return kept, None
    old, new = (format_scores(each) for each in (record, result.record))
    devices = f"{record.provenance.device}, now {result.record.provenance.device}"
    notify(
        f"the results differ from the record's ({old}; now {new}), as on another device ({devices}), or with "
        "other versions, kernels or numbers of workers"
    )
    named = replace(result.record, configuration=record.configuration)
    return result.file, named


@contextmanager
def _checkpoint_folder(chosen: ChosenLane) -> Iterator[Path]:
    """Lock and yield a folder for the checkpoints of a lane that is trained again.

    The folder is removed after the block, but not after an interruption or an error of the disk, so that the
    same command can continue; later gc removes it. It is not in the store, because gc removes checkpoints of
    lanes that have a final record.

    Raises:
        UsageError: Another export is training the lane.
    """
    folder = chosen.folder / f"{EXPORT_PREFIX}{chosen.record.fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"lane {chosen.record.fingerprint[:12]}: another export is training it; wait until that one ends."
        ) from None
    try:
        yield folder / "checkpoints"
    except (UsageError, StudyError):
        shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
    finally:
        lock.release()


def _write(
    store: Store, chosen: ChosenLane, lane: TrainedLane, form: Form, folder: Path, retrained: Record | None
) -> tuple[str, ...]:
    """Write the folder of the export.

    Returns:
        Notes for the user.

    Raises:
        UsageError: The lane cannot be written in this form.
    """
    from orchestrator.finetune.models.catalogue import locate_pretrained
    from variants.errors import MergeError, UnsupportedError

    source, revision = locate_pretrained(lane.configuration.model, store.bases)
    note = _serving_note(lane) if form == "peft" and not lane.code.task.has_head else ""
    words = ["export", chosen.study.name, chosen.record.fingerprint[:12], *FORM_OPTIONS[form]]
    command = own_command(words, chosen.study.command, chosen.folder.parent, store.root)
    inputs = _input_form(lane)
    facts = CardFacts(form, source, revision, tuple(lane.adapters.heads), command, retrained, inputs, note)
    card = render_card(chosen, lane.code.task, facts)

    def write(target: Path) -> None:
        if form == "peft":
            _write_peft(lane, target, source, revision)
        elif form == "merged":
            _write_merged(lane, target)
        else:
            _write_raw(lane, target)
        _save_processor(lane, target)
        (target / CARD_FILE).write_text(card)

    mark = ExportMark(chosen.study.name, lane.configuration.fingerprint, form)
    try:
        write_folder(folder, mark, write)
    except (MergeError, UnsupportedError) as error:
        other = "--raw" if form == "merged" else "--merge"
        raise UsageError(f"{error}; try {other}.") from error
    return (note,) if note else ()


def _input_form(lane: TrainedLane) -> InputForm:
    """Return the form of the lane's inputs, for the example code on the model card."""
    from orchestrator.finetune.tasks.data_task import DataTask
    from orchestrator.finetune.tasks.glue_task import GlueTask

    task = lane.code.task
    form = task.spec.form if isinstance(task, DataTask) else ""
    if form == "chat":
        return "chat" if getattr(lane.base_model.processor, "chat_template", None) else "lines"
    columns = task.text_columns if isinstance(task, GlueTask) else ()
    return "pair" if form == "pair" or len(columns) == 2 else "text"


def _serving_note(lane: TrainedLane) -> str:
    """Return a sentence on whether vLLM serves the adapter, by the rule of its documentation."""
    from variants.export_forms import vllm_max_lora_rank, vllm_obstacle
    from variants.storage import peft_fields

    config = peft_fields(lane.adapters, lane.configuration.fingerprint)
    config |= {"modules_to_save": sorted(lane.adapters.heads) or None}
    if obstacle := vllm_obstacle(config):
        return f"vLLM does not serve this adapter ({obstacle}); --merge writes a model that it serves."
    options = f"--enable-lora --max-lora-rank {vllm_max_lora_rank(config['r'])}"
    return f"By its documentation, vLLM serves the adapter with `{options}`; this was not tried."


def _write_peft(lane: TrainedLane, folder: Path, base: str, revision: str | None) -> None:
    from variants.storage import save_peft

    task = lane.code.task
    task_type: TaskType | None = "SEQ_CLS" if task.has_head else "CAUSAL_LM"
    if task.inputs == "image":
        task_type = None  # PEFT has no type for images
    save_peft(lane.adapters, lane.configuration.fingerprint, folder, base, task_type, revision)


def _write_merged(lane: TrainedLane, folder: Path) -> None:
    from orchestrator.finetune.sources import base_store
    from variants.merging import merge_and_detach

    model: Any = lane.base_model.model
    merge_and_detach(lane.adapters, lane.configuration.fingerprint)
    if labels := lane.code.task.labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    with base_store.suppress_transformers_logging():
        model.save_pretrained(folder)


def _write_raw(lane: TrainedLane, folder: Path) -> None:
    from variants.storage import save_lane

    save_lane(lane.adapters, lane.configuration.fingerprint, folder / LANE_FILE)
    text = json.dumps(lane.configuration.to_json(), indent=1)
    (folder / CONFIGURATION_FILE).write_text(f"{text}\n")
    name = lane.configuration.variant.name
    if name.endswith(FILE_SUFFIX):  # the user's file may not exist where the export is loaded
        (folder / name).write_bytes(lane.code.variant.source_code)


def _save_processor(lane: TrainedLane, folder: Path) -> None:
    """Save the base model's tokenizer, or its image processor."""
    processor = lane.base_model.processor
    getattr(processor, "hf_processor", processor).save_pretrained(folder)
