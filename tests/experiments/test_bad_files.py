"""A bad file that a study reads (task, model, or file of the store) is refused in one line with exit code 2.

Ray is not started. The scripts run in the process of the test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import SWEEP, Run
from untrained_base import base

from orchestrator.finetune.tasks.local.letters import Letters

__all__ = ["base"]

DRY = ("--dry-run", "--plan")

TASK = """
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults

class Mine(Task):
    floor = 0.0
    default_model = "letters-base"
    output = "teacher_forced"
    defaults = TaskDefaults(
        train_size=32, validation_size=8, test_size=8, steps=6, batch_size=8, max_length=32,
        evaluations=2, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        last = {"train": "i", "validation": "j", "test": "k"}[split]
        return [Example(f"copy {last} b c d {word} =", "a b") for word in "abcdefgh" * (count // 8)]
"""


def test_a_valid_task_file_is_planned(tmp_path: Path, run: Run) -> None:
    (tmp_path / "my.py").write_text(TASK)
    done = run(SWEEP, *DRY, "--task", "my.py")
    assert done.returncode == 0, done.stderr
    assert "12, of them 0 known" in done.stdout


def without(name: str) -> str:
    """Return `TASK` with the attribute or method `name` renamed, so that it is missing."""
    return TASK.replace(f"    {name} =", f"    not_{name} =").replace(f"def {name}(", f"def not_{name}(")


def having(old: str, new: str) -> str:
    """Return `TASK` with `new` in place of `old`."""
    assert old in TASK
    return TASK.replace(old, new)


TASK_FILES: dict[str, tuple[str, list[str]]] = {
    "ends the process": ("import sys\nsys.exit(7)\n", ["my.py", "(line 2)", "sys.exit(7)"]),
    "ends the process without an error": ("raise SystemExit\n", ["my.py", "(line 1)", "sys.exit"]),
    "raises what is no Exception": (
        "class Stop(BaseException): pass\nraise Stop('no more')\n",
        ["my.py", "(line 2)", "does not import", "Stop: no more"],
    ),
    "recurses for ever": ("def f(): f()\nf()\n", ["does not import", "RecursionError"]),
    "is no Python": ("def f(:\n", ["does not import", "SyntaxError", "line 1"]),
    "is binary": ("\0\1\2", ["does not import"]),
    "is empty": ("", ["exactly one subclass of Task", "has 0"]),
    "has two tasks": (TASK + "\nclass More(Mine): pass\n", ["exactly one subclass of Task", "has 2"]),
    "has a task that takes arguments": (
        TASK + "    def __init__(self, size): pass\n",
        ["cannot make its task", "size"],
    ),
    "has no defaults": (without("defaults"), ["my.py", "has no defaults", "TaskDefaults("]),
    "has no floor": (without("floor"), ["my.py", "has no floor", "floor = 0.0"]),
    "has no model": (without("default_model"), ["has no default_model", "--model"]),
    "has no examples": (
        without("examples"),
        ["my.py", "has no examples", "def examples(self, split, count)"],
    ),
    "has defaults that are a dict": (having("TaskDefaults(\n", "dict(\n"), ["defaults", "TaskDefaults"]),
    "has defaults without steps": (having("steps=6, ", ""), ["does not import", "'steps'"]),
    "has a floor in words": (having("floor = 0.0", "floor = 'low'"), ["floor is 'low'", "finite number"]),
    "has a floor that is none": (having("= 0.0", "= float('nan')"), ["floor is nan", "finite number"]),
    "sets an attribute by its old name": (
        having('output = "teacher_forced"', 'answers = "forced"'),
        ["answers is now called output; rename it, with the value 'teacher_forced'"],
    ),
    "overrides a method by its old name": (
        having("    def examples", "    def can_grade(self): pass\n\n    def examples"),
        ["can_grade is now called check_can_grade; rename it"],
    ),
    "has an output by its old name": (
        having('"teacher_forced"', '"forced"'),
        ["output is 'forced'; it is now called 'teacher_forced'"],
    ),
    "has an unknown output": (
        having('"teacher_forced"', '"teacher_forcd"'),
        ["output is 'teacher_forcd'", "Did you mean 'teacher_forced'?"],
    ),
    "has a metric called loss": (having("floor =", "metric = 'loss'\n    floor ="), ["metric is 'loss'"]),
    "has a class alone": (
        having('"teacher_forced"', '"classification"'),
        ["labels is ()", "two classes or more"],
    ),
    "has classes that are none": (
        having('"teacher_forced"', '"classification"\n    labels = None'),
        ["cannot make its task", "NoneType"],
    ),
    "has answers of no token": (
        having('"teacher_forced"', '"generation"'),
        ["max_new_tokens is 0", "at least 1"],
    ),
    "has a negative size": (having("train_size=32", "train_size=-32"), ["train_size is -32", "at least 1"]),
    "has no test": (having("test_size=8", "test_size=0"), ["test_size is 0", "at least 1"]),
    "has no steps": (having("steps=6", "steps=0"), ["steps is 0", "at least 1"]),
    "has half a step": (having("steps=6", "steps=0.5"), ["steps is 0.5", "whole number"]),
    "has no batch": (having("batch_size=8", "batch_size=0"), ["batch_size is 0", "at least 1"]),
    "has no parts of a batch": (having("steps=6", "steps=6, accumulation=0"), ["accumulation is 0"]),
    "has no rates": (having("(1e-3,)", "()"), ["learning_rates is ()", "1 rate or more"]),
    "has a rate of zero": (having("(1e-3,)", "(0.0,)"), ["learning_rates has 0.0", "above 0"]),
    "has a schedule of its own": (having("steps=6", "steps=6, schedule='step'"), ["schedule is 'step'"]),
    "has a dropout in words of its own": (
        having("steps=6", "steps=6, base_dropout='yes'"),
        ["base_dropout is 'yes'", "on"],
    ),
    "has samples that are none": (
        having("floor =", "samples = -1\n    floor ="),
        ["samples is -1", "at least 1"],
    ),
    "has numerics in words": (
        having("floor =", "numerics = '2'\n    floor ="),
        ["numerics is '2'", "number"],
    ),
    "has a negative temperature": (
        having("floor =", "temperature = -0.5\n    floor ="),
        ["temperature is -0.5", "0"],
    ),
    "has a probability of 2": (having("floor =", "top_p = 2\n    floor ="), ["top_p is 2", "1"]),
    "has a stop of nothing": (having("floor =", "stop = ('',)\n    floor ="), ["stop is ('',)", "not empty"]),
    "has a word for its stops": (having("floor =", "stop = 'end'\n    floor ="), ["stop is 'end'", "tuple"]),
    "is graded at another time": (
        having("floor =", "grade_at = 'never'\n    floor ="),
        ["grade_at is 'never'"],
    ),
    "has half a new token": (
        having('"teacher_forced"', '"generation"\n    max_new_tokens = 2.5'),
        ["max_new_tokens is 2.5", "whole number"],
    ),
    "has half a precision": (having("steps=6", "steps=6, dtype='half'"), ["dtype is 'half'", "float32"]),
    "has a label that is no class": (
        having(
            '"teacher_forced"', '"classification"\n    metric = "accuracy"\n    labels = ("cat", "dog")'
        ).replace('"a b")', '"cow" if word == "f" else "cat")'),
        ["'cow' is no class", "Choose from: cat, dog"],
    ),
    "has examples that raise": (
        having("        return", "        raise OSError('no rows.jsonl')\n        return"),
        ["my.py", "(line 15)", "OSError: no rows.jsonl"],
    ),
    "has examples that end the process": (
        having("        return", "        raise SystemExit(7)\n        return"),
        ["my.py", "(line 15)", "sys.exit(7)"],
    ),
    "gives no examples": (having("        return [", "        [").replace("(count // 8)]", "1]"), ["None"]),
    "gives too few examples": (having("* (count // 8)", "* 1"), ["8 train examples", "32 are needed"]),
    "gives examples of another kind": (
        having("Example(f", "dict(prompt=f").replace('"a b")', 'answer="")'),
        ["dict"],
    ),
}


@pytest.mark.parametrize("case", TASK_FILES)
def test_an_invalid_task_file_is_refused(case: str, tmp_path: Path, run: Run) -> None:
    text, expected = TASK_FILES[case]
    (tmp_path / "my.py").write_text(text)
    run(SWEEP, *DRY, "--task", "my.py").assert_refused("my.py", *expected)


@pytest.mark.parametrize("kind", ["folder", "loop", "long name"])
def test_a_path_without_a_task_file_is_refused(kind: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / ("a" * 300 + ".py" if kind == "long name" else "my.py")
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    run(SWEEP, *DRY, "--task", path.name).assert_refused(path.name, "does not exist")


def test_examples_that_change_between_calls_are_refused(tmp_path: Path, base: Path, run: Run) -> None:
    (tmp_path / "my.py").write_text("import random\n" + having("{word} =", "{random.choice('abcdefgh')} ="))
    done = run(SWEEP, "--dry-run", "--task", "my.py", "--model", str(base))
    done.assert_refused("my.py", "the same examples in every call", "seed")


def test_words_that_the_tokenizer_lacks_are_named(tmp_path: Path, base: Path, run: Run) -> None:
    (tmp_path / "[bold]my.py").write_text(having("d {word}", "d {'bread' if word == 'f' else word}"))
    done = run(SWEEP, "--dry-run", "--task", "[bold]my.py", "--model", str(base))
    done.assert_refused("my.py", "example 5", "bread", "WordLevel", "--model")
    assert "[bold]my.py: reading the examples" in done.stdout, "brackets in a name are not markup"


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
VARIANTS = {
    "a wrong attribute": ("layer.shape[0]", "layer.width", ["line 8: AttributeError:", "width"]),
    "a wrong shape": ("(layer.shape[0], 1)", "(3, 1)", ["line 12: RuntimeError: The size of tensor a (3)"]),
    "a missing tensor": ('["g"] =', '["h"] =', ["line 12: KeyError: 'g'"]),
    "a hook that fails": (
        "    def factors",
        "    def after_step(self, *_):\n        1 / 0\n\n    def factors",
        ["line 12: ZeroDivisionError"],
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_that_cannot_train_is_refused_before_the_base_model_is_made(
    case: str, tmp_path: Path, run: Run
) -> None:
    old, new, expected = VARIANTS[case]
    assert old in VARIANT
    (tmp_path / "mine.py").write_text(VARIANT.replace(old, new))
    done = run(SWEEP, "--dry-run", "--variants", "lora", "./mine.py")
    done.assert_refused("mine.py' fails in its first step on a small layer: ", *expected, "correct it there")
    assert done.stdout == ""


def test_a_variant_that_trains_is_planned(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine.py").write_text(VARIANT)
    done = run(SWEEP, *DRY, "--variants", "./mine.py", "--rank", "64")
    assert done.returncode == 0, done.stderr


def test_a_large_rank_needs_no_large_layer_in_the_trial(tmp_path: Path, run: Run) -> None:
    first = "initial = random.lora()"
    (tmp_path / "mine.py").write_text(VARIANT.replace(first, f"assert max(layer.shape) <= 256; {first}"))
    done = run(SWEEP, *DRY, "--variants", "./mine.py", "--rank", "1024")
    assert "small layer" not in done.stderr
    assert "rank" in done.stderr, "the base model is too narrow"


# -- models --------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def config(text: str | bytes) -> Spoil:
    """Return a function that writes the model's config.json."""
    return lambda folder: (folder / "config.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )


def tokenizer(text: str) -> Spoil:
    """Return a function that writes the model's tokenizer.json."""
    return lambda folder: (folder / "tokenizer.json").write_text(text)


def _half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MODELS: dict[str, tuple[Spoil, list[str]]] = {
    "a torn configuration": (config('{"model_type": "lla'), ["config.json", "not a valid JSON file"]),
    "a configuration of bytes": (config(b"\xff\0\1"), ["config.json", "not a valid JSON file"]),
    "a list for a configuration": (config("[]"), ["model_type"]),
    "a configuration too deep": (config("[" * 100_000), ["config.json", "RecursionError"]),
    "a configuration of no model": (config('{"model_type": "foo"}'), ["`foo`"]),
    "a word for a number": (
        config('{"model_type": "llama", "hidden_size": "x"}'),
        ["hidden_size", "expected int"],
    ),
    "a billion layers": (
        config('{"model_type": "llama", "num_hidden_layers": 1000000000}'),
        ["num_hidden_layers", "10000 or less"],
    ),
    "no heads": (config('{"model_type": "llama", "num_attention_heads": 0}'), ["ZeroDivisionError"]),
    "a negative size": (config('{"model_type": "llama", "hidden_size": -4}'), ["-4", "not a multiple"]),
    "an encoder with a decoder": (config('{"model_type": "t5"}'), ["T5Config"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["has no weights"]),
    "half of the weights": (_half, ["model.safetensors", "is cut"]),
    "a torn tokenizer": (tokenizer('{"version'), ["Unterminated string"]),
    "a tokenizer of nothing": (tokenizer("{}"), ["does not load"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_an_invalid_model_is_refused(case: str, tmp_path: Path, base: Path, run: Run) -> None:
    folder = shutil.copytree(base, tmp_path / "m")
    spoil, expected = MODELS[case]
    spoil(folder)
    # A plan does not load the tokenizer.
    plan = () if "tokenizer" in case else ("--plan",)
    run(SWEEP, "--dry-run", *plan, "--model", "m").assert_refused("Model 'm'", *expected)


def test_a_model_name_that_is_too_long_is_refused(run: Run) -> None:
    run(SWEEP, *DRY, "--model", "a" * 5000).assert_refused("Unknown model")


# -- the store and the studies -------------------------------------------------------------------------------


def _file(name: str, text: bytes) -> Callable[[Path], Path]:
    """Return a function that writes this file below the output folder."""

    def write(results: Path) -> Path:
        path = results / name
        path.parent.mkdir(parents=True)
        path.write_bytes(text)
        return path

    return write


def _folder(name: str) -> Callable[[Path], Path]:
    """Return a function that makes a folder in place of a file."""

    def make(results: Path) -> Path:
        (results / name).mkdir(parents=True)
        return results / name

    return make


def _loop(name: str) -> Callable[[Path], Path]:
    """Return a function that makes a link to itself in place of a file."""

    def make(results: Path) -> Path:
        path = results / name
        path.parent.mkdir(parents=True)
        path.symlink_to(path.name)
        return path

    return make


POINTER = f"store/bases/letters-base.{Letters().pretrain_recipe()}.json"
PATHS = b'{"name": "s", "question": "", "command": "", "configurations": ["../x"]}'
PLAN = (SWEEP, *DRY)
STUDY = (SWEEP, "--dry-run", "--study", "s")
SEARCH = (SWEEP, *DRY, "--search", "qmc", "--study", "s")

STORED = {
    "a torn pointer to a base": (
        PLAN,
        _file(POINTER, b'{"content": "43f4'),
        ["not a base's pointer", "remove it"],
    ),
    "a list for a pointer": (PLAN, _file(POINTER, b"[]"), ["not a base's pointer", "remove it"]),
    "a pointer of bytes": (PLAN, _file(POINTER, b"\xff\0\1"), ["not a base's pointer", "remove it"]),
    "a pointer to a number": (PLAN, _file(POINTER, b'{"content": 5}'), ["content", "string", "remove it"]),
    "a pointer to nothing": (PLAN, _file(POINTER, b'{"name": "x"}'), ["content", "remove it"]),
    "a folder for a pointer": (PLAN, _folder(POINTER), ["Is a directory", "remove it"]),
    "a loop for a pointer": (PLAN, _loop(POINTER), ["symbolic links", "remove it"]),
    "a study of bytes": (STUDY, _file("s/study.json", b"\xff\0"), ["not a study", "delete it"]),
    "a study of paths": (STUDY, _file("s/study.json", PATHS), ["'../x' is no fingerprint", "delete it"]),
    "a folder for a study": (STUDY, _folder("s/study.json"), ["Is a directory", "delete it"]),
    "a search of bytes": (SEARCH, _file("s/search.json", b"\xff\0"), ["not a search", "another --study"]),
    "a folder for a search": (SEARCH, _folder("s/search.json"), ["Is a directory", "another --study"]),
    "a file for a study's folder": (
        STUDY,
        _file("s", b""),
        ["--study 's'", "File exists", "another --study"],
    ),
    "a file for the records' folder": (PLAN, _file("store/records", b""), ["File exists", "another --store"]),
}


@pytest.mark.parametrize("case", STORED)
def test_an_invalid_file_of_the_store_is_named(case: str, tmp_path: Path, base: Path, run: Run) -> None:
    command, spoil, expected = STORED[case]
    path = spoil(tmp_path / "results")
    run(*command, *(() if "pointer" in case else ("--model", str(base)))).assert_refused(path.name, *expected)


def test_a_changed_base_model_is_an_error_of_one_line(tmp_path: Path, base: Path, run: Run) -> None:
    """The files of the base model in the store do not match their stored hash."""
    bases = tmp_path / "results" / "store" / "bases"
    shutil.copytree(base, bases / f"letters-base-{'0' * 12}")
    (tmp_path / "results" / POINTER).write_text(json.dumps({"name": "letters-base", "content": "0" * 64}))
    run(SWEEP, *DRY).assert_refused(
        "error: Model 'letters-base': ", "holds content", "Put the old files back"
    )


@pytest.mark.parametrize("name", ["s/.lock", "store/bases"])
def test_a_folder_or_file_in_place_of_the_other_is_an_error_of_one_line(
    name: str, tmp_path: Path, base: Path, run: Run
) -> None:
    path = tmp_path / "results" / name
    path.parent.mkdir(parents=True)
    if name == "s/.lock":
        path.mkdir()
    else:
        path.touch()
    done = run(*STUDY, "--model", str(base))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert name in done.stderr
