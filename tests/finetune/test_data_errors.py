"""Wrong data and wrong options of `--data` are refused in one line that names file and row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_folder
import pytest
from data_rows import CHATS, MAILS, SUMS, write
from in_process import SWEEP, Run
from resolved import resolve_one_task

from orchestrator.finetune.resolve.data import report_data
from orchestrator.finetune.resolve.option_names import resolve_tasks
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError


def replaced(rows: Any, number: int, **cells: Any) -> list[dict[str, Any]]:
    """Return rows in which one, counted from 1, has other cells; the value `...` removes a cell."""
    changed = {name: cell for name, cell in {**rows[number - 1], **cells}.items() if cell is not ...}
    return [*rows[: number - 1], changed, *rows[number:]]


def with_roles(number: int, *roles: str) -> list[dict[str, Any]]:
    """Return CHATS in which one row, counted from 1, has messages of these roles."""
    return replaced(CHATS, number, messages=[{"role": role, "content": "x"} for role in roles])


TOOL_CALL = {"role": "assistant", "content": "x", "tool_calls": [{"name": "add"}]}
WRONG_ROWS: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "a null text": ("m.jsonl", replaced(MAILS, 7, text=None), {}, ["row 7", "'text'", "null"]),
    "an empty answer": ("m.json", replaced(SUMS, 9, completion=""), {}, ["row 9", "'completion'"]),
    "a missing cell": ("m.jsonl", replaced(MAILS, 7, label=...), {}, ["row 7", "'label'"]),
    "half of a form": ("m.csv", MAILS, {"columns": ("completion=text",)}, ["--columns prompt=COLUMN"]),
    "one input only": ("m.csv", [{"prompt": "x", "completion": "y"}] * 30, {}, ["split is empty"]),
    "a column that the first rows lack": (
        *("m.jsonl", [{"text": "x", **({"note": "y"} if i > 1_000 else {})} for i in range(1_200)]),
        *({"columns": ("prompt=text", "completion=note")}, ["row 1 has no 'note'; it has text"]),
    ),
    "an unknown split": (
        *("m.csv", [{**row, "split": "tset" if i == 3 else "train"} for i, row in enumerate(SUMS)], {}),
        ["row 4", "'tset'", "'test'"],
    ),
    "no training split": ("m.csv", [{**row, "split": "test"} for row in SUMS], {}, ["train split is empty"]),
    "a split that is given twice": (
        *("m.csv", [{**row, "split": ("train", "test")[i % 2]} for i, row in enumerate(SUMS)]),
        *({"test_data": "m.csv"}, ["--test-data m.csv"]),
    ),
    "numbers as classes": (
        *("m.csv", [{**row, "label": i / 7} for i, row in enumerate(MAILS)], {}),
        ["60 numbers", "--metric pearson"],
    ),
    "texts as classes": ("m.csv", [{**row, "label": row["text"]} for row in MAILS], {}, ["60 different"]),
    "a value that is no number": (
        *("m.csv", replaced([{**row, "label": 0.5} for row in MAILS], 3, label="high")),
        *({"metric": "pearson"}, ["row 3", "'high'"]),
    ),
    "f1 of three classes": (
        *("m.csv", [{**row, "label": "abc"[i % 3]} for i, row in enumerate(MAILS)], {"metric": "f1"}),
        ["macro_f1"],
    ),
    "an answer without a number": (
        *("m.csv", [{**row, "completion": "many"} for row in SUMS], {"metric": "numeric"}),
        ["m.csv: row", "token_f1"],
    ),
    "a call of a tool": (
        *("m.jsonl", replaced(CHATS, 4, messages=[{**TOOL_CALL, "role": "user"}, TOOL_CALL]), {}),
        ["row 4", "tool_calls"],
    ),
    "a chat without an answer": ("m.jsonl", with_roles(4, "user", "user"), {}, ["row 4", "assistant"]),
    "an unknown role": ("m.jsonl", with_roles(4, "usr", "assistant"), {}, ["row 4", "'usr'"]),
    "a missing image": ("m.csv", [{"image": "a.png", "label": "x"}] * 30, {}, ["row 1", "'a.png'"]),
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
    typed = StudyOptions(data=(source,), variants=("lora",), model="letters-base", **options)
    for each in resolve_tasks(typed, Path("bases")):
        choice = each.task.choice()
        each.task._load_split("train", typed.train_size or choice.train_size)


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_cannot_be_learnt_from_are_refused(case: str) -> None:
    name, rows, options, words = WRONG_ROWS[case]
    write(Path(name), rows)
    assert_refused(lambda: resolve(name, **options), words)


def test_a_row_that_is_too_long_is_named_unless_max_length_is_given(model: Path, tmp_path: Path) -> None:
    long = replaced(replaced(SUMS, 8, completion="x" * 5000), 9, completion="x" * 4000)
    write(
        Path("m.csv"),
        [{**row, "split": ("train", "dev", "test")[max(0, i - 57)]} for i, row in enumerate(long)],
    )

    def templates(**options: Any) -> Any:
        typed = StudyOptions(data=("m.csv",), variants=("lora",), model=str(model), **options)
        return resolve_one_task(typed, tmp_path)[1]

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


def test_a_plan_says_how_many_rows_are_cut(run: Run, model: Path) -> None:
    write(Path("m.csv"), SUMS)
    done = run(SWEEP, "--data", "m.csv", "--model", str(model), "--max-length", "9", "--plan")
    assert done.returncode == 0, done.stderr
    cut = " ".join(done.stdout.partition("\nCut rows ")[2].split())
    assert re.match(r"m\.csv: \d+ of \d+ rows have more than 9 tokens and lose the end of their answer", cut)
