"""Examples and token ids that are cached on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc
from scripted import WORDS_TASK, Script, configuration, leases, numbers_of, solo, tiny_base_model, train
from splits import tokenized_split

from orchestrator.finetune.data import arrow_files, dataset_cache
from orchestrator.finetune.data.arrow_rows import ArrowSequence
from orchestrator.finetune.data.batches import (
    Row,
    compute_max_row_length,
    encode_examples,
    make_training_batch,
)
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import SPLITS, EncodedExample, Example, Task, TaskDefaults
from orchestrator.finetune.tasks.local.letters import Letters, tokenizer
from orchestrator.finetune.tasks.local.reviews import Reviews
from orchestrator.finetune.tasks.local.reviews import tokenizer as reviews_tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
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


@settings(max_examples=FEWER)
@given(tasks(), st.integers(0, 2**20), st.integers(0, 50), st.integers(1, 16), st.integers(1, 4))
def test_every_worker_draws_the_same_batch_from_the_cache(
    task: Task, seed: int, start: int, count: int, workers: int
) -> None:
    """Each worker reads the cache by itself and also draws batches for other lanes."""
    words = tokenizer()
    rows = encode_in_memory(task, "train", words)
    max_row_length = compute_max_row_length(task, LENGTH)
    whole = make_training_batch(rows, seed, start, count, max_row_length, 0)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(workers):
            dataset = dataset_cache.prepare_dataset(Path(folder), configuration_of(task), task, words)
            own = dataset.rows["train"]
            make_training_batch(own, seed + 1, 0, 3, max_row_length, 0)  # for another lane
            drawn = make_training_batch(own, seed, start, count, max_row_length, 0)
            for name in ("ids", "targets", "lengths"):
                one, other = getattr(whole, name), getattr(drawn, name)
                assert torch.equal(one, other)
                assert one.dtype == other.dtype


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


def test_a_tasks_own_encode_is_called_for_each_example() -> None:
    task = GivenExamples([Example("ab", "c")])
    assert task.encode_all(task.of, None) == [task.encode(task.of[0], None)]


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
    assert not dataset_cache.has_examples(tmp_path, one.task, task)
    again = dataset_cache.prepare_dataset(tmp_path, one, task, words)
    assert [list(again.rows[split]) for split in SPLITS] == expected
    assert dataset_cache.has_examples(tmp_path, one.task, task)


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """For a bit flip in every seventh byte in turn, the file is refused or its values are unchanged."""
    task, words = Letters(), tokenizer()
    one = configuration()
    one = replace(one, task=replace(one.task, train_size=16))
    dataset_cache.prepare_dataset(tmp_path, one, task, words)
    for kind in ("examples", "rows"):
        path = next(tmp_path.glob(f"*.{kind}.arrow"))
        whole = path.read_bytes()
        schema = ipc.open_file(whole).schema
        right = ipc.open_file(whole).read_all().to_pydict()
        damaged, noticed = tmp_path / "damaged", 0
        for place in range(0, len(whole), 7):
            damaged.unlink(missing_ok=True)  # overwriting would change the old file, which is still mapped
            flipped = bytes([whole[place] ^ 1 << place % 8])
            damaged.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            found = arrow_files.read_verified_table(damaged, schema)
            noticed += found is None
            assert found is None or found.to_pydict() == right, (kind, place)
        assert noticed > 0.5 * len(range(0, len(whole), 7))


def test_data_of_another_revision_are_refused_and_not_stored(tmp_path: Path) -> None:
    one = configuration()
    stale = replace(one, task=replace(one.task, revision="0" * 16))
    with pytest.raises(UsageError, match="data 0000000000000000"):
        dataset_cache.prepare_dataset(tmp_path, stale, Letters(), tokenizer())
    assert files_in(tmp_path) == []


def test_an_example_that_is_not_text_is_named(tmp_path: Path) -> None:
    task = GivenExamples([Example("a", "b"), Example("a", 5), Example("a", "b")])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'given': train example 1 cannot be stored: .*int") as caught:
        dataset_cache.prepare_dataset(tmp_path, configuration_of(task), task, tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts_in", "message"),
    [
        ("metric", "no validation example counts in the loss"),
        ("loss", "no validation example counts in the metric"),
    ],
)
def test_a_split_without_loss_or_metric_is_one_line(tmp_path: Path, counts_in: Any, message: str) -> None:
    task = GivenExamples([Example("a", "b", counts_in=counts_in)], "generation")
    with pytest.raises(UsageError, match=message):
        dataset_cache.prepare_dataset(tmp_path, configuration_of(task), task, tokenizer())


class Counting(GivenExamples):
    """A task that counts the tokenized examples, and calls `first` before it tokenizes the first example."""

    def __init__(self, first: Callable[[], object]) -> None:
        super().__init__([Example("ab", "c")] * 5)
        self.encoded_count, self.first = 0, first

    def encode(self, example: Example, tokenizer: Any) -> EncodedExample:
        self.encoded_count += 1
        if self.encoded_count == 1:
            self.first()
        return super().encode(example, tokenizer)


def test_of_two_processes_with_one_key_one_tokenizes(tmp_path: Path) -> None:
    begun, wanted = Event(), Event()

    def wait() -> None:
        begun.set()
        assert wanted.wait(120)

    tasks = [Counting(wait), Counting(lambda: None)]

    def work(task: Counting) -> dataset_cache.PreparedDataset:
        if task is tasks[1]:
            assert begun.wait(120)
            wanted.set()
        return dataset_cache.prepare_dataset(tmp_path, configuration_of(task), task, tokenizer())

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(work, tasks)
    assert sum(task.encoded_count for task in tasks) == 3 * 5, "every example of the three splits once"
    assert tasks[1].encoded_count < 3 * 5
    assert all(list(one.rows[split]) == list(other.rows[split]) for split in SPLITS)


def test_a_long_tokenization_reports_its_progress(tmp_path: Path) -> None:
    lines: list[str] = []
    with (
        patch.object(timeouts, "PROGRESS_INTERVAL_SECONDS", 0.0),
        patch("orchestrator.finetune.data.batches.TOKENIZER_BATCH_SIZE", 20),
    ):
        dataset_cache.prepare_dataset(tmp_path, configuration(), Letters(), tokenizer(), lines.append)
    assert lines[0] == "letters: reading the examples"
    assert lines[1:] == [
        *(f"letters: {n} of 64 train examples tokenized" for n in (20, 40, 60, 64)),
        "letters: 16 of 16 validation examples tokenized",
        "letters: 16 of 16 test examples tokenized",
    ]


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


def test_a_revision_is_computed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    task = GivenExamples([Example("a", "b")])
    with patch.object(task, "examples", wraps=task.examples) as examples:
        assert task.revision() == task.revision() == task.choice().revision
        assert examples.call_count == 3, "each split once"
        before = task.revision()
        monkeypatch.setenv("ORCHESTRATOR_DATA", "/elsewhere")
        assert task.revision() == before
        assert examples.call_count == 6, "another folder may hold other data"
    task.of = [Example("a", "c")]
    with pytest.raises(UsageError, match="this machine makes"):
        task.load(task.choice())


def anonymous_memory() -> int:
    """Return the memory of this process that is not mapped from files, in bytes."""
    (line,) = [li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def test_two_hundred_thousand_rows_take_a_worker_little_memory(tmp_path: Path) -> None:
    """Pages of the file belong to the page cache, so only the anonymous memory is measured."""
    about = {"task": "many", "split": "train"}
    ids = list(range(1000, 1061))
    row = {"ids": ids[:-1], "targets": ids[1:], "prompt": ids[:30], "second": None}
    file = arrow_files.ArrowFile(
        tmp_path, "rows", about, dataset_cache.ROW_COLUMNS, partial(ArrowSequence, factory=Row)
    )
    file.read_or_create(lambda: (row for _ in range(200_000)))
    before = anonymous_memory()
    rows = file.read()
    assert rows is not None
    for number in range(100):
        make_training_batch(rows, 0, 16 * number, 16, 64, 0)
    grown = anonymous_memory() - before
    assert len(rows) == 200_000
    assert sum(path.stat().st_size for path in files_in(tmp_path)) > 100e6
    assert grown < 15e6, "as tuples they take 300 MB and more"


def test_a_cached_split_is_evaluated_like_one_in_memory(tmp_path: Path) -> None:
    task, words, one = Letters(), tokenizer(), configuration()
    dataset = dataset_cache.prepare_dataset(tmp_path, one, task, words)
    max_row_length = compute_max_row_length(task, one.batches.max_length)
    cached = EvaluationSplit(
        dataset.examples["test"], dataset.rows["test"], max_row_length, words.pad_token_id
    )
    in_memory = tokenized_split(task.load(one.task)["test"], task, words, max_row_length)
    assert cached.batch_plan == in_memory.batch_plan
    assert [x.tolist() for x in cached.flat_targets] == [x.tolist() for x in in_memory.flat_targets]
    for a, b in zip(cached.batches, in_memory.batches, strict=True):
        assert torch.equal(a.ids, b.ids)
    assert astuple(cached.examples[3]) == astuple(in_memory.examples[3])
