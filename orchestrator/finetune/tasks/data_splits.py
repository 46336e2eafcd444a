"""The examples of a user's data, kept on disk, and their splits: those that the data name, others by a hash.

The texts of a million rows stay in temporary files, which are mapped into memory. Three numbers for each row,
kept in memory, decide its split and its place there.
"""

from __future__ import annotations

import json
import math
import mmap
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS, SPLITS, Example, Image, Split, hash_text
from orchestrator.util.errors import UsageError

MIN_ROWS = 20
"""The smallest number of rows from which splits are made."""
SMALL_DATA, SMALL_DATA_BUCKETS, BUCKETS = 5_000, 5, 10
"""A held-out split that is made gets a fifth of the rows if there are fewer than SMALL_DATA, else a tenth."""
BLOCK_SIZE = 1_024
"""The number of examples that are built at once."""

_UNUSED = len(SPLITS)
"""The number of the split of examples that are in none."""
_TEXTS = ("where", "prompt", "answer", "pair")


class TextColumn:
    """Texts that are written one after another to a temporary file, and then mapped into memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `to_arrow`
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        """Add a text."""
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def truncate(self, length: int) -> None:
        """Remove all texts but the first ones."""
        del self._ends[length + 1 :]
        self._file.seek(self._ends[-1])
        self._file.truncate()

    def to_arrow(self) -> Any:
        """Return the texts as a `pyarrow.LargeStringArray`.

        It is one chunk: `take` copies its rows only.
        """
        import pyarrow as pa

        size = self._ends[-1]
        with self._file as file:
            file.flush()
            texts = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        return pa.LargeStringArray.from_buffers(
            len(self._ends) - 1, pa.py_buffer(self._ends), pa.py_buffer(texts)
        )


class ExampleFile:
    """All examples of a user's data in the order of the rows, first written, then read.

    Either all examples have an image or none has; the same holds for the second text of a pair.
    """

    def __init__(self) -> None:
        self._texts = {name: TextColumn() for name in _TEXTS}
        self._numbers = array("Q")
        self._splits = array("b")
        self.images: list[Image] = []
        self.has_pairs = False

    def __len__(self) -> int:
        return len(self._splits)

    def append(self, where: str, split: Split | None, example: Example) -> None:
        """Add an example.

        Args:
            where: The file and the row of the example, for error messages.
            split: The split that the data name for the example; None if they name none.
            example: The example.
        """
        texts = (where, example.prompt, example.answer, example.pair or "")
        for column, text in zip(self._texts.values(), texts, strict=True):
            column.append(text)
        # The content of the input decides the split: rows with equal inputs are in the same one.
        key = example.image.digest if example.image else json.dumps([example.prompt, example.pair])
        # The order has a salt, since the hash of the key alone selects the split.
        order = hash_text(f"order/{key}/{example.answer}")
        numbers = (hash_text(key)[:8], order[:8], order[8:16])
        self._numbers.extend(int.from_bytes(each, "big") for each in numbers)
        self._splits.append(-1 if split is None else SPLITS.index(split))
        self.has_pairs = example.pair is not None
        if example.image is not None:
            self.images.append(example.image)

    def truncate(self, length: int) -> None:
        """Remove all examples but the first ones."""
        for column in self._texts.values():
            column.truncate(length)
        del self._numbers[3 * length :], self._splits[length:], self.images[length:]

    def named_splits(self, start: int = 0) -> list[Split]:
        """Return the splits that the data name for the examples from `start` on."""
        return [split for number, split in enumerate(SPLITS) if number in self._splits[start:]]

    def keep_split(self, start: int, split: Split) -> None:
        """Assign the examples from `start` on to a split.

        If the data name this split for some of them, the others belong to no split.
        """
        number = SPLITS.index(split)
        named = self._splits[start:]
        kept = (number,) if number in named else (-1, *range(len(SPLITS)))
        self._splits[start:] = array("b", [number if each in kept else _UNUSED for each in named])

    def finish(self) -> None:
        """Make the examples readable; none can be added any more."""
        self.columns = {name: column.to_arrow() for name, column in self._texts.items()}
        self.inputs, *order = np.array(self._numbers).reshape(-1, 3).T
        self.order = np.array(order)
        """Two numbers for each example, by which it is sorted: a hash of its input and its answer."""
        self.split_numbers = np.array(self._splits)
        """The index in SPLITS that the data name for each example, -1 if they name none; or _UNUSED."""
        del self._texts, self._numbers, self._splits


class Examples(Sequence[Example]):
    """Some examples of a file, each built on access.

    Args:
        file: The file of all examples.
        rows: The number of each of these examples in the file.
    """

    def __init__(self, file: ExampleFile, rows: np.ndarray[Any, Any]) -> None:
        self.file, self.rows = file, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.file, self.rows[index])
        return next(iter(Examples(self.file, self.rows[[index]])))

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), BLOCK_SIZE):
            block = self[start : start + BLOCK_SIZE]
            texts = (block.texts(name).to_pylist() for name in ("prompt", "answer", "pair"))
            for row, prompt, answer, pair in zip(block.rows, *texts, strict=True):
                image = self.file.images[row] if self.file.images else None
                yield Example(prompt, answer, pair if self.file.has_pairs else None, image=image)

    def where(self, index: int) -> str:
        """Return the file and the row of an example."""
        return str(self.file.columns["where"][int(self.rows[index])])

    def texts(self, name: str) -> Any:
        """Return a column of these examples ("answer", for instance) as a `pyarrow` array."""
        return self.file.columns[name].take(self.rows)

    def num_bytes(self, name: str) -> np.ndarray[Any, Any]:
        """Return the length in bytes of each text in a column."""
        from pyarrow import compute

        return compute.binary_length(self.file.columns[name]).to_numpy()[self.rows]


def make_splits(file: ExampleFile, name: str) -> dict[Split, Examples]:
    """Return the examples of each split, in the order of a hash of their content.

    A row without a split belongs to the training data. A held-out split that no row names is made of
    training rows: a hash of its input decides where a row belongs, so rows with equal inputs share a split,
    whatever their order. A row keeps its split when rows are added, until there are SMALL_DATA of them.

    Args:
        file: The examples with the splits that the data name.
        name: The name of the data, for error messages.

    Raises:
        UsageError: A split is empty, or there are too few rows to make one.
    """
    numbers = np.maximum(file.split_numbers, 0)
    missing = [SPLITS.index(split) for split in HELD_OUT_SPLITS if not (numbers == SPLITS.index(split)).any()]
    pool = np.flatnonzero(numbers == 0)
    if missing and 0 < len(pool) < MIN_ROWS:
        made = " and ".join(SPLITS[number] for number in missing)
        raise UsageError(
            f"{name} has {len(pool)} rows; must be {MIN_ROWS} or more, of which {made} get a part "
            "(--validation-data and --test-data give others)."
        )
    buckets = file.inputs[pool] % (SMALL_DATA_BUCKETS if len(pool) < SMALL_DATA else BUCKETS)
    for bucket, number in enumerate(missing):
        numbers[pool[buckets == bucket]] = number
    ordered = np.lexsort(file.order[::-1])
    splits = {split: Examples(file, ordered[numbers[ordered] == n]) for n, split in enumerate(SPLITS)}
    for split, members in splits.items():
        if not members:
            num_inputs = len(np.unique(file.inputs[pool]))
            how = f"a hash puts none of the {num_inputs} different inputs of {len(pool)} rows there"
            if split == "train" and not len(pool):
                how = "no row names it"
            raise UsageError(f"{name}: the {split} split is empty: {how}; add rows, or name their splits.")
    return splits


def count_answers(*examples: Examples) -> Counter[str]:
    """Return how many of the examples have each answer."""
    counts: Counter[str] = Counter()
    for own in examples:
        values, numbers = own.texts("answer").value_counts().flatten()
        counts.update(dict(zip(values.to_pylist(), numbers.to_pylist(), strict=True)))
    return counts


def count_contradictions(splits: Mapping[Split, Examples]) -> int:
    """Return the number of rows whose input occurs in another row with a different answer."""
    rows = np.concatenate([own.rows for own in splits.values()])
    file = splits["train"].file
    answers = file.columns["answer"].take(rows).dictionary_encode().indices.to_numpy()
    order = np.argsort(file.inputs[rows])
    inputs, answers = file.inputs[rows][order], answers[order]
    _, starts, sizes = np.unique(inputs, return_index=True, return_counts=True)
    differ = np.minimum.reduceat(answers, starts) != np.maximum.reduceat(answers, starts)
    return int(sizes[differ].sum())


def find_labels(splits: Mapping[Split, Examples], name: str) -> tuple[str, ...]:
    """Return the classes, numbers in their order and texts in alphabetical order.

    Args:
        splits: The examples of each split.
        name: The name of the data, for error messages.

    Raises:
        UsageError: There is a single class, the labels look like numbers to predict, or a class occurs in
            one split only.
    """
    counts = {split: count_answers(splits[split]) for split in SPLITS}
    total = sum(counts.values(), Counter())
    labels = sorted(total, key=_label_order)
    if len(labels) == 1:
        raise UsageError(
            f"{name}: all {total[labels[0]]} rows have the label {labels[0]!r}; must be two or more."
        )
    if all(_is_number(label) for label in labels) and not all(float(label).is_integer() for label in labels):
        raise UsageError(
            f"{name}: the labels are {len(labels)} numbers such as {labels[0]}; for a number to predict add "
            "--metric pearson."
        )
    if len(labels) > total.total() / 2:
        example = labels[0] if len(labels[0]) <= 40 else f"{labels[0][:37]}..."
        raise UsageError(
            f"{name}: {len(labels)} different labels in {total.total()} rows, such as {example!r}, are too "
            "many for classes; name other --columns, prompt and completion for texts to generate."
        )
    for label in labels:
        having = [split for split in SPLITS if counts[split][label]]
        if len(having) == 1 or "train" not in having:
            examples = splits[having[0]]
            where = next(examples.where(n) for n, example in enumerate(examples) if example.answer == label)
            raise UsageError(
                f"{where}: the label {label!r} occurs in {' and '.join(having)} only ({total[label]} of "
                f"{total.total()} rows); take its rows out, add more, or give it the name of another class."
            )
    return tuple(labels)


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _label_order(label: str) -> tuple[float, str]:
    return (float(label) if _is_number(label) else float("inf"), label)
