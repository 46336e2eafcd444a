"""Wrong data and wrong options of `--data` are refused in one line that names file and row."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_folder
import pytest
from data_rows import CHATS, MAILS, SUMS, write
from in_process import SWEEP, Run, restored, run

from orchestrator.finetune.resolve.data_lengths import report_truncation
from orchestrator.finetune.resolve.data_preparation import report_data
from orchestrator.finetune.resolve.option_names import resolve_tasks
from orchestrator.finetune.resolve.templates import build_configuration_templates, resolve_base_model
from orchestrator.finetune.sources import user_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local import letters
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

__all__ = ["restored", "run"]


def replaced(rows: Any, number: int, **cells: Any) -> list[dict[str, Any]]:
    """Return rows in which one, counted from 1, has other cells; the value `...` removes a cell."""
    changed = {name: cell for name, cell in {**rows[number - 1], **cells}.items() if cell is not ...}
    return [*rows[: number - 1], changed, *rows[number:]]


def with_roles(number: int, *roles: str) -> list[dict[str, Any]]:
    """Return CHATS in which one row, counted from 1, has messages of these roles."""
    return replaced(CHATS, number, messages=[{"role": role, "content": "x"} for role in roles])


TOOL_CALL = {"role": "assistant", "content": "x", "tool_calls": [{"name": "add"}]}
WRONG_ROWS: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "a null text": (
        "m.jsonl",
        replaced(MAILS, 7, text=None),
        {},
        ["m.jsonl: row 7", "'text' must be text", "null"],
    ),
    "a list as text": ("m.jsonl", replaced(MAILS, 7, text=["x"]), {}, ["m.jsonl: row 7", "must be text"]),
    "an empty text": (
        "m.csv",
        replaced(MAILS, 7, text=" "),
        {},
        ["m.csv: row 7 (line 14)", "'text' is empty"],
    ),
    "a missing cell": ("m.jsonl", replaced(MAILS, 7, label=...), {}, ["row 7 has no 'label'; it has text"]),
    "an empty answer": (
        "m.json",
        replaced(SUMS, 9, completion=""),
        {},
        ["m.json: row 9", "'completion' is empty"],
    ),
    "a typed column": ("m.csv", MAILS, {"columns": ("text=txt",)}, ["text=txt", "Did you mean 'text'?"]),
    "a cell that the first row lacks": (
        *("m.jsonl", [{**row, **({"split": "test"} if i else {})} for i, row in enumerate(MAILS)], {}),
        ["m.jsonl: row 1 has no 'split'"],
    ),
    "half of a surrogate pair": ("m.jsonl", replaced(MAILS, 7, text="x\ud800"), {}, ["row 7", "surrogate"]),
    "a column of two roles": (
        *("m.csv", MAILS, {"columns": ("text=text", "label=text")}),
        ["--columns text=text label=text: a column has one role only"],
    ),
    "roles of two forms": (
        *("m.csv", MAILS, {"columns": ("prompt=text", "label=label")}),
        ["no form has all of the named roles"],
    ),
    "half of a form": (
        *("m.csv", MAILS, {"columns": ("completion=text",)}),
        ["m.csv has text, label with completion named", "add --columns prompt=COLUMN"],
    ),
    "a template with the answer": (
        *("m.csv", MAILS, {"template": "{text} {label}"}),
        ["--template {label}: that column is the answer"],
    ),
    "columns without a usual name": (
        *("m.jsonl", [{"a": "x", "b": "y"}] * 30, {}),
        ["m.jsonl has a, b; needs prompt and completion", "--columns text=a label=b"],
    ),
    "a column with a slip": (
        *("m.jsonl", [{"promt": "x", "completion": "y"}] * 30, {}),
        ["is 'promt' the prompt? Then add --columns prompt=promt"],
    ),
    "a column with a slip beside an unknown one": (
        *("m.jsonl", [{"txet": "x", "b": "y"}] * 30, {}),
        ["is 'txet' the text? Then add --columns text=txet label=COLUMN"],
    ),
    "a placeholder": (
        "m.csv",
        SUMS,
        {"template": "{promt}:"},
        ["--template {promt}", "Did you mean 'prompt'?"],
    ),
    "a template without an answer": ("m.csv", [{"a": "x"}] * 30, {"template": "{a}"}, ["completion"]),
    "a template and a prompt": (
        *("m.csv", SUMS, {"template": "{prompt}", "columns": ("prompt=prompt",)}),
        ["--columns prompt=prompt and --template both"],
    ),
    "a single class": (
        "m.csv",
        [{**row, "label": "ham"} for row in MAILS],
        {},
        ["all 60 rows have the label 'ham'"],
    ),
    "a class in one split": (
        *("m.csv", replaced(MAILS, 5, label="rare"), {}),
        ["m.csv: row 5", "'rare' occurs in", "only (1 of 60 rows)"],
    ),
    "numbers as classes": (
        *("m.csv", [{**row, "label": i / 7} for i, row in enumerate(MAILS)], {}),
        ["60 numbers such as 0", "--metric pearson"],
    ),
    "texts as classes": (
        "m.csv",
        [{**row, "label": row["text"]} for row in MAILS],
        {},
        ["60 different labels in 60"],
    ),
    "a label that is no number": (
        *(
            "m.csv",
            replaced([{**row, "label": 0.5} for row in MAILS], 3, label="high"),
            {"metric": "pearson"},
        ),
        ["m.csv: row 3", "must be a finite number", "'high'"],
    ),
    "too few rows": ("m.csv", MAILS[:19], {}, ["m.csv has 19 rows; must be 20 or more"]),
    "one input only": (
        "m.csv",
        [{"prompt": "x", "completion": "y"}] * 30,
        {},
        ["split is empty", "1 different inputs of 30 rows"],
    ),
    "an unknown split": (
        *("m.csv", [{**row, "split": "tset" if i == 3 else "train"} for i, row in enumerate(SUMS)], {}),
        ["m.csv: row 4", "no split 'tset'", "Did you mean 'test'?"],
    ),
    "no training split": (
        "m.csv",
        [{**row, "split": "test"} for row in SUMS],
        {},
        ["the train split is empty"],
    ),
    "a metric of labels": ("m.csv", SUMS, {"metric": "f1"}, ["--metric f1", "answers in text", "token_f1"]),
    "a metric of answers": (
        "m.csv",
        MAILS,
        {"metric": "numeric"},
        ["--metric numeric", "labels", "macro_f1"],
    ),
    "f1 of three classes": (
        *("m.csv", [{**row, "label": "abc"[i % 3]} for i, row in enumerate(MAILS)], {"metric": "f1"}),
        ["f1 needs two classes", "macro_f1"],
    ),
    "an answer without a number": (
        *("m.csv", [{**row, "completion": "many"} for row in SUMS], {"metric": "numeric"}),
        ["m.csv: row", "no number or formula", "token_f1"],
    ),
    "tokens of answers that are not generated": (
        "m.csv",
        SUMS,
        {"max_new_tokens": 9},
        ["generates no answers"],
    ),
    "a call of a tool": (
        *("m.jsonl", replaced(CHATS, 4, messages=[{**TOOL_CALL, "role": "user"}, TOOL_CALL]), {}),
        ["row 4: message 1 has tool_calls"],
    ),
    "a split that is given twice": (
        *("m.csv", [{**row, "split": ("train", "test")[i % 2]} for i, row in enumerate(SUMS)]),
        *({"test_data": "m.csv"}, ["--test-data m.csv: m.csv has a test split already"]),
    ),
    "a message without an answer": (
        "m.jsonl",
        with_roles(4, "user", "user"),
        {},
        ["row 4", "must be the assistant's"],
    ),
    "a single message": ("m.jsonl", with_roles(4, "assistant"), {}, ["row 4", "two messages or more"]),
    "an unknown role": (
        "m.jsonl",
        with_roles(4, "usr", "assistant"),
        {},
        ["row 4: message 1 has the role 'usr'"],
    ),
    "messages that are no JSON": ("m.csv", replaced(CHATS, 4, messages="hi"), {}, ["row 4", "is no JSON"]),
    "a missing image": (
        "m.csv",
        [{"image": "a.png", "label": "x"}] * 30,
        {},
        ["row 1", "'a.png' cannot be read"],
    ),
    "examples that there are not": ("m.csv", SUMS, {"train_size": 999}, ["train examples, 999 are needed"]),
}


def two_columns() -> bytes:
    """Return a Parquet file with two columns of one name."""
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array(["a", "b"])] * 2, names=["text", "text"]), file)
    return file.getvalue()


WRONG_FILES: dict[str, tuple[str, bytes | None, list[str]]] = {
    "a missing file": ("mial.jsonl", None, ["mial.jsonl: no such file", "Did you mean 'mail.jsonl'?"]),
    "a missing folder": ("nothing here", None, ["nothing here: no such file or folder"]),
    "an empty file": ("m.jsonl", b"", ["m.jsonl: has no rows"]),
    "a header alone": ("m.csv", b"text,label\n", ["m.csv: has no rows"]),
    "another format": ("m.txt", b"hello", ["m.txt: must end in .jsonl"]),
    "bytes": ("m.csv", b"text,label\n\xff\xfe,x\n", ["m.csv: is not UTF-8 at byte 11"]),
    "a byte far into a file": (
        *("m.csv", b"text,label\n" + b"a,b\n" * 5000 + b"\xff"),
        ["m.csv: is not UTF-8 at byte 20011; save it as UTF-8"],
    ),
    "lists in lists": ("m.jsonl", b"[" * 100_000, ["m.jsonl: does not parse (maximum recursion depth"]),
    "two Parquet columns of one name": ("m.parquet", two_columns(), ["m.parquet: has 2 columns 'text'"]),
    "half a line of JSON": (
        "m.jsonl",
        b'{"text": "x", "label": "y"}\n{"text": ',
        ["m.jsonl: row 2 is no JSON"],
    ),
    "a number in place of an object": ("m.jsonl", b"7\n", ["row 1 must be an object, it is 7"]),
    "a broken Parquet file": ("m.parquet", b"PAR1", ["m.parquet: "]),
    "a CSV line with too many cells": (
        "m.csv",
        b"text,label\na,b\na,b,c\n",
        ["row 2 (line 3) has more cells"],
    ),
    "an image that is none": (
        "images/cat/1.png",
        b"hello",
        ["images: cat/1.png is not an image", "unknown format"],
    ),
    "a folder of neither": ("images/x.txt", b"hello", ["images: has neither train.jsonl"]),
    "two files of a split": (
        "mails/train.csv",
        b"text,label\na,b\n",
        ["mails: train.csv and train.jsonl are both train files"],
    ),
    "half of the parts": (
        *("parts/train-00000-of-00002.csv", b"text,label\na,b\n"),
        ["parts: has 1 of 2 parts of its train data; add the others"],
    ),
    "a folder that is no split": (
        *("mails2/extra/1.png", b""),
        ["mails2: has a train subfolder", "move extra away"],
    ),
    "a folder without a train file": ("images/a.csv", b"a,b\n", ["has a.csv but no train file"]),
}

WRONG_OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a role": ({"columns": ("txt=body",)}, ["no role 'txt'", "Did you mean 'text'?"]),
    "half a column": ({"columns": ("text",)}, ["'text': must be ROLE=COLUMN"]),
    "a column named twice": ({"columns": ("text=a", "text=b")}, ["text is 'a' already"]),
    "a metric": ({"metric": "acuracy"}, ["'acuracy'", "Did you mean 'accuracy'?"]),
    "a brace": ({"template": "{question"}, ["'{question'", "{{"]),
    "a template of no column": ({"template": "Answer:"}, ["names no column"]),
    "tokens": ({"max_new_tokens": 0}, ["--max-new-tokens 0", "1 or more"]),
    "a task as well": ({"task": ("letters",)}, ["--data m.csv and --task both"]),
    "one file for two": ({"data": ("a.csv", "b.csv"), "test_data": "t.csv"}, ["there are 2 --data"]),
    "no data": ({"data": None, "metric": "f1"}, ["--metric is for data of your own; add --data FILE"]),
}


@pytest.fixture(autouse=True)
def _own_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run a test in its own folder, and forget the tasks that it registers."""
    monkeypatch.setattr(tasks, "_own_tasks", {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small language model with one token per byte."""
    return hub_folder.llama(tmp_path_factory.mktemp("model"))


def assert_refused(action: Callable[[], object], words: list[str]) -> None:
    """Assert that an action raises a UsageError of one short line that contains `words`."""
    with pytest.raises(UsageError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


def resolve(source: str, **options: Any) -> None:
    """Resolve the options of a study as far as its data, its sizes included."""
    typed = StudyOptions(data=(source,), model="letters-base", **options)
    for each in resolve_tasks(typed, (), ("lora",), Path("bases")):
        choice = each.task.choice()
        each.task._load_split("train", typed.train_size or choice.train_size)


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_cannot_be_learnt_from_are_refused(case: str) -> None:
    name, rows, options, words = WRONG_ROWS[case]
    write(Path(name), rows)
    assert_refused(lambda: resolve(name, **options), words)


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_cannot_be_read_are_refused(case: str) -> None:
    name, content, words = WRONG_FILES[case]
    Path("mail.jsonl").touch()
    Path("mails").mkdir()
    Path("mails/train.jsonl").touch()
    Path("mails2/train").mkdir(parents=True)
    if content is not None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    assert_refused(lambda: resolve(name.partition("/")[0]), words)


def test_a_file_in_a_folder_that_cannot_be_listed_is_reported_as_missing() -> None:
    Path().chmod(0o711)
    Path("locked").mkdir(mode=0)
    if is_root := os.geteuid() == 0:  # who can list it
        os.seteuid(65534)
    try:
        assert_refused(lambda: user_data.read_source("locked/m.csv"), ["--data locked/m.csv: no such file"])
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_do_not_fit_the_data_are_refused(case: str) -> None:
    options, words = WRONG_OPTIONS[case]
    assert_refused(lambda: StudyOptions(**{"data": ("m.csv",), **options}), words)


def test_a_hub_dataset_that_is_missing_or_has_no_train_split_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(Path.cwd()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path.cwd() / "cache")
    hub_folder.write(Path.cwd(), "org/mail", {"valid_x": SUMS})
    assert_refused(
        lambda: resolve("org/mial"), ["--data org/mial: no such file or folder here", "on the hub"]
    )
    monkeypatch.chdir("org")
    assert_refused(
        lambda: resolve("org/mail"), ["org/mail: no such file", "must have rows in one called train"]
    )


def test_two_data_of_one_name_are_refused() -> None:
    for folder in "ab":
        write(Path(folder, "m.csv"), SUMS)

    def resolve(*data: str) -> Any:
        return resolve_tasks(StudyOptions(data=data, model="letters-base"), (), (), Path())

    assert_refused(lambda: resolve("a/m.csv", "b/m.csv"), ["the same name"])
    assert len(resolve("a/m.csv", "./a/m.csv")) == 1


def test_a_row_that_is_too_long_is_named_unless_max_length_is_given(model: Path, tmp_path: Path) -> None:
    long = replaced(replaced(SUMS, 8, completion="x" * 5000), 9, completion="x" * 4000)
    write(
        Path("m.csv"),
        [{**row, "split": ("train", "dev", "test")[max(0, i - 57)]} for i, row in enumerate(long)],
    )

    def templates(**options: Any) -> Any:
        typed = StudyOptions(data=("m.csv",), model=str(model), **options)
        (chosen,) = resolve_tasks(typed, (), ("lora",), tmp_path)
        content = resolve_base_model(chosen.model, tmp_path, lambda text: None)
        return build_configuration_templates(typed, chosen, content, tmp_path)

    words = [
        "m.csv: row 8 (line 9) has 5009 tokens",
        "2 of 58 rows",
        "--max-length 2048",
        "end of its answer",
    ]
    assert_refused(templates, words)
    assert_refused(lambda: templates(max_length=64, train_size=59), ["58 train examples, 59 are needed"])
    (cut,) = templates(max_length=64)
    assert cut.batches.max_length == 64
    lines: list[str] = []
    report_data([cut], tmp_path, lines.append, may_truncate=True)
    assert lines[-2].endswith(" split=split; 58 training, 1 validation and 1 test rows; exact_match")
    report = lines.pop()
    assert report.startswith("m.csv: 2 of 58 rows have more than 64 tokens and lose the end of their answer")
    report_data([cut], tmp_path, lines.append, may_truncate=False)
    assert "rows have more than" not in "\n".join(lines), "a limit that was measured cuts nothing"


def test_a_row_with_words_that_the_tokenizer_lacks_is_shown() -> None:
    write(Path("m.csv"), MAILS)
    typed = StudyOptions(data=("m.csv",), model="letters-base")
    (chosen,) = resolve_tasks(typed, (), ("lora",), Path("bases"))
    words = ["'m.csv'", "example 0", "WordLevel error: Missing [UNK] token", "--model"]
    assert_refused(lambda: report_truncation(chosen.task, letters.tokenizer(), 64, print), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "m.jsonl"), ["m.jsonl: row 3", "'label' is empty"]),
        (("--data", "none.csv"), ["--data none.csv: no such file"]),
        (("--data", "m.jsonl", "--metric", "recall"), ["'recall' is not one"]),
    ],
)
def test_a_command_ends_with_one_line_and_code_2(
    run: Run, arguments: tuple[str, ...], words: list[str]
) -> None:
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replaced(MAILS, 3, label="")))
    run(SWEEP, *arguments, "--plan").assert_refused(*words)


def test_a_plan_says_how_many_rows_are_cut(run: Run, model: Path) -> None:
    write(Path("m.csv"), SUMS)
    done = run(SWEEP, "--data", "m.csv", "--model", str(model), "--max-length", "9", "--plan")
    assert done.returncode == 0, done.stderr
    cut = " ".join(done.stdout.partition("\nCut rows ")[2].split())
    assert re.match(r"m\.csv: \d+ of \d+ rows have more than 9 tokens and lose the end of their answer", cut)
