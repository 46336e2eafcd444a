"""Examples made of the rows of a user's data, each with its position for error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.finetune.sources.data_files import abbreviate
from orchestrator.finetune.sources.user_data import SPLIT_NAMES, DataRow
from orchestrator.finetune.tasks.data_columns import ColumnMap, fill_template, parse_template
from orchestrator.finetune.tasks.examples import IGNORE_INDEX, SPLITS, Example, Image, Split
from orchestrator.util.errors import UsageError, suggest_nearest

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
CHECK_SIDE = 64
"""The approximate side, in pixels, at which JPEG images are decoded for the check, to save time."""


def make_examples(
    rows: Iterable[DataRow], columns: ColumnMap, is_number: bool
) -> Iterator[tuple[DataRow, Split | None, Example]]:
    """Yield each row with its split and its example. The split is None if the data name no splits.

    Args:
        rows: The rows.
        columns: The form of the rows, and the column of each role.
        is_number: Whether the label is a number to predict.

    Raises:
        UsageError: A cell is missing, empty or of a wrong kind, or a split has an unknown name. The message
            names file and row.
    """
    for row in rows:
        example = _MAKERS[columns.form](row, columns)
        if is_number:
            example = Example(example.prompt, _number(row, columns), example.pair, image=example.image)
        yield row, _split(row, columns), example


def _split(row: DataRow, columns: ColumnMap) -> Split | None:
    """Return the split of a row, given by the source or by the split column; None without either."""
    name = row.split
    if name is None:
        column = columns.columns.get("split")
        if column is None:
            return None
        name = _text(row, column)
    found = SPLIT_NAMES.get(name.strip().lower())
    for split in SPLITS:
        if split == found:
            return split
    raise UsageError(f"{row.where}: no split {name!r}. {suggest_nearest(name, SPLIT_NAMES)}")


def _cell(row: DataRow, column: str) -> Any:
    if column not in row.cells:
        present = ", ".join(map(str, row.cells)) or "nothing"
        raise UsageError(f"{row.where} has no {column!r}; it has {present}.")
    return row.cells[column]


def _text(row: DataRow, column: str) -> str:
    """Return a cell as text that is not empty; a number or a truth value counts as its text."""
    value = _cell(row, column)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        value = str(int(value)) if value == int(value) else repr(value)
    if not isinstance(value, str):
        raise UsageError(
            f"{row.where}: {column!r} must be text or a finite number, it is {abbreviate(value)}."
        )
    if not value.strip():
        raise UsageError(f"{row.where}: {column!r} is empty.")
    _check_unicode(value, f"{row.where}: {column!r}")
    return value


def _check_unicode(text: str, where: str) -> None:
    """Refuse a lone half of a surrogate pair, which JSON can contain but no file or tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = abbreviate(text[error.start])
        raise UsageError(f"{where} has half of a surrogate pair ({half}); take it out.") from None


def _number(row: DataRow, columns: ColumnMap) -> str:
    column = columns.columns["label"]
    text = _text(row, column)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == IGNORE_INDEX:
        rule = f"must be a finite number other than {IGNORE_INDEX} for this --metric"
        raise UsageError(f"{row.where}: {column!r} {rule}, it is {abbreviate(text)}.")
    return repr(value)


def _fill(row: DataRow, template: str) -> str:
    """Return the template with the row's cells, some of which may be empty."""
    names = dict.fromkeys(parse_template(template))
    cells = {name: "" if _cell(row, name) == "" else _text(row, name) for name in names}
    if not any(cells.values()):
        raise UsageError(f"{row.where}: {' and '.join(map(repr, names))} of the --template are empty.")
    return fill_template(template, cells)


def _prompt(row: DataRow, columns: ColumnMap) -> str:
    if columns.template:
        return _fill(row, columns.template)
    prompt = _text(row, columns.columns["prompt"])
    context = row.cells.get(columns.context) if columns.context else None
    if columns.context is None or context is None or (isinstance(context, str) and not context.strip()):
        return prompt
    return f"{prompt}\n\n{_text(row, columns.context)}"


def _make_generation(row: DataRow, columns: ColumnMap) -> Example:
    """Return prompt and completion, with a space between them if neither has white space there."""
    prompt, answer = _prompt(row, columns), _text(row, columns.columns["completion"])
    gap = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    return Example(prompt, gap + answer)


def _make_classification(row: DataRow, columns: ColumnMap) -> Example:
    text = _fill(row, columns.template) if columns.template else _text(row, columns.columns["text"])
    return Example(text, _text(row, columns.columns["label"]).strip())


def _make_pair(row: DataRow, columns: ColumnMap) -> Example:
    first, second, label = (_text(row, columns.columns[role]) for role in ("text1", "text2", "label"))
    return Example(first, label.strip(), second)


def _make_image(row: DataRow, columns: ColumnMap) -> Example:
    column = columns.columns["image"]
    image = Image(row.where, partial(_read_image, row, column))
    image.decode(CHECK_SIDE)
    return Example("", _text(row, columns.columns["label"]).strip(), image=image)


def _read_image(row: DataRow, column: str) -> bytes:
    cell = _cell(row, column)
    return _image_bytes(row, column, cell() if callable(cell) else cell)


def _image_bytes(row: DataRow, column: str, cell: Any) -> bytes:
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(path, str) or not path:
        raise UsageError(f"{row.where}: {column!r} must be an image or its path, it is {abbreviate(cell)}.")
    try:
        return (Path() if row.folder is None else row.folder).joinpath(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{row.where}: image {path!r} cannot be read ({error.strerror}).") from None


def _make_chat(row: DataRow, columns: ColumnMap) -> Example:
    """Return the messages before the last one as JSON, and the last one as the answer."""
    column = columns.columns["messages"]
    cell = _cell(row, column)
    if isinstance(cell, str):  # in CSV
        try:
            cell = json.loads(cell)
        except ValueError:
            raise UsageError(f"{row.where}: {column!r} is no JSON, it is {abbreviate(cell)}.") from None
    if not isinstance(cell, list) or len(cell) < 2:
        rule = "must be a list of two messages or more"
        raise UsageError(f"{row.where}: {column!r} {rule}, it is {abbreviate(cell)}.")
    messages = [_message(row, number, each) for number, each in enumerate(cell, 1)]
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise UsageError(f"{row.where}: the last message must be the assistant's, it is the {role}'s.")
    return Example(json.dumps(messages[:-1], ensure_ascii=False), messages[-1]["content"])


def _message(row: DataRow, number: int, message: Any) -> dict[str, str]:
    """Return role and content of a message; ShareGPT calls them `from` and `value`."""
    where = f"{row.where}: message {number}"
    if not isinstance(message, dict):
        raise UsageError(f"{where} must have a role and content, it is {abbreviate(message)}.")
    role = message.get("role", message.get("from"))
    role = SHAREGPT_ROLES.get(str(role), role)
    content = message.get("content", message.get("value"))
    if role not in CHAT_ROLES:
        raise UsageError(f"{where} has the role {abbreviate(role)}; must be one of {', '.join(CHAT_ROLES)}.")
    if not isinstance(content, str) or not content.strip():
        raise UsageError(f"{where}: its content must be text, it is {abbreviate(content)}.")
    if message.get("tool_calls"):
        raise UsageError(f"{where} has tool_calls, which are not supported; write them into its content.")
    _check_unicode(content, where)
    return {"role": role, "content": content}


_MAKERS: Mapping[str, Callable[[DataRow, ColumnMap], Example]] = {
    "generation": _make_generation,
    "classification": _make_classification,
    "pair": _make_pair,
    "image": _make_image,
    "chat": _make_chat,
}
