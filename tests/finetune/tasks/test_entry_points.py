"""A task that an installed package registers as an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.tasks import ENTRY_POINT_GROUP, catalogue
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

CODE = """
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults


class Doubling(Task):
    title = "numbers, doubled"
    floor = 0.0
    default_model = "letters-base"
    max_new_tokens = 6
    defaults = TaskDefaults(
        train_size=16, validation_size=8, test_size=8, steps=4, batch_size=8, max_length=32,
        evaluations=2, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        first = {"train": 0, "validation": 100, "test": 200}[split]
        return [Example(f"{n} + {n} =", f" {2 * n}") for n in range(first, first + count)]


class NeedsArgument(Doubling):
    def __init__(self, argument):
        pass
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of installed packages, one of which registers tasks, as pip writes it."""
    folder = tmp_path / "site"
    info = folder / "doubling_package-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "doubling_package.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling-package\nVersion: 1.0\n")
    targets = {
        "doubling": "doubling_package:Doubling",
        "missing": "doubling_package:Missing",
        "argument": "doubling_package:NeedsArgument",
        "function": "json:loads",
    }
    lines = "".join(f"{name} = {target}\n" for name, target in targets.items())
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{lines}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(catalogue, "_own_tasks", {})
    catalogue.entry_points_by_name.cache_clear()
    yield folder
    monkeypatch.undo()
    catalogue.entry_points_by_name.cache_clear()


def test_a_package_registers_a_task_that_is_known_by_its_code(site: Path, tmp_path: Path) -> None:
    options = StudyOptions(task=("doubling",), variants=("lora",))
    resolved = resolve_options(options, "doubling", tmp_path)
    (template,) = build_configuration_templates(options, resolved, UNPREPARED, tmp_path)
    task = catalogue.get("doubling")
    assert (template.task.name, template.task.content) == ("doubling", task.content)
    assert len(task.content) == 16
    assert task.title == "numbers, doubled"
    catalogue.write_entry(task, tmp_path)
    assert list(tmp_path.iterdir()) == [site], "the package is installed on every node"
    assert catalogue.find(template.task, tmp_path) is task
    with pytest.raises(UsageError, match="has other code here than where the study was started"):
        catalogue.find(replace(template.task, content="0" * 16), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "'doubling_package:Missing' cannot be loaded: AttributeError"),
        ("argument", "'doubling_package:NeedsArgument' cannot be loaded: TypeError"),
        ("function", r"'function' \(json:loads\) is no subclass of Task"),
        ("doublin", "Did you mean 'doubling'"),
    ],
)
def test_a_broken_entry_point_gives_one_line(site: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        catalogue.load(name)
    assert "\n" not in str(raised.value)
