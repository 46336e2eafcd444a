"""Examples of a task as texts, images and token ids, and the splits that they belong to."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from orchestrator.util.errors import UsageError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")

CountsIn = Literal["both", "loss", "metric"]
IGNORE_INDEX = -100
"""The label of a position that carries no loss (`ignore_index` in PyTorch)."""


@dataclass(frozen=True, eq=False)
class Image:
    """An image file (PNG, JPEG, PGM, ...) that is read when it is needed.

    A task of fifty thousand images keeps none of them in memory.

    Args:
        name: The image's name in error messages.
        read: Returns the bytes of the file.
    """

    name: str
    read: Callable[[], bytes]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) of the file."""
        return hashlib.sha256(self.read()).hexdigest()

    def decode(self, min_side: int | None = None) -> Any:
        """Return the decoded image, a `PIL.Image.Image` in the colors of the file.

        Args:
            min_side: If given, a JPEG may be decoded at a smaller scale, with sides of at least so many
                pixels. That saves time.

        Raises:
            UsageError: Pillow cannot read the file.
        """
        import PIL.Image

        try:
            opened = PIL.Image.open(io.BytesIO(self.read()))
            if min_side is not None:
                opened.draft("RGB", (min_side, min_side))
            opened.load()
            return opened
        except PIL.UnidentifiedImageError:  # its message contains an address in memory
            raise UsageError(f"{self.name} is not an image that Pillow can read: unknown format.") from None
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            # Pillow's exceptions for damaged images, and for an image with too many pixels.
            raise UsageError(f"{self.name} is not an image that Pillow can read: {error}.") from None


@dataclass(frozen=True)
class Example:
    """One item of a task.

    Args:
        prompt: The text that the model reads; empty for a task of images.
        answer: The expected output: the text that follows the prompt, or for a task with a head the name of a
            class or a number.
        pair: The second text, for a task about two texts.
        reference: Data for `Task.grade` beyond `answer`; the model is not trained on them.
        counts_in: Whether an example of a held-out split counts in the loss, in the metric, or in both.
        image: The image, for a task of images.
    """

    prompt: str
    answer: str
    pair: str | None = None
    reference: str | None = None
    counts_in: CountsIn = "both"
    image: Image | None = None


@dataclass(frozen=True)
class EncodedExample:
    """The token ids of an example.

    Args:
        ids: The token ids.
        labels: A label per token: its id, or IGNORE_INDEX. They are not shifted yet (see `data/batches.py`).
        prompt_length: The number of ids of the prompt, after which generation starts.
        second_segment_start: The index of the first token of a pair's second text, if the tokenizer gives its
            tokens the type 1; None if it does not.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_length: int
    second_segment_start: int | None = None


def check_examples(examples: Sequence[object], count: int, task: str, split: Split) -> list[Example]:
    """Return the first `count` examples after checking them: a user's own task may return anything.

    Args:
        examples: What a task returned for a split.
        count: The number of examples that are needed.
        task: The name of the task, for error messages.
        split: The split that the examples belong to.

    Raises:
        UsageError: There are fewer than `count`, an item is no `Example`, or an example has an unknown
            `counts_in`.
    """
    checked = []
    for number, example in enumerate(examples):
        if not isinstance(example, Example):
            kind = type(example).__name__
            raise UsageError(f"Task {task!r}: {split} example {number} is a {kind}; must be an Example.")
        if example.counts_in not in get_args(CountsIn):
            raise UsageError(
                f"Task {task!r}: {split} example {number} has counts_in {example.counts_in!r}; "
                f"must be one of {', '.join(get_args(CountsIn))}."
            )
        checked.append(example)
    check_count(checked, count, task, split)
    return checked[:count]


def check_count(examples: Sequence[object], count: int, task: str, split: Split) -> None:
    """Raise a UsageError if a split has fewer than `count` examples."""
    if len(examples) < count:
        raise UsageError(f"Task {task!r} has {len(examples)} {split} examples, {count} are needed.")


def hash_text(text: str) -> bytes:
    """Return the SHA-256 of a text: a key for shuffling that depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()


def hash_split(key: str, held_out_splits: Sequence[Split] = HELD_OUT_SPLITS, num_buckets: int = 5) -> Split:
    """Return the split that an item belongs to, by a hash of its key.

    Splits that are filled in this way are disjoint at any size, and a split does not change when another one
    grows.

    Args:
        key: The identity of the item: equal items have equal keys.
        held_out_splits: The held-out splits; each gets one of `num_buckets` equal parts, train gets the rest.
        num_buckets: The number of parts.
    """
    bucket = int.from_bytes(hash_text(key)[:8], "big") % num_buckets
    return held_out_splits[bucket] if bucket < len(held_out_splits) else "train"


def split_by_key(keyed_examples: Iterable[tuple[str, Example]]) -> dict[Split, list[Example]]:
    """Return the examples of each split, in the given order.

    Args:
        keyed_examples: Keys for `hash_split`, and the examples.
    """
    splits: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for key, example in keyed_examples:
        splits[hash_split(key)].append(example)
    return splits


def find_overlaps(examples: Mapping[Split, Sequence[Example]], name: str) -> list[str]:
    """Return a line for each pair of splits that share inputs; first the pair of test and training rows.

    Args:
        examples: The examples of each split.
        name: The name of the task, for the error.

    Raises:
        UsageError: All test rows, with their answers, are training rows.
    """
    # Hashes of 64 bits take the place of the texts, of which there may be a million.
    rows = {s: [(hash(_input(each)), hash(each.answer)) for each in own] for s, own in examples.items()}
    if set(rows["test"]) <= set(rows["train"]):
        raise UsageError(
            f"{name}: all {len(rows['test'])} test rows are training rows, so that their scores would "
            "measure memorization; give other test rows."
        )
    pairs: Mapping[tuple[Split, Split], str] = {
        ("test", "train"): "their scores measure memorization",
        ("validation", "train"): "their scores measure memorization",
        ("test", "validation"): "the learning rate is chosen by their scores",
    }
    found = []
    for (split, other), effect in pairs.items():
        known = {each for each, _ in rows[other]}
        if shared := sum(each in known for each, _ in rows[split]):
            of = "training" if other == "train" else other
            found.append(
                f"{shared:,} of {len(rows[split]):,} {split} rows have the input of a {of} row; {effect}"
            )
    return found


def _input(example: Example) -> tuple[str | None, ...]:
    """Return the input of an example, or its answer if it has none."""
    if example.image is not None:
        return (example.image.digest,)
    return (example.prompt, example.pair) if example.prompt or example.pair else (None, None, example.answer)


def hash_examples(examples: Mapping[Split, Iterable[Example]], labels: Sequence[str]) -> str:
    """Return the revision of a task's data: 16 hexadecimal digits of a SHA-256.

    The hash is over a JSON text, which is written in pieces to save memory.

    Args:
        examples: The examples at the task's default sizes, by split.
        labels: The names of the classes, empty for a task without classes.
    """
    revision = hashlib.sha256()
    revision.update(b"[[" if labels else b"[")
    for number, split in enumerate(SPLITS):
        revision.update(b", [" if number else b"[")
        for place, example in enumerate(examples[split]):
            revision.update(f"{', ' if place else ''}{json.dumps(_hashed_fields(example))}".encode())
        revision.update(b"]")
    revision.update(f"], {json.dumps(labels)}]".encode() if labels else b"]")
    return revision.hexdigest()[:16]


def _hashed_fields(example: Example) -> tuple[object, ...]:
    """Return the fields that the revision depends on."""
    more: list[object] = [example.pair] if example.pair is not None else []
    if example.image is not None:
        more.append(example.image.digest)
    if example.reference is not None or example.counts_in != "both":
        more.append({"reference": example.reference, "counts_in": example.counts_in})
    return (example.prompt, example.answer, *more)
