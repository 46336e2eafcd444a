"""Exports that are not possible: one line with exit code 2, before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import Ended
from trained_study import STUDY, Trained, changed

from orchestrator.record.study_file import StudyFile

Export = Callable[..., Ended]

pytestmark = pytest.mark.xdist_group("export")  # the tests of a group share the trained study

REFUSED = {
    "unknown task": (["--task", "leters"], ["--task 'leters'", "Did you mean 'letters'"]),
    "unknown fingerprint": (["{unknown}"], ["no record", "begins with it"]),
    "another study's": (["{other}"], ["not a lane of study 'rates'", "it belongs to second"]),
    "no study's": (["{orphan}"], ["not a lane of study 'rates'", "no study under"]),
    "diverged": (["{diverged}"], ["diverged after 3 steps", "orchestrator export rates --output {output}"]),
    "not trained": (["{pending}"], ["not trained yet"]),
    "variant and fingerprint": (["{lora}", "--variant", "lora"], ["names one lane", "--variant"]),
    "a folder that exists": (["--to", "{output}"], ["is not this export", "name a new folder"]),
    "not mergeable": (
        ["--variant", "hydra_lora", "--merge"],
        ["cannot be merged", "gates", "without --merge its exact tensors are written"],
    ),
    "older variant": (["{older}"], ["numerics 0 of its variant"]),
}


@pytest.fixture
def words(trained: Trained, tmp_path: Path) -> dict[str, str]:
    """Add lanes that cannot be exported to the study, and return what the words in REFUSED stand for."""
    store, lora = trained.store, trained.record("lora", 0)
    own = lora.configuration
    other, orphan, diverged = (changed(lora, seed=seed) for seed in (7, 8, 9))
    diverged = replace(diverged, state="diverged", steps=3)
    older = changed(lora, seed=12, variant=replace(own.variant, numerics=0))
    for record in (other, orphan, diverged, older):
        store.put(record)
    pending = replace(own, seed=13).fingerprint
    lanes = [each.fingerprint for each in (diverged, older)] + [pending]
    study = StudyFile.read(trained.output / STUDY)
    assert study is not None
    study.with_configurations(lanes, ()).write(trained.output / STUDY)
    StudyFile("second", "", "", (other.fingerprint,)).write(trained.output / "second")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(trained.output)
    named = {"other": other, "orphan": orphan, "diverged": diverged, "older": older}
    used = store.states()
    unknown = next(f"{n:03x}" for n in range(16**3) if not any(f.startswith(f"{n:03x}") for f in used))
    return {
        **{name: record.fingerprint[:16] for name, record in named.items()},
        "lora": lora.fingerprint,
        "unknown": unknown,
        "pending": pending,
        "output": str(trained.output),
        "file": str(tmp_path / "file"),
        "link": str(tmp_path / "link"),
        "long": str(tmp_path / ("n" * 300)),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_an_export_that_is_not_possible_is_refused(case: str, export: Export, words: dict[str, str]) -> None:
    arguments, expected = REFUSED[case]
    refused = export(*(argument.format(**words) for argument in arguments))
    refused.assert_refused(*(word.format(**words) for word in expected))


def test_an_ambiguous_fingerprint_is_refused(export: Export, trained: Trained) -> None:
    first = trained.record("lora").fingerprint[0]
    seeds = (replace(trained.record("lora").configuration, seed=seed) for seed in range(1000))
    alike = next(each for each in seeds if each.fingerprint[0] == first and each.seed)
    trained.store.put(changed(trained.record("lora"), seed=alike.seed))
    study = StudyFile.read(trained.output / STUDY)
    assert study is not None
    study.with_configurations([alike.fingerprint], ()).write(trained.output / STUDY)
    export(first).assert_refused("give more digits")


def test_a_study_of_several_tasks_needs_one(export: Export, trained: Trained) -> None:
    lora = trained.record("lora")
    another = changed(lora, task=replace(lora.configuration.task, name="digits"))
    trained.store.put(another)
    study = StudyFile.read(trained.output / STUDY)
    assert study is not None
    study.with_configurations([another.fingerprint], ()).write(trained.output / STUDY)
    export().assert_refused("has 2 tasks", "add --task with one of digits, letters")


@pytest.mark.parametrize("damage", ["missing base", "other base", "bit", "cut"])
def test_damaged_files_are_named(export: Export, trained: Trained, damage: str) -> None:
    (base,) = trained.store.bases.glob("letters-base-*/")
    adapter = trained.adapter("lora")
    if damage == "missing base":
        shutil.rmtree(base)
    elif damage == "other base":
        (base / "vocab.txt").write_text("another file")
    else:
        data = bytearray(adapter.read_bytes())
        data[-1] ^= 1
        adapter.write_bytes(data if damage == "bit" else data[:-8])
    done = export("--variant", "lora")
    done.assert_refused(*([str(base)] if "base" in damage else [str(adapter), "remove the file"]))
    assert not (trained.output / STUDY / "export").exists()
