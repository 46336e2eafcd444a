"""Examples and token ids that are cached on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import WORDS_TASK, Script, configuration, leases, numbers_of, solo, tiny_base_model, train

from orchestrator.finetune.data import arrow_files, dataset_cache
from orchestrator.finetune.data.batches import (
    Row,
    compute_max_row_length,
    encode_examples,
)
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import SPLITS, EncodedExample, Example, Task, TaskDefaults
from orchestrator.finetune.tasks.letters import Letters, tokenizer
from orchestrator.finetune.tasks.reviews import Reviews
from orchestrator.finetune.tasks.reviews import tokenizer as reviews_tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError

LENGTH = 12
letters = st.characters(exclude_categories=["Cs"])
texts, prompts = st.text(letters, max_size=20), st.text(letters, min_size=1, max_size=20)


class GivenExamples(Task):
    """A task with given examples and one token per character."""

    name, title, floor, default_model = "given", "given", 0.0, "letters-base"

    def __init__(
        self, of: Sequence[Example], output: Any = "teacher_forced", labels: tuple[str, ...] = ()
    ) -> None:
        self.of, self.output, self.labels = list(of), output, labels  # type: ignore[misc]
        n = len(self.of)
        self.defaults = TaskDefaults(n, n, n, 1, 1, LENGTH, 1, (1e-3,))  # type: ignore[misc]

    def examples(self, split: Any, count: int) -> list[Example]:
        return self.of[:count]

    def encode(self, example: Example, tokenizer: Any) -> EncodedExample:
        prompt = tuple(ord(c) for c in example.prompt + (example.pair or ""))
        if self.has_head:
            ids = (2, *prompt, 3)
            return EncodedExample(ids, (-100,) * len(ids), len(ids))
        answer = (*(ord(c) for c in example.answer), 1)
        return EncodedExample((*prompt, *answer), (*[-100] * len(prompt), *answer), len(prompt))

    def encode_truncated(self, example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
        ids = self.encode(example, tokenizer).ids
        ids = (*ids[: max_length - 1], ids[-1])
        return EncodedExample(ids, (-100,) * len(ids), len(ids))


def configuration_of(task: Task, length: int = LENGTH) -> Configuration:
    one = configuration(max_length=length)
    return replace(one, task=task.choice())


def encode_in_memory(task: Task, split: str, words: Any, length: int = LENGTH) -> list[Row]:
    """Tokenize a split without the cache."""
    cut = length if split == "train" else compute_max_row_length(task, length) if task.has_head else None
    return encode_examples(task.load(task.choice())[split], task, words, cut)  # type: ignore[index]


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    kind = draw(st.sampled_from(["teacher_forced", "classification", "regression"]))
    answers = {
        "teacher_forced": texts,
        "classification": st.sampled_from("ab"),
        "regression": st.floats(-9, 9).map(str),
    }[kind]
    # The first example keeps its answer, since a task without targets is refused.
    found = draw(st.lists(st.builds(Example, prompts, answers, st.none() | texts), max_size=12))
    answer = {"teacher_forced": "y", "classification": "a", "regression": "1"}[kind]
    return GivenExamples([Example("x", answer), *found], kind, ("a", "b"))


FEWER = settings.default.max_examples // 5  # type: ignore[union-attr]
"""Fewer Hypothesis examples than usual, because each of them writes and syncs six files."""


@settings(max_examples=FEWER)
@given(tasks(), st.integers(1, 5))
def test_cached_values_equal_those_that_were_stored(task: Task, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.object(arrow_files, "RECORD_BATCH_ROWS", chunk):
        one = configuration_of(task)
        made = dataset_cache.prepare_dataset(Path(folder), one, task, tokenizer())
        with patch.object(type(task), "examples", side_effect=AssertionError("the task was read again")):
            again = dataset_cache.prepare_dataset(Path(folder), one, task, tokenizer())
    for dataset in (made, again):
        for split in SPLITS:
            assert list(dataset.examples[split]) == task.load(task.choice())[split]
            rows = dataset.rows[split]
            assert list(rows) == encode_in_memory(task, split, tokenizer())
            assert [type(x) for r in rows for x in r.targets] == [
                float if task.output == "regression" else int for r in rows for _ in r.targets
            ]
            assert rows[-1] == list(rows)[-1]
            assert list(rows[1:3]) == list(rows)[1:3]


@pytest.mark.parametrize("number", [0, 1])
def test_tokenizing_many_texts_equals_tokenizing_each(number: int) -> None:
    task, words = ((Letters(), tokenizer()), (Reviews(), reviews_tokenizer()))[number]
    examples = task.examples("train", 300)
    if task.has_head:
        examples[7:9] = [replace(e, pair="the soup was bad") for e in examples[7:9]]
    expected = []
    for e in examples:  # the expected result, computed for one text at a time
        if task.has_head:
            ids = tuple(words(e.prompt, e.pair)["input_ids"])
            expected.append(EncodedExample(ids, (-100,) * len(ids), len(ids)))
        else:
            prompt = words(e.prompt, add_special_tokens=False)["input_ids"]
            answer = [*words(e.answer, add_special_tokens=False)["input_ids"], words.eos_token_id]
            expected.append(EncodedExample((*prompt, *answer), (*[-100] * len(prompt), *answer), len(prompt)))
    assert task.encode_all(examples, words) == expected
    assert [task.encode(e, words) for e in examples] == expected
    assert task.encode_all([], words) == []


# -- files ---------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_equal_keys_share_a_file_and_other_keys_have_their_own(tmp_path: Path) -> None:
    task, words = Letters(), tokenizer()
    one = configuration()
    dataset_cache.prepare_dataset(tmp_path, one, task, words)
    first = {path: path.stat().st_mtime_ns for path in files_in(tmp_path)}
    assert len(first) == 6, "examples and rows of three splits"
    dataset_cache.prepare_dataset(tmp_path, one, Letters(), tokenizer())
    assert {path: path.stat().st_mtime_ns for path in files_in(tmp_path)} == first
    shorter = replace(one, batches=replace(one.batches, max_length=10))
    dataset_cache.prepare_dataset(tmp_path, shorter, task, words)
    assert len(files_in(tmp_path)) == 7, "only the training rows are truncated"
    words.add_tokens(["zz"])
    dataset_cache.prepare_dataset(tmp_path, one, task, words)
    assert len(files_in(tmp_path)) == 10, "another tokenizer has its own rows, but not its own examples"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "another"])
def test_a_cut_or_wrong_file_is_made_again(tmp_path: Path, damage: str) -> None:
    task, words, one = Letters(), tokenizer(), configuration()
    expected = [
        list(dataset_cache.prepare_dataset(tmp_path, one, task, words).rows[split]) for split in SPLITS
    ]
    paths = files_in(tmp_path)
    for path in paths:
        data = path.read_bytes()
        other = next(p for p in paths if p.suffixes == path.suffixes and p != path).read_bytes()
        path.unlink()  # overwriting would change the old file, which is still mapped
        path.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "another": other}[damage]
        )
    read: list[str] = []
    for _ in range(2):
        again = dataset_cache.prepare_dataset(tmp_path, one, task, words, read.append)
        assert [list(again.rows[split]) for split in SPLITS] == expected
    assert read == ["letters: reading the examples"], "once: the files are then whole"


def test_data_of_another_revision_are_refused_and_not_stored(tmp_path: Path) -> None:
    one = configuration()
    stale = replace(one, task=replace(one.task, revision="0" * 16))
    with pytest.raises(UsageError, match="data 0000000000000000"):
        dataset_cache.prepare_dataset(tmp_path, stale, Letters(), tokenizer())
    assert files_in(tmp_path) == []


# -- workers -------------------------------------------------------------------------------------------------


def test_a_worker_needs_neither_source_nor_hub_for_cached_data(tmp_path: Path) -> None:
    one = configuration(task=WORDS_TASK)
    expected = numbers_of(solo(one, tmp_path / "before"))
    store, task = Store(tmp_path / "store"), catalogue.get(WORDS_TASK)
    dataset_cache.prepare_dataset(store.data, one, task, tiny_base_model(one.model).tokenizer)
    with patch.object(type(task), "examples", side_effect=AssertionError("the task was read again")):
        train(Script(leases([one])), store)
    record = store.get(one.fingerprint)
    assert record is not None
    assert numbers_of(record) == expected
