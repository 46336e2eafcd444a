"""A task made of the data that the options of a study name: read, checked, split, with derived defaults."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from orchestrator.finetune.sources import user_data
from orchestrator.finetune.sources.user_data import DataRow, SourceRows
from orchestrator.finetune.tasks.base import INVERSE_PERPLEXITY, Output, Split, TaskDefaults
from orchestrator.finetune.tasks.data_columns import ColumnMap, Form, find_columns, parse_columns
from orchestrator.finetune.tasks.data_examples import make_examples
from orchestrator.finetune.tasks.data_splits import (
    ExampleFile,
    Examples,
    count_answers,
    count_contradictions,
    find_labels,
    make_splits,
)
from orchestrator.finetune.tasks.data_task import DataSpec, DataTask
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS, SPLITS, find_overlaps, hash_examples
from orchestrator.study.options import StudyOptions
from orchestrator.util.atomic_files import add_path_to_disk_errors
from orchestrator.util.errors import UsageError

ANSWER_METRICS: Mapping[str, Output] = {
    "exact_match": "teacher_forced",
    "loss": "teacher_forced",
    "numeric": "generation",
    "token_f1": "generation",
}
"""The metrics of texts as answers, and the form of the model's output that each needs."""
LABEL_METRICS: Mapping[str, Output] = {
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "matthews", "loss"), "classification"),
    "pearson": "regression",
}
"""The metrics of labels, and the kind of head that each needs."""

ANSWER_MODEL, LABEL_MODEL, IMAGE_MODEL = "smollm2-135m", "minilm-l6", "openai/clip-vit-base-patch16"
ANSWER_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LABEL_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
IMAGE_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_ROWS = 1_000
"""The number of rows in which the columns of a source are looked for."""
BATCH_SIZE = 16
EPOCHS, MIN_STEPS, MAX_STEPS = 3, 60, 1_000
EVALUATIONS = 4
SCORED_SIZES, GENERATED_SIZES = (1_000, 2_000), (200, 500)
"""The largest default sizes of the validation and the test split, without and with generated answers."""
MAX_EXACT_LENGTH = 60
"""The largest median length of answers, in characters, for which exact_match is the default metric: no model
repeats longer ones to the letter."""
MAX_DEFAULT_NEW_TOKENS = 512
MAX_ESTIMATED_LENGTH = 512
BYTES_PER_TOKEN = 3
"""A low estimate: a token of English has about 4 bytes, one of digits or of other languages has fewer."""


def load_task(path: str, options: StudyOptions, name: str | None = None) -> DataTask:
    """Read the data and return their task.

    Args:
        path: The path of the data, or their name on the hub.
        options: What the study says about its data.
        name: The name of the task. Default: that of the data.

    Raises:
        UsageError: The data cannot be read, a row or a split is not as required, or an option does not fit
            the data. The message is one line that names the file and, where there is one, the row.
    """
    data_name = user_data.display_name(path)
    name = name or data_name
    source = user_data.open_source(path)
    named = parse_columns(options.columns)
    if source.names and "split" in named:
        raise UsageError(f"--columns split={named['split']}: {name} has splits already; leave the role out.")
    file = ExampleFile()

    def find_own_columns(present: Sequence[str]) -> ColumnMap:
        found = find_columns(present, named, options.template, name)
        roles = {role: c for role, c in found.columns.items() if role != "split" or not source.names}
        return replace(found, columns=roles)

    origins = _split_origins(source)
    with add_path_to_disk_errors(Path(tempfile.gettempdir())):
        columns = _read_examples(source, find_own_columns, options, name, file)
        ignored = [*source.ignored, *_add_held_out_data(file, path, options, columns, name, origins)]
        is_given = bool(file.named_splits())
        file.finish()
    output = _find_output(columns, options, name)
    splits = make_splits(file, name)
    labels = find_labels(splits, name) if output == "classification" else ()
    if options.metric == "numeric":
        _check_numeric(splits)
    metric = options.metric or _default_metric(output, splits)
    spec = DataSpec(
        name=name,
        form=columns.form,
        output=output,
        metric=INVERSE_PERPLEXITY if metric == "loss" else metric,
        labels=labels,
        floor=_floor(metric, splits),
        max_new_tokens=_max_new_tokens(splits, options) if output == "generation" else 0,
        default_model=_default_model(columns.form),
        defaults=_defaults(splits, columns.form, output),
        revision=hash_examples(splits, labels),
        columns=columns.columns,
        template=columns.template,
    )
    is_hub = not os.path.exists(path)
    task = DataTask.from_spec(spec, splits, path if is_hub else os.path.abspath(path))
    task.ignored_sources = tuple(ignored)
    task.split_origins = {"train": data_name, **origins} if origins else {}
    # Splits made by hashing the inputs share none.
    overlaps = find_overlaps(task.default_examples(), name) if is_given else []
    task.warnings = list(overlaps)
    if labels and (count := count_contradictions(splits)):
        text = f"{count:,} rows have the same {task.inputs} as another row with a different label"
        task.warnings.append(text)
    return task


def _read_examples(
    source: SourceRows,
    find_own_columns: Callable[[Sequence[str]], ColumnMap],
    options: StudyOptions,
    name: str,
    file: ExampleFile,
) -> ColumnMap:
    """Append the examples of a source to a file, and return the columns by their role.

    The columns are found in the first rows. In JSON lines, later rows may have more columns. If one of these
    takes over a role, the source is read once more.
    """
    seen = dict.fromkeys(column for row in islice(source.read(), FIRST_ROWS) for column in row.cells)
    try:
        find_own_columns(list(seen))
    except UsageError:  # a later row may have what is missing, and the error shows all columns
        seen = dict.fromkeys(column for row in source.read() for column in row.cells)
    start = len(file)
    while True:
        columns = find_own_columns(list(seen))

        def read() -> Iterator[DataRow]:
            for row in source.read():
                if not row.cells.keys() <= seen.keys():
                    seen.update(dict.fromkeys(row.cells))
                yield row

        is_number = _find_output(columns, options, name) == "regression"
        for row, split, example in make_examples(read(), columns, is_number):
            file.append(row.where, split, example)
        if find_own_columns(list(seen)) == columns:
            return columns
        file.truncate(start)


def _split_origins(source: SourceRows) -> dict[Split, str]:
    """Return split -> name of its first file in --data and the number of others; empty without such files."""
    names = {split: own for split in SPLITS if (own := source.names.get(split))}
    return {split: own[0] + (f" and {len(own) - 1} more" if own[1:] else "") for split, own in names.items()}


def _add_held_out_data(
    file: ExampleFile,
    data: str,
    options: StudyOptions,
    columns: ColumnMap,
    name: str,
    origins: dict[Split, str],
) -> list[str]:
    """Append the examples of --validation-data and --test-data to their split.

    If a source has rows in that split, only these belong to it. Otherwise all of its rows do.

    Args:
        file: The examples of --data.
        data: The path of --data, or its name on the hub.
        options: What the study says about its data.
        columns: The columns of --data.
        name: The name of the task.
        origins: The result of `_split_origins`, to which the splits are added.

    Returns:
        The files and splits that were not read, see `SourceRows`.

    Raises:
        UsageError: A source cannot be read, a row is not as required, a split is given twice, or two splits
            would have the same rows.
    """

    def find_own_columns(present: Sequence[str]) -> ColumnMap:
        roles = {"split": "split", **columns.columns}
        return replace(columns, columns={r: c for r, c in roles.items() if r != "split" or c in present})

    given: list[tuple[str, Split, str | None]] = [
        ("--validation-data", "validation", options.validation_data),
        ("--test-data", "test", options.test_data),
    ]
    present, data_name = file.named_splits(), user_data.display_name(data)
    if any(path for _, _, path in given):  # with them the plan says where each split comes from
        origins.update({each: data_name for each in present if each not in origins})
    ignored: list[str] = []
    used = {os.path.realpath(data): f"--data {data}"}
    for option, split, path in given:
        if path is None:
            continue
        if split in present:
            problem = f"{data_name} has a {split} split already"
            raise UsageError(f"{option} {path}: {problem}; leave the option out.")
        source, start = user_data.open_source(path, option), len(file)
        _read_examples(source, find_own_columns, options, name, file)
        has_split = split in file.named_splits(start)
        file.keep_split(start, split)
        place = os.path.realpath(path)
        if not has_split and place in used:
            raise UsageError(f"{option} {path}: has the rows of {used[place]}; give a file of its own.")
        used[place], origins[split] = f"{option} {path}", user_data.display_name(path)
        ignored += source.ignored
    return ignored


def _find_output(columns: ColumnMap, options: StudyOptions, name: str) -> Output:
    has_label = "label" in columns.columns
    metrics = LABEL_METRICS if has_label else ANSWER_METRICS
    metric = options.metric or ("accuracy" if has_label else "exact_match")
    shown = ", ".join(f"{role}={column}" for role, column in columns.columns.items())
    if metric not in metrics:
        problem = f"{name} ({shown}) has {'labels' if has_label else 'answers in text'}"
        raise UsageError(f"--metric {metric}: {problem}; choose from {', '.join(metrics)}.")
    if options.max_new_tokens is not None and metrics[metric] != "generation":
        option = f"--max-new-tokens {options.max_new_tokens}"
        raise UsageError(f"{option}: --metric {metric} generates no answers; leave it out.")
    return metrics[metric]


def _default_metric(output: Output, splits: Mapping[Split, Examples]) -> str:
    """Return accuracy for classes, exact_match for short answers, and loss for answers of free text."""
    from pyarrow import compute

    if output == "classification":
        return "accuracy"
    lengths = [compute.utf8_length(own.texts("answer")).to_numpy() for own in splits.values()]
    return "exact_match" if np.median(np.concatenate(lengths)) <= MAX_EXACT_LENGTH else "loss"


def _check_numeric(splits: Mapping[Split, Examples]) -> None:
    from orchestrator.finetune.grading import math

    for split in HELD_OUT_SPLITS:
        for number, example in enumerate(splits[split]):
            if not math.extract_answer(example.answer):
                rule = "its answer has no number or formula for --metric numeric"
                raise UsageError(f"{splits[split].where(number)}: {rule}; take exact_match or token_f1.")


def _floor(metric: str, splits: Mapping[Split, Examples]) -> float:
    """Return the accuracy on the test split if every answer is the most frequent class of the training split.

    Other metrics have the floor 0.
    """
    if metric != "accuracy":
        return 0.0
    frequent = count_answers(splits["train"]).most_common()
    label = min(label for label, count in frequent if count == frequent[0][1])
    return round(count_answers(splits["test"])[label] / len(splits["test"]), 4)


def _max_new_tokens(splits: Mapping[Split, Examples], options: StudyOptions) -> int:
    """Return --max-new-tokens. By default it is the bytes of the longest answer, divided by two."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    longest = max(int(own.num_bytes("answer").max()) for own in splits.values())
    return min(_round_up(longest // 2 + 8), MAX_DEFAULT_NEW_TOKENS)


def _default_model(form: Form) -> str:
    if form == "image":
        return IMAGE_MODEL
    return ANSWER_MODEL if form in ("chat", "generation") else LABEL_MODEL


def _defaults(splits: Mapping[Split, Examples], form: Form, output: Output) -> TaskDefaults:
    """Return the settings that suit the number and the length of the rows."""
    train_size = len(splits["train"])
    batch_size = min(BATCH_SIZE, train_size)
    steps = min(max(MIN_STEPS, EPOCHS * train_size // batch_size), MAX_STEPS)
    max_validation, max_test = GENERATED_SIZES if output == "generation" else SCORED_SIZES
    rates = {"chat": ANSWER_RATES, "generation": ANSWER_RATES, "image": IMAGE_RATES}.get(form, LABEL_RATES)
    return TaskDefaults(
        train_size=train_size,
        validation_size=min(len(splits["validation"]), max_validation),
        test_size=min(len(splits["test"]), max_test),
        steps=steps,
        batch_size=batch_size,
        max_length=0 if form == "image" else _estimate_length(splits["train"]),
        evaluations=EVALUATIONS,
        learning_rates=rates,
    )


def _estimate_length(train: Examples) -> int:
    """Estimate the tokens of the longest row, for a plan before the model's tokenizer is there."""
    longest = int(sum(map(train.num_bytes, ("prompt", "pair", "answer")), np.zeros(1, int)).max())
    return min(_round_up(longest // BYTES_PER_TOKEN + 8), MAX_ESTIMATED_LENGTH)


def _round_up(number: int) -> int:
    return -(-number // 8) * 8
