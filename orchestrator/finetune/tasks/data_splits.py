"""Splits of a user's data: those that the data name, and held-out splits made by a hash of the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.finetune.tasks.data_examples import PlacedExample
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS, SPLITS, Split, hash_split, hash_text
from orchestrator.util.errors import UsageError

MIN_ROWS = 20
"""The smallest number of rows from which splits are made."""
SMALL_DATA, SMALL_DATA_BUCKETS, BUCKETS = 5_000, 5, 10
"""A held-out split that is made gets a fifth of the rows if there are fewer than SMALL_DATA, else a tenth."""


def make_splits(examples: Sequence[PlacedExample], name: str) -> dict[Split, list[PlacedExample]]:
    """Return the examples of each split, in the order of a hash of their content.

    A row without a split belongs to the training data. A held-out split that no row names is made of
    training rows: a hash of its input decides where a row belongs, so rows with equal inputs share a split,
    whatever their order. A row keeps its split when rows are added, until there are SMALL_DATA of them.

    Args:
        examples: The examples with the splits that the data name.
        name: The name of the data, for error messages.

    Raises:
        UsageError: A split is empty, or there are too few rows to make one.
    """
    splits: dict[Split, list[PlacedExample]] = {split: [] for split in SPLITS}
    for each in examples:
        splits[each.split or "train"].append(each)
    missing = [split for split in HELD_OUT_SPLITS if not splits[split]]
    pool = splits["train"]
    if missing and 0 < len(pool) < MIN_ROWS:
        raise UsageError(
            f"{name} has {len(pool)} rows; must be {MIN_ROWS} or more, of which {' and '.join(missing)} get "
            "a part (--validation-data and --test-data give others)."
        )
    if missing:
        num_buckets = SMALL_DATA_BUCKETS if len(pool) < SMALL_DATA else BUCKETS
        splits["train"] = []
        for each in pool:
            splits[hash_split(each.key, missing, num_buckets)].append(each)
    for split, members in splits.items():
        if not members:
            num_inputs = len({each.key for each in pool})
            how = f"a hash puts none of the {num_inputs} different inputs of {len(pool)} rows there"
            if split == "train" and not pool:
                how = "no row names it"
            raise UsageError(f"{name}: the {split} split is empty: {how}; add rows, or name their splits.")
        # Hashed with a salt, since hash_split has selected by the first digits of the hash alone.
        members.sort(key=lambda each: hash_text(f"order/{each.key}/{each.example.answer}"))
    return splits


def find_labels(splits: Mapping[Split, Sequence[PlacedExample]], name: str) -> tuple[str, ...]:
    """Return the classes, numbers in their order and texts in alphabetical order.

    Args:
        splits: The examples of each split.
        name: The name of the data, for error messages.

    Raises:
        UsageError: There is a single class, the labels look like numbers to predict, or a class occurs in
            one split only.
    """
    counts = {split: Counter(each.example.answer for each in splits[split]) for split in SPLITS}
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
            where = next(e.where for e in splits[having[0]] if e.example.answer == label)
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
