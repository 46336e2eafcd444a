"""Promise 6: a plan shows, and a study trains, the user's own data, tasks, variants and models."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import as_a_user
import pytest
import tiny_models
from forked_commands import Commands

Row = dict[str, str]


def mails(first: int, count: int) -> list[Row]:
    """Return `count` different rows of a text and a label, beginning with row number `first`."""
    letters = "abcdefghij"
    words = [
        f"{letters[n // 100]} {letters[n // 10 % 10]} {letters[n % 10]}" for n in range(first, first + count)
    ]
    return [{"text": text, "label": "ham" if text[-1] in "abcde" else "spam"} for text in words]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


SPLITS = {"train": mails(0, 40), "validation": mails(200, 14), "test": mails(300, 16)}

TASK = """
from pathlib import Path

from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults

ROWS = Path(__file__).with_name("words.txt")


class Copied(Task):
    title = "letters, copied"
    floor = 0.0
    output = "teacher_forced"
    defaults = TaskDefaults(
        train_size=16, validation_size=8, test_size=8, steps=4, batch_size=8, max_length=32,
        evaluations=2, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        last = {"train": "i", "validation": "j", "test": "k"}[split]
        words = [f"{a} {b}" for a in ROWS.read_text().split() for b in "abcdefgh"]
        return [Example(f"copy {word} {last} =", f" {word}") for word in words[:count]]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, a task and a variant of a user. Tests only read it."""
    folder = tmp_path_factory.mktemp("own")
    tiny_models.bert(folder / "bert")
    tiny_models.llama(folder / "llama")
    (folder / "copied.py").write_text(TASK)
    (folder / "words.txt").write_text("c d e f")
    shutil.copy(Path(__file__).with_name("gained.py"), folder)
    return folder


@pytest.fixture(scope="module")
def commands(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Yield a process that runs commands. It looks for datasets of the hub in the folder `hub`."""
    folder = tmp_path_factory.mktemp("commands")
    write(folder / "m.csv", SPLITS["train"])
    first = f"study --plan --model {own / 'bert'} --data m.csv"
    made = Commands(first.split(), folder=folder, ORCHESTRATOR_DATA="hub")
    yield made
    made.close()


def plan(commands: Commands, *words: str | Path, cwd: Path) -> str:
    """Return the printed plan of a study as one line."""
    result = commands.run("study", "--plan", *words, cwd=cwd)
    assert result.code == 0, result
    assert not list(cwd.glob("results/*/study.yaml")), "a plan begins no study"
    assert not (commands.temporary / "ray").exists(), "Ray has started"
    return " ".join(result.out.split())


def one_file(path: Path) -> None:
    write(path, [{**row, "split": split} for split, rows in SPLITS.items() for row in rows])


def a_folder(path: Path) -> None:
    for (split, rows), suffix in zip(SPLITS.items(), (".csv", ".jsonl", ".parquet"), strict=True):
        write(path / f"{split}{suffix}", rows)


def of_the_hub(path: Path) -> None:
    for split, rows in SPLITS.items():
        write(path / "data" / f"{split}-00000-of-00001.parquet", rows)


SOURCES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "mails.csv": ("mails.csv", one_file),
    "mails.jsonl": ("mails.jsonl", one_file),
    "mails.parquet": ("mails.parquet", one_file),
    "a folder with a file for each split": ("mails", a_folder),
    "a dataset of the hub": ("hub/our/mails", of_the_hub),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_plan_of_data_shows_their_columns_splits_and_classes(
    case: str, commands: Commands, own: Path, tmp_path: Path
) -> None:
    name, make = SOURCES[case]
    make(tmp_path / name)
    words = ("--model", own / "bert", "--variants", "lora", "dora", "--learning-rates", "1e-3", "1e-2")
    said = plan(commands, "--data", name.removeprefix("hub/"), *words, cwd=tmp_path)
    assert "text=text label=label" in said
    assert [int(n) for n in re.findall(r"(\d+) (?:training|validation|test)", said)] == [40, 14, 16], said
    assert "2 classes" in said
    assert re.search(r"Configurations 12, of them 0 known", said), "2 variants, 2 rates, 3 seeds"


def test_rows_without_splits_are_divided_by_what_they_say(
    commands: Commands, own: Path, tmp_path: Path
) -> None:
    """The split of a row depends on its content only, and not on the order, the format or column names."""
    rows = mails(0, 200)
    write(tmp_path / "mails.csv", rows)
    write(tmp_path / "other.jsonl", [{"kind": row["label"], "body": row["text"]} for row in reversed(rows)])
    numbers = []
    for words in (("mails.csv",), ("other.jsonl", "--columns", "text=body", "label=kind")):
        said = plan(commands, "--model", own / "bert", "--data", *words, cwd=tmp_path)
        numbers.append([int(n) for n in re.findall(r"(\d+) (?:training|validation|test)", said)])
    assert numbers[0] == numbers[1]
    assert sum(numbers[0]) == 200
    assert all(20 <= n <= 60 for n in numbers[0][1:]), "about a fifth each"


def test_the_plan_of_images_by_class_counts_them(commands: Commands, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(40):
        path = tmp_path / "pictures" / ("red", "green")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 3 * number)).save(path)
    said = plan(commands, "--data", "pictures", cwd=tmp_path)
    assert "image=image" in said
    assert sum(int(n) for n in re.findall(r"(\d+) (?:training|validation|test)", said)) == 40
    assert "2 classes" in said


def test_the_plan_of_prompts_and_chats_names_their_columns(
    commands: Commands, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "sums.csv").write_text("question,answer\n" + "".join(f"{n} = ,{2 * n}\n" for n in range(60)))
    chats = [
        {"messages": [{"role": "user", "content": f"{n} ="}, {"role": "assistant", "content": f"{2 * n}"}]}
        for n in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for name, columns in (
        ("sums.csv", "prompt=question completion=answer"),
        ("chats.jsonl", "messages=messages"),
    ):
        said = plan(commands, "--model", own / "llama", "--data", name, cwd=tmp_path)
        assert columns in said
        assert sum(int(n) for n in re.findall(r"(\d+) (?:training|validation|test)", said)) == 60


def test_the_plan_of_a_task_and_a_variant_in_files_names_them(
    commands: Commands, own: Path, tmp_path: Path
) -> None:
    words = ("--task", own / "copied.py", "--model", own / "llama")
    variant = own / "gained.py"
    said = plan(commands, *words, "--variants", "lora", variant, "--set", f"{variant}.start=2", cwd=tmp_path)
    assert "copied.py, 4 steps of 8" in said
    assert "gained.py" in said
    assert "Configurations 6, of them 0 known" in said


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_study_of_ones_own_task_variant_and_model_is_known_by_their_content(
    own: Path, tmp_path: Path
) -> None:
    """Results of files that were moved and renamed are found again. After a change of a file they are not."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(own, here)

    def words(folder: Path, task: str, variant: str, model: str) -> list[str | Path]:
        own = ["--task", folder / task, "--model", folder / model, "--variants", "lora", folder / variant]
        return ["--dry-run", *own, "--seeds", "1", "--widen", "0", "--set", "warmup=0"]

    first = words(here, "copied.py", "gained.py", "llama")
    as_a_user.succeed("study", *first, "--trainers", "1", cwd=tmp_path)
    found = as_a_user.records(tmp_path)
    assert {record["configuration"]["variant"]["name"] for record in found.values()} == {"lora", "gained.py"}
    for record in found.values():
        assert record["state"] == "finished"
        assert record["steps"] == 4
        assert len(record["items"]["test"]["correct"]) == 8
    shutil.move(here, there)
    for before, after in (("copied.py", "again.py"), ("gained.py", "more.py"), ("llama", "base")):
        (there / before).rename(there / after)
    moved = words(there, "again.py", "more.py", "base")
    said = as_a_user.succeed("study", *moved, "--plan", cwd=tmp_path)
    assert "2, of them 2 known" in " ".join(said.split())
    (there / "words.txt").write_text("g d e f")
    said = as_a_user.succeed("study", *moved, "--plan", cwd=tmp_path)
    assert "2, of them 0 known" in " ".join(said.split())
