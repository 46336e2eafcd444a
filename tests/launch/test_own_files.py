"""A task, a variant and a model in a user's files are known by their content, wherever they lie."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import SWEEP, Run
from orchestrator.experiments.lr_sensitivity import EXPERIMENT, CurveOptions

from orchestrator.finetune.models.catalogue import locate_pretrained
from orchestrator.finetune.resolve.data import write_own_files
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.catalogue import hash_task_code as hash_code
from orchestrator.launch.study import Study, resolve_study
from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError
from variants import catalogue

TASK = '''
"""Copy letters."""

from pathlib import Path

from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults

WORDS = Path(__file__).with_name("words.txt")


class Copy(Task):
    title = "copied letters"
    floor = 0.0
    output = "teacher_forced"
    defaults = TaskDefaults(
        train_size=16, validation_size=8, test_size=8, steps=4, batch_size=8, max_length=32,
        evaluations=2, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        words = WORDS.read_text().split()
        last = {"train": "i", "validation": "j", "test": "k"}[split]
        return [Example(f"copy a b c d {word} {last} =", "a b") for word in words * (count // len(words))]
'''
VARIANT = '''
"""LoRA with another scale."""

from variants.baseline.lora import LoRA


class Scaled(LoRA):
    peft = None
'''


@pytest.fixture
def mine(tmp_path: Path, base: Path) -> Path:
    """Return a folder with a task file, its data, a variant file and a base model."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "copy_task.py").write_text(TASK)
    (folder / "words.txt").write_text("e f g h")
    (folder / "scaled.py").write_text(VARIANT)
    shutil.copytree(base, folder / "base")
    return folder


def resolve(output: Path, task: Path, variant: Path, model: Path) -> Study:
    """Resolve a study of LoRA and a variant in a file, with two seeds."""
    options = CurveOptions(
        task=(str(task),),
        variants=("lora", str(variant)),
        model=str(model),
        seeds=2,
        output=output,
        gpus_per_worker=0,
    )
    return resolve_study(EXPERIMENT, options)


def test_a_worker_in_another_folder_finds_a_model_that_was_given_by_a_relative_path(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine)
    study = resolve(mine / "results", mine / "copy_task.py", mine / "scaled.py", Path("base"))
    monkeypatch.chdir("/")
    folder, _ = locate_pretrained(study.templates[0].model, study.store.bases)
    assert folder == str(mine / "base")


def requested(study: Study) -> list[Configuration]:
    """Return the configurations of a study."""
    study.look_up()
    return study.requested


def finished(configuration: Configuration) -> Record:
    """Return a record as a trainer writes it for a configuration that has finished."""
    scores = {"loss": 1.0, "exact_match": 0.5}
    evaluations = tuple(Evaluation(4, split, scores) for split in ("validation", "test"))
    return Record(configuration.fingerprint, configuration, "finished", 4, evaluations=evaluations)


def test_configurations_of_the_earlier_content_of_a_file_leave_the_study(mine: Path, run: Run) -> None:
    output, names = mine.parent / "results", (mine / "copy_task.py", mine / "scaled.py", mine / "base")
    arguments = (
        *(SWEEP, "--task", str(names[0]), "--variants", "lora", str(names[1])),
        *("--model", str(names[2]), "--seeds", "2", "--output", str(output), "--study", "s"),
    )
    for configuration in requested(resolve(output, *names)):
        Store(output / "store").put(finished(configuration))
    first = run(*arguments)
    assert "4 of 4 known" in first.stdout, first.stderr
    before = StudyFile.read(output / "s")
    names[1].write_text(VARIANT + "    numerics = 1\n")
    changed = requested(resolve(output, *names))
    for configuration in changed:
        Store(output / "store").put(finished(configuration))
    planned = run(*arguments, "--plan")
    line = "scaled.py has changed: 2 configurations of its earlier content leave the study"
    assert line in planned.stdout.replace("\n", " ")
    assert StudyFile.read(output / "s") == before, "a plan writes nothing"
    second = run(*arguments)
    assert second.returncode == 0, second.stderr
    assert line in second.stdout.replace("\n", " ")
    after = StudyFile.read(output / "s")
    assert before is not None
    assert after is not None
    assert set(after.configurations) == {c.fingerprint for c in changed} != set(before.configurations)
    assert len(after.sources) == len(before.sources) == 3
    third = run(*arguments)
    assert "has changed" not in third.stdout


def test_other_data_or_other_code_of_a_variant_makes_other_configurations(mine: Path) -> None:
    names = (mine / "copy_task.py", mine / "scaled.py", mine / "base")
    one = requested(resolve(mine / "a", *names))
    changes = {
        "copy_task.py": ('"a b")', '"a c")'),  # the data
        "words.txt": ("e f", "f e"),
        "scaled.py": ("peft = None", "peft = None\n    numerics = 1"),
    }
    for name, (old, new) in changes.items():
        text = (mine / name).read_text()
        (mine / name).write_text(text.replace(old, new))
        other = requested(resolve(mine / "a", *names))
        unequal = [a.fingerprint != b.fingerprint for a, b in zip(one, other, strict=True)]
        assert unequal == ([False, False, True, True] if name == "scaled.py" else [True] * 4)
        assert one[-1].group_key != other[-1].group_key
        (mine / name).write_text(text)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("copied letters", "letters, copied", True),
        ("learning_rates=(1e-3,)", "learning_rates=(1e-3, 1e-2)", True),
        ('"""Copy letters."""', "# Copy letters.", True),
        ("    floor = 0.0", "\n    floor = 0.0  # of a guess", True),
        ("    floor = 0.0", "\x0c\n    floor = 0.0  # of a guess", True),
        ("    floor = 0.0", "    floor = 0.5", False),
        ('output = "teacher_forced"', 'output = "generation"', False),
        (
            "    def examples",
            "    def grade(self, example, answer):\n        return 1.0\n\n    def examples",
            False,
        ),
    ],
)
def test_the_content_of_a_task_file_is_its_code_without_comments_title_and_defaults(
    old: str, new: str, same: bool
) -> None:
    assert old in TASK
    assert (hash_code(TASK, "a.py") == hash_code(TASK.replace(old, new), "b.py")) is same


@pytest.mark.parametrize("prefix", ["", "f", "rb"])
@pytest.mark.parametrize(("old", "new"), [("\n\n", "\n"), ("  \n", "\n"), ("    t", "  t"), ("+\n\n", "+\n")])
def test_blank_lines_and_spaces_in_a_string_are_content_of_a_task_file(
    prefix: str, old: str, new: str
) -> None:
    text = "one\n\n  \n    two  \n{1 +\n\n    2}\n\n"
    code = TASK.replace("    floor", f'    form = {prefix}"""{text}"""\n    floor')
    assert hash_code(code, "a.py") != hash_code(code.replace(text, text.replace(old, new)), "a.py")


def test_blank_lines_in_a_docstring_or_title_are_no_content_of_a_task_file() -> None:
    changes = {'"""Copy letters."""': '"""Copy\n\n  \nletters."""', '"copied letters"': '"""a\n\nb"""'}
    for old, new in changes.items():
        assert hash_code(TASK, "a.py") == hash_code(TASK.replace(old, new), "a.py")


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("import words", "words.py"),
        ("from words import number", "words.py"),
        ("import words.numbers as n", "words/numbers.py"),
        ("from words import numbers", "words/numbers.py"),
        ("def f():\n    import os, words", "words/__init__.py"),
    ],
)
def test_a_file_that_imports_a_module_beside_it_is_refused(mine: Path, line: str, module: str) -> None:
    """Such a module is no part of the file's content: nothing would be trained after a change of it."""
    (mine / module).parent.mkdir(exist_ok=True)
    (mine / module).write_text("number = 1\n")
    for file, load in (("copy_task.py", tasks.load), ("scaled.py", catalogue.load)):
        (mine / file).write_text(f"{line}\n{(mine / file).read_text()}")
        message = rf"{file}.* line . imports 'words.* beside .*: put its code into"
        with pytest.raises((UsageError, ValueError), match=message):
            load(str(mine / file))


def test_a_file_that_imports_a_module_of_the_working_folder_is_refused(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m orchestrator` finds modules there, wherever the file lies."""
    (mine / "work").mkdir()
    (mine / "work" / "words.py").write_text("number = 1\n")
    monkeypatch.chdir(mine / "work")
    message = r"'words\.number', which lies in the working folder"
    for file, load in (("copy_task.py", tasks.load), ("scaled.py", catalogue.load)):
        (mine / file).write_text(f"from words import number\n{(mine / file).read_text()}")
        with pytest.raises((UsageError, ValueError), match=message):
            load(str(mine / file))


def test_modules_of_this_project_and_of_packages_may_lie_beside_a_file(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine)  # `time` and `os` have no file of their own, which could lie elsewhere
    for name in ("orchestrator", "variants", "numpy"):
        (mine / name).mkdir()
        (mine / name / "__init__.py").touch()
    for name in ("json", "time", "os"):
        (mine / f"{name}.py").touch()
    (mine / "copy_task.py").write_text("import json, os, time\nimport numpy\n" + TASK)
    assert tasks.load(str(mine / "copy_task.py")).name == "copy_task.py"
    assert catalogue.load(str(mine / "scaled.py")).name == "scaled.py"


def test_a_task_file_may_have_a_byte_order_mark(mine: Path) -> None:
    file = mine / "copy_task.py"
    file.write_bytes(b"\xef\xbb\xbf" + TASK.encode())
    assert tasks.load(str(file)).content == hash_code(TASK, "a.py")


def test_a_worker_finds_the_code_in_the_store_where_the_files_are_missing(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolve(mine / "results", mine / "copy_task.py", mine / "scaled.py", mine / "base")
    template = study.templates[1]
    write_own_files(study.templates, study.store.data)
    (mine / "copy_task.py").unlink()
    (mine / "scaled.py").unlink()
    monkeypatch.setattr(tasks, "_own_tasks", {})  # a worker is another process
    monkeypatch.setattr(catalogue, "_loaded_files", {})
    found = tasks.find(template.task, study.store.data)
    assert (found.name, found.content, found.metric) == ("copy_task.py", template.task.content, "exact_match")
    variant = tasks.find_variant(template.variant, study.store.data)
    assert (variant.name, variant.revision) == ("scaled.py", template.variant.revision)
    with pytest.raises(UsageError, match=r"'copy_task\.py' with content 0{16} is not in"):
        tasks.find(replace(template.task, content="0" * 16), study.store.data)


@pytest.mark.parametrize(("option", "added"), [("task", "X = 1\n"), ("task", ""), ("variants", "X = 1\n")])
def test_two_files_of_one_name_are_refused(mine: Path, option: str, added: str) -> None:
    other = mine / "other"
    other.mkdir()
    name = {"task": "copy_task.py", "variants": "scaled.py"}[option]
    (other / "words.txt").write_text("h g f e")
    (other / name).write_text((mine / name).read_text() + added)
    files = {"task": (str(mine / "copy_task.py"),), "variants": ("lora",)}
    files[option] = (str(mine / name), str(other / name))
    options = CurveOptions(**files, model=str(mine / "base"), output=mine / "results")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--{option}: .*have the same name; rename one of them"):
        resolve_study(EXPERIMENT, options)


def test_a_copy_of_a_variants_file_is_read_where_it_was_named(mine: Path) -> None:
    other = shutil.copytree(mine, mine.parent / "elsewhere")
    for folder in (mine, other):
        assert catalogue.load(str(folder / "scaled.py")).source_path == str(folder / "scaled.py")


def test_files_of_equal_content_are_refused(mine: Path) -> None:
    shutil.copy(mine / "scaled.py", mine / "again.py")
    shutil.copy(mine / "copy_task.py", mine / "more.py")
    variants, given = ("lora", str(mine / "scaled.py")), {"model": str(mine / "base"), "output": mine / "r"}
    task = str(mine / "copy_task.py")
    for tasks_typed, variants_typed, message in (
        ((task,), (*variants, str(mine / "again.py")), "'scaled.py' and 'again.py' have the same content"),
        ((task, str(mine / "more.py")), variants, "'copy_task.py' and 'more.py' have the same content"),
    ):
        options = CurveOptions(task=tasks_typed, variants=variants_typed, **given)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            resolve_study(EXPERIMENT, options)


def test_the_code_of_the_store_is_compared_before_it_is_executed(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolve(mine / "results", mine / "copy_task.py", mine / "scaled.py", mine / "base")
    template, folder = study.templates[1], study.store.data
    write_own_files(study.templates, folder)
    monkeypatch.setattr(tasks, "_own_tasks", {})
    monkeypatch.setattr(catalogue, "_loaded_files", {})
    entry = {"path": "/x.py", "source": "raise SystemExit"}
    tasks._write_entry(folder, "task", template.task.content, entry)
    tasks._write_entry(folder, "variant", template.variant.revision, entry)
    with pytest.raises(UsageError, match=r"task 'copy_task\.py' .* holds other code"):
        tasks.find(template.task, folder)
    with pytest.raises(UsageError, match=r"variant 'scaled\.py' .* holds other code"):
        tasks.find_variant(template.variant, folder)


def test_a_variant_file_with_other_line_ends_is_found_in_the_store(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine / "scaled.py").write_bytes(VARIANT.replace("\n", "\r\n").encode())
    study = resolve(mine / "results", mine / "copy_task.py", mine / "scaled.py", mine / "base")
    choice = study.templates[1].variant
    write_own_files(study.templates, study.store.data)
    monkeypatch.setattr(catalogue, "_loaded_files", {})
    assert tasks.find_variant(choice, study.store.data).revision == choice.revision
