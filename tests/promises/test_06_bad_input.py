"""Promise 6: bad input of any kind gives one line of error and exit status 2 before Ray starts.

The command changes no file. The commands run in forks of one process (forked_commands.py); the last test
starts a process.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import as_a_user
import pytest
import tiny_models
from forked_commands import Commands

Case = tuple[str, str]
"""The words after the program's name, and the words that the error must have: values, options, fixes."""

PLAN = "study --dry-run --plan"

COMMANDS: dict[str, Case] = {
    "an unknown command": ("stduy", "'stduy' study"),
    "an unknown option": ("study --varaints lora", "--varaints --variants"),
    "an option of another command": ("published --variants lora", "--variants"),
    "a word of no option": ("study lora", "'lora'"),
    "two values for one": ("study --rank 8 16", "'16'"),
    "a value that is missing": ("study --seeds --plan", "--seeds"),
    "text for a whole number": ("study --seeds two", "--seeds 'two'"),
    "an unknown choice": ("study --dtype float3", "--dtype 'float3' float32"),
    "a study without a name": ("report", "STUDY"),
    "a report without a study": ("report mine", "results"),
    "an export without a study": ("export mine", "results"),
    "a record without a store": ("show 0123abcd", "results"),
    "something else to fetch": ("fetch letters", "fetch letters"),
    "an unknown model to fetch": ("fetch model leters", "'leters' letters"),
    "garbage of the future": ("gc --older-than -1", "--older-than -1"),
    "a sync without a store": ("sync", "results"),
    "an unknown preset": (
        "study --plan --config published-gsm8",
        "--config 'published-gsm8' published-gsm8k",
    ),
    "nothing to train on": ("study", "GPU --dry-run"),
    "a comparison of one variant": ("tuned --dry-run --plan --variants lora", "--variants lora"),
    "one replicate": ("tuned --dry-run --plan --replicates 1", "--replicates 1"),
    "seeds of replicates": ("tuned --dry-run --plan --seeds 3", "--seeds 3 --replicates"),
    "a billion replicates": (
        "tuned --dry-run --plan --replicates 1000000000",
        "--replicates 1000000000 10000",
    ),
    "a tuning over one rate": ("tuned --dry-run --plan --learning-rates 1e-3", "letters 1 rate"),
    "a curve of one rate": ("sensitivity --dry-run --plan --learning-rates 1e-3", "--learning-rates 5"),
    "factors in a search": ("sensitivity --dry-run --plan --search qmc", "--search qmc grid"),
    "factors at points": ("sensitivity --dry-run --plan --points 4", "--points 4"),
    "factors and early stopping": ("sensitivity --dry-run --plan --scheduler asha", "--scheduler asha none"),
    "an unknown factor": ("sensitivity --dry-run --plan --factors alhpa", "'alhpa' alpha"),
    "a factor of another variant": (
        "sensitivity --dry-run --plan --variants lora --factors pissa.svd",
        "--factors 'pissa'",
    ),
    "too many levels": ("sensitivity --dry-run --plan --levels 9", "--levels 9"),
    "a margin of zero": ("tuned --dry-run --plan --margin 0", "--margin 0"),
    "unknown published scores": ("published --task gsm7k", "'gsm7k' gsm8k"),
}

OPTIONS: dict[str, Case] = {
    "a slip in a choice": ("--lr-schedule cosin", "--lr-schedule 'cosin' cosine"),
    "a missing file of options": ("--config none.yaml", "--config 'none.yaml'"),
    "an unknown variant": ("--variants lora pisa", "'pisa' pissa"),
    "no variant": ("--variants", "--variants"),
    "an unknown tuner of PEFT": ("--variants peft:LOHO", "LOHO LOHA"),
    "an unknown task": ("--task leters", "'leters' letters"),
    "an empty task": ("--task ''", "--task"),
    "an unknown model": ("--model smolm2-135m", "'smolm2-135m' smollm2-135m"),
    "a rate of zero": ("--learning-rates 0", "--learning-rates '0'"),
    "a negative rate": ("--learning-rates 1e-3 -1e-3", "'-1e-3'"),
    "a rate that is no number": ("--learning-rates fast", "'fast'"),
    "a rate that is not finite": ("--learning-rates nan", "'nan'"),
    "a reversed grid": ("--learning-rates 1e-2:1e-4:2", "'1e-2:1e-4:2' 1e-4:1e-2:2"),
    "a grid without points": ("--learning-rates 1e-4:1e-2:0", "'0'"),
    "a grid of billions": ("--learning-rates 1e-5:1e-2:1000000000", "'1e-5:1e-2:1000000000' 10000"),
    "a rank of zero": ("--rank 0", "--rank 0"),
    "a rank larger than the layers": ("--rank 97", "97 96"),
    "a rank of a million": ("--rank 1000000", "--rank 1000000 100000"),
    "an alpha that is not finite": ("--alpha nan", "--alpha nan"),
    "a dropout of everything": ("--dropout 1", "--dropout 1"),
    "an unknown layer": ("--targets q_porj", "'q_porj' 'q_proj'"),
    "a pattern that is none": ("--targets 're:('", "'re:('"),
    "no seeds": ("--seeds 0", "--seeds 0"),
    "a billion seeds": ("--seeds 1000000000", "--seeds 1000000000 10000"),
    "no steps": ("--steps 0", "--steps 0"),
    "steps and epochs": ("--steps 5 --epochs 1", "--steps 5 --epochs 1"),
    "more evaluations than steps": ("--steps 30 --evaluations 31", "--evaluations 31 30"),
    "a length of one token": ("--max-length 1", "--max-length 1"),
    "a batch larger than the data": ("--batch-size 999999", "999999 2000"),
    "more test rows than there may be": ("--test-size 100000000", "--test-size 100000000"),
    "unequal parts of a batch": ("--accumulation 3", "--accumulation 3 16"),
    "a head's rate without a head": ("--head-learning-rate 1e-3", "1e-3 same"),
    "no trainers": ("--trainers 0", "--trainers 0"),
    "more trainers than cores": ("--trainers 4000", "--trainers 4000"),
    "no lanes": ("--lanes-per-trainer 0", "--lanes-per-trainer 0"),
    "more workers than rows": (
        "--workers-per-trainer 17 --accumulation 4 --batch-size 16",
        "--workers-per-trainer 17 16",
    ),
    "a GPU where there is none": ("--gpus-per-worker 1", "--gpus-per-worker 1"),
    "a price of nothing": ("--price-per-hour 0", "--price-per-hour 0"),
    "an unknown card": ("--plan-gpu H10", "--plan-gpu 'H10' 'H100'"),
    "a card beside the CPU": ("--plan-gpu H100 --device cpu", "--plan-gpu 'H100' --device cpu"),
    "hours that are none": ("--max-hours 0", "--max-hours 0"),
    "an output that is a file": ("--output /dev/null", "--output '/dev/null'"),
    "an empty store": ("--store ''", "--store"),
    "a store that is a file": ("--store /dev/null", "--store /dev/null"),
    "a tracking server that is a word": ("--tracking-uri mlflow", "'mlflow' sqlite:///"),
    "a tracking server that is away": ("--tracking-uri http://127.0.0.1:9", "http://127.0.0.1:9"),
    "an unknown tracker": ("--tracker wanbd", "'wanbd' wandb"),
    "a tracker beside none": ("--tracker none tensorboard", "--tracker none tensorboard"),
    "two batch sizes": ("--batch-size 32 --set batch_size=64", "'batch_size=64' --batch-size"),
    "points of a grid": ("--search grid --points 4", "--points 4 --search random optuna"),
    "a study's name with a slash": ("--study a/b", "--study 'a/b' a-b"),
    "a study's name of control characters": ("--study 'a\x1b[31mb'", r"--study \x1b[31m"),
    "a study's name of the folder above": ("--study ..", "--study '..'"),
    "a study's name of 300 characters": (f"--study {'x' * 300}", "--study 200"),
    "a study's name of the store": ("--study store", "--study 'store'"),
    "an unknown scheduler": ("--scheduler ahsa", "'ahsa' asha"),
    "a scheduler that changes rates": ("--scheduler pbt", "'pbt' asha"),
    "an unknown search": ("--search optun", "'optun' optuna"),
    "an unknown sampler": ("--search optuna --sampler cmaes", "'cmaes' cma-es"),
    "points without a search": ("--points 8", "--points --search"),
    "no points": ("--search qmc --points 0", "--points 0"),
    "seeds in a search": ("--search optuna --seeds 3", "--seeds 3"),
}
"""Like COMMANDS, with the words after PLAN."""

OPTIONS |= {
    f"{option} {word}": (f"--search qmc {option} {word}", named)
    for option, word, named in [
        ("--space", "rank", "'rank'"),
        ("--space", "rnk=4,8", "'rnk' 'rank'"),
        ("--space", "lra.rank=4,8", "'lra' 'lora'"),
        ("--space", "rank=4:16", "'rank=4:16' int:4:16"),
        ("--space", "rank=int:16:4", "int:16:4 int:4:16"),
        ("--space", "rank=int:0:16", "'0'"),
        ("--space", "rank=4,,8", "'rank=4,,8' rank=4,8"),
        ("--space", "rank=four,eight", "'four'"),
        ("--space", "rank=4", "rank=4 --set"),
        ("--space", "rank=4,8 rank=2,4", "twice"),
        ("--space", "steps=10,20", "steps"),
        ("--space", "learning_rate=log:0:1", "learning_rate=log:0:1"),
        ("--space", "learning_rate=lgo:1e-4:1", "'learning_rate=lgo:1e-4:1' 'log'"),
        ("--space", "schedule=linear,cosin", "'cosin' 'cosine'"),
        ("--space", "batch_size=16,999999", "999999 2000"),
        ("--set", "rank=1e300", "'rank=1e300'"),
        ("--set", "rank=4 rank=8", "twice"),
        ("--set", "pisa.svd=exact", "'pisa' pissa"),
        ("--set", "final_factor=1.5", "final_factor=1.5"),
        ("--set", "rank", "'rank'"),
    ]
}

CONFIGS: dict[str, tuple[str, str]] = {
    "no YAML": ("rank: [", "1"),
    "a list": ("- rank", "1"),
    "itself": ("a: &a [*a]", "1"),
    "an unknown name": ("seeds: 1\nrnk: 3", "2 'rnk' 'rank'"),
    "an unknown name in a group": ("grid:\n  rank: 3\n  sed: 3", "3 'sed' 'seeds'"),
    "a name twice": ("rank: 3\ngrid: {rank: 4}", "2 rank"),
    "no whole number": ("rank: 1.5", "1 rank '1.5'"),
    "no truth value": ("dry_run: maybe", "1 dry_run 'maybe'"),
    "a rank of zero": ("seeds: 2\nrank: 0", "2 rank 0"),
    "an unknown variant": ("seeds: 1\nvariants: [lora, pisa]", "2 'pisa' 'pissa'"),
    "bytes": ("rank: \udcff", "study.yaml"),
}
"""Name of a case -> text of a YAML file of options, and words of the error, first the number of the line."""


def rows(count: int = 60, **changed: str) -> str:
    """Return the text of a CSV file of texts with two labels. `changed` has other cells for row 7."""
    lines = ["text,label"]
    for i in range(count):
        cells = {"text": f"w{i}", "label": "spam" if i % 3 else "ham"} | (changed if i == 6 else {})
        lines.append(f"{cells['text']},{cells['label']}")
    return "\n".join(lines) + "\n"


DATA: dict[str, tuple[dict[str, str], Case]] = {
    "a missing file": ({"mail.csv": rows()}, ("mial.csv", "mial.csv 'mail.csv'")),
    "an empty file": ({"m.jsonl": ""}, ("m.jsonl", "m.jsonl")),
    "a header alone": ({"m.csv": "text,label\n"}, ("m.csv", "m.csv")),
    "another format": ({"m.txt": "hello"}, ("m.txt", "m.txt .jsonl")),
    "bytes": ({"m.csv": "text,label\n\udcff,x\n"}, ("m.csv", "m.csv UTF-8 11")),
    "half a line of JSON": ({"m.jsonl": '{"text": "x", "label": "y"}\n{"text": '}, ("m.jsonl", "m.jsonl 2")),
    "a number in place of a row": ({"m.jsonl": "7\n"}, ("m.jsonl", "m.jsonl 1 7")),
    "a broken Parquet file": ({"m.parquet": "PAR1"}, ("m.parquet", "m.parquet")),
    "too many cells": ({"m.csv": "text,label\na,b\na,b,c\n"}, ("m.csv", "m.csv 2 3")),
    "an empty text": ({"m.csv": rows(text=" ")}, ("m.csv", "m.csv 7 'text'")),
    "a class that is rare": ({"m.csv": rows(label="rare")}, ("m.csv", "m.csv 7 'rare'")),
    "a single class": ({"m.csv": rows().replace("ham", "spam")}, ("m.csv", "m.csv label")),
    "too few rows": ({"m.csv": rows(19)}, ("m.csv", "m.csv 19 20")),
    "columns that are not known": (
        {"m.csv": rows().replace("text", "txet")},
        ("m.csv", "txet --columns"),
    ),
    "a column that there is not": ({"m.csv": rows()}, ("m.csv --columns text=txt", "text=txt 'text'")),
    "an unknown role": ({"m.csv": rows()}, ("m.csv --columns txt=text", "'txt' 'text'")),
    "an unknown placeholder": ({"m.csv": rows()}, ("m.csv --template {txt}", "txt 'text'")),
    "a template of the answer": (
        {"m.csv": rows()},
        ("m.csv --template {text}{label}", "--template label"),
    ),
    "an unknown metric": ({"m.csv": rows()}, ("m.csv --metric acuracy", "--metric 'acuracy' 'accuracy'")),
    "a metric that does not fit": ({"m.csv": rows()}, ("m.csv --metric token_f1", "--metric token_f1")),
    "more rows than there are": ({"m.csv": rows()}, ("m.csv --train-size 999", "999")),
    "a task besides": ({"m.csv": rows()}, ("m.csv --task letters", "--data --task")),
    "test rows that are the training rows": (
        {"m.csv": rows()},
        ("m.csv --test-data m.csv", "--test-data m.csv"),
    ),
    "a file of no image": ({"pictures/cat/1.png": "hello", "pictures/dog/1.png": "x"}, ("pictures", "1.png")),
    "a folder of neither": ({"folder/x.txt": "hello"}, ("folder", "folder")),
    "a folder without training rows": ({"folder/test.csv": rows()}, ("folder", "folder test.csv train")),
}
"""Name of a case -> files, and the words after --data with the words of the error."""

TASKS: dict[str, tuple[str, str, str]] = {
    "ends the process": (as_a_user.TASK, "import sys\nsys.exit(7)\n", "2"),
    "is no Python": (as_a_user.TASK, "def f(:\n", "1"),
    "is empty": (as_a_user.TASK, "", "Task"),
    "has no defaults": ("    defaults", "    sizes", "defaults"),
    "has no examples": ("def examples", "def exampels", "examples"),
    "has no floor": ("    floor", "    flor", "floor"),
    "has a floor in words": ("floor = 0.0", "floor = 'low'", "floor 'low'"),
    "has an unknown output": (
        '"teacher_forced"',
        '"teacher_forcd"',
        "output 'teacher_forced'",
    ),
    "has one class": ('"teacher_forced"', '"classification"', "labels"),
    "has no steps": ("steps=6", "steps=0", "steps 0"),
    "has a rate of zero": ("(1e-3,)", "(0.0,)", "learning_rates 0.0"),
    "has examples that raise": ("        last =", "        1 / 0\n        last =", "13 ZeroDivisionError"),
    "gives too few examples": ("* (count // 8)", "", "8 32"),
    "gives nothing": ("        return [", "        [", "None"),
    "gives no examples": ("Example(f", "(f", "tuple"),
    "tests with its training rows": ('"test": "k"', '"test": "i"', "8"),
}
"""Name of a case -> a text of the task's file, its replacement, and words of the error."""

VARIANT = """
from variants.baseline.lora import LoRA

class Mine(LoRA):
    def init(self, layer, random):
        initial = random.lora()
        initial.trainable["g"] = layer.ones(layer.shape[0], 1)
        return initial

    def factors(self, params, layer):
        return params["A"], params["g"] * params["B"]
"""

VARIANTS: dict[str, tuple[str, str, str]] = {
    "is no Python": (VARIANT, "def f(:\n", "1"),
    "is empty": (VARIANT, "", "Variant"),
    "raises": (VARIANT, "\n\n1 / 0\n", "3 ZeroDivisionError"),
    "has a wrong attribute": ("layer.shape[0]", "layer.width", "7 width"),
    "has a wrong shape": ("(layer.shape[0], 1)", "(3, 1)", "11 RuntimeError"),
    "lacks a tensor": ('["g"] =', '["h"] =', "11 'g'"),
}
"""Name of a case -> a text of the variant's file, its replacement, and words of the error."""

Spoil = Callable[[Path], object]


def config(**changed: object) -> Spoil:
    """Return a function that changes values of a model's config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


MODELS: dict[str, tuple[Spoil, str]] = {
    "half of its weights": (
        lambda folder: os.truncate(path := folder / "model.safetensors", path.stat().st_size // 2),
        "model.safetensors",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
    "half of its configuration": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "an unknown architecture": (config(model_type="foo"), "foo"),
    "an encoder with a decoder": (config(model_type="t5"), "T5"),
    "a billion blocks": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "a negative width": (config(hidden_size=-4), "-4"),
}
"""Name of a case -> function that damages the folder of a model, and words of the error."""


@pytest.fixture(scope="module")
def commands(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Yield a process that runs commands."""
    folder = tmp_path_factory.mktemp("commands")
    write(folder, {"m.csv": rows(), "mine.py": VARIANT, "task.py": as_a_user.TASK})
    plans = [
        f"study --plan --model {model} --variants lora --data m.csv",
        f"study --plan --model {model} --variants lora --task task.py",
        f"{PLAN} --variants ./mine.py --targets q_porj",
    ]
    made = Commands(*map(str.split, plans), folder=folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small language model."""
    return tiny_models.llama(tmp_path_factory.mktemp("models") / "model")


def write(folder: Path, files: dict[str, str]) -> None:
    """Write text files (name -> text). A lone surrogate is written as the byte for which it stands."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))


def content(folder: Path) -> dict[Path, bytes | None]:
    """Return the content of a folder: path -> bytes of a file, or None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(result: as_a_user.Result, named: str) -> None:
    """Assert exit status 2, no traceback, and one line that has all words of `named`."""
    assert result.code == 2, result
    assert result.err.count("\n") == 1, result
    assert result.err.endswith("\n"), result
    missing = [word for word in named.split() if word not in result.err]
    assert not missing, f"{missing} not in: {result.err}"
    assert "\x1b" not in result.err, "control characters of the input"


def refuse(commands: Commands, words: str, named: str, cwd: Path) -> None:
    """Run a command that must be refused, and assert that it changes no file."""
    before = content(cwd)
    result = commands.run(*shlex.split(words), cwd=cwd)
    assert_refused(result, named)
    assert content(cwd) == before
    assert not (commands.temporary / "ray").exists(), "Ray has started"


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_refused(case: str, commands: Commands, tmp_path: Path) -> None:
    refuse(commands, *COMMANDS[case], tmp_path)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_refused(case: str, commands: Commands, tmp_path: Path) -> None:
    words, named = OPTIONS[case]
    refuse(commands, f"{PLAN} {words}", named, tmp_path)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_file_of_options_is_refused_with_its_line(
    case: str, commands: Commands, tmp_path: Path
) -> None:
    text, named = CONFIGS[case]
    write(tmp_path, {"study.yaml": text})
    refuse(commands, f"{PLAN} --config study.yaml", f"study.yaml {named}", tmp_path)


@pytest.mark.parametrize("case", DATA)
def test_wrong_data_are_refused_with_file_and_row(
    case: str, commands: Commands, model: Path, tmp_path: Path
) -> None:
    files, (words, named) = DATA[case]
    write(tmp_path, files)
    refuse(commands, f"study --plan --model {model} --variants lora --data {words}", named, tmp_path)


@pytest.mark.parametrize("case", TASKS)
def test_a_wrong_task_file_is_refused(case: str, commands: Commands, model: Path, tmp_path: Path) -> None:
    old, new, named = TASKS[case]
    assert as_a_user.TASK.count(old) == 1
    write(tmp_path, {"mine.py": as_a_user.TASK.replace(old, new)})
    refuse(commands, f"study --plan --model {model} --task mine.py", f"mine.py {named}", tmp_path)


@pytest.mark.parametrize("case", VARIANTS)
def test_a_wrong_variant_file_is_refused(case: str, commands: Commands, tmp_path: Path) -> None:
    old, new, named = VARIANTS[case]
    assert VARIANT.count(old) == 1
    write(tmp_path, {"mine.py": VARIANT.replace(old, new)})
    refuse(commands, f"{PLAN} --variants lora ./mine.py", f"mine.py {named}", tmp_path)


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model_is_refused(case: str, commands: Commands, model: Path, tmp_path: Path) -> None:
    spoil, named = MODELS[case]
    spoil(shutil.copytree(model, tmp_path / "my-model"))
    refuse(commands, f"{PLAN} --model my-model", f"my-model {named}", tmp_path)


@pytest.mark.parametrize("what", ["--config", "--data", "--task"])
def test_a_pipe_is_refused_and_not_waited_for(what: str, commands: Commands, tmp_path: Path) -> None:
    name = {"--config": "pipe.yaml", "--data": "pipe.csv", "--task": "pipe.py"}[what]
    os.mkfifo(tmp_path / name)
    refuse(commands, f"study --plan {what} {name}", name, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_ADDRESS", "nonsense"),
        ("RAY_ADDRESS", "127.0.0.1:9"),
        ("TMPDIR", "/none"),
        ("RAY_TRAIN_V2_ENABLED", "0"),
    ],
)
def test_an_environment_in_which_ray_cannot_start_is_refused(
    name: str, value: str, commands: Commands, tmp_path: Path
) -> None:
    assert_refused(commands.run("study", "--dry-run", cwd=tmp_path, **{name: value}), f"{name} {value}")
    assert not content(tmp_path)


def test_a_file_in_place_of_a_studys_folder_is_refused(
    commands: Commands, model: Path, tmp_path: Path
) -> None:
    write(tmp_path, {"results/mine": "", "mine.py": as_a_user.TASK})
    words = ("study", "--dry-run", "--study", "mine", "--model", model, "--task", "mine.py")
    assert_refused(commands.run(*words, "--variants", "lora", cwd=tmp_path), "--study 'mine'")


def test_a_process_of_its_own_is_refused_in_the_same_way(tmp_path: Path) -> None:
    result = as_a_user.run("study", "--dry-run", "--rank", "0", cwd=tmp_path)
    assert_refused(result, "--rank 0")
    assert result.out == ""
    assert not content(tmp_path)
