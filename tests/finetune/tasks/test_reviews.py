"""The task `reviews`: its data and its base model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.finetune.tasks.reviews import (
    ADJECTIVES,
    NOUNS,
    PRETRAINING_LABELS,
    QUESTIONS,
    RECIPE,
    VOCABULARY,
    Reviews,
    _batches,
    tokenizer,
)
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError

QUICK = replace(RECIPE, steps=3, batch_size=8, hidden_size=16, intermediate_size=32, layers=1, heads=2)


def silent(_: str) -> None:
    pass


def test_splits_are_disjoint_and_balanced_and_the_floor_is_the_score_of_a_guess() -> None:
    task = Reviews()
    data = task.load(task.choice())
    texts = [example.prompt for split in SPLITS for example in data[split]]
    assert len(texts) == len(set(texts)) == sum(len(data[split]) for split in SPLITS)
    for split in SPLITS:
        shares = Counter(example.answer for example in data[split])
        assert set(shares) == set(task.labels)
        assert set(shares.values()) == {len(data[split]) // len(task.labels)}
    assert task.floor == 1 / len(task.labels)


def test_smaller_sizes_are_prefixes_of_larger_ones() -> None:
    task = Reviews()
    small = task.load(replace(task.choice(), train_size=20, validation_size=30, test_size=10))
    large = task.load(task.choice())
    assert all(large[split][: len(small[split])] == small[split] for split in SPLITS)
    for split in SPLITS:
        with pytest.raises(UsageError, match=rf"has \d+ {split} examples, 1000000 are needed"):
            task.load(replace(task.choice(), **{f"{split}_size": 1_000_000}))


# -- reviews ---------------------------------------------------------------------------------------------


def reading(text: str) -> dict[str, str]:
    """Return the answer to every question, computed from the words by other code."""
    _, *words = text.split()
    middle = next(i for i, word in enumerate(words) if word in ("and", "but"))
    found = {"conjunction": words[middle]}
    for number, clause in (("1", words[:middle]), ("2", words[middle + 1 :])):
        found["topic" + number] = next(t for t, nouns in NOUNS.items() if clause[1] in nouns)
        mood = next(m for m, adjectives in ADJECTIVES.items() if clause[-1] in adjectives)
        found["mood" + number] = {"good": "bad", "bad": "good"}[mood] if "not" in clause else mood
    return found


def test_the_label_is_that_of_the_decisive_clause() -> None:
    for example in Reviews().examples("validation", 80):
        found = reading(example.prompt)
        number = "2" if found["conjunction"] == "but" else "1"
        assert example.prompt.startswith("unk the ")
        assert example.answer == f"{found['topic' + number]} {found['mood' + number]}"


def test_every_text_fits_the_length_with_one_token_per_word() -> None:
    task, words = Reviews(), tokenizer()
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    for example in task.examples("test", 400):
        encoded = task.encode(example, words)
        assert words.decode(encoded.ids) == example.prompt
        assert len(encoded.ids) <= task.defaults.max_length


def test_pretraining_masks_one_of_six_questions_and_uses_no_held_out_text() -> None:
    words, seen = tokenizer(), Counter[str]()
    held_out = {e.prompt for s in ("validation", "test") for e in Reviews().examples(s, 400)}  # type: ignore[arg-type]
    for ids, answers in _batches(replace(RECIPE, steps=10)):
        for row, answer in zip(ids, answers.tolist(), strict=True):
            text = words.decode(row[row != 0])
            question, found = text.split()[0], reading(text)
            meant = [found[question]] if question != "unk" else list(found.values())
            assert PRETRAINING_LABELS[answer] in meant
            assert f"unk {text.split(' ', 1)[1]}" not in held_out
            seen[question] += 1
    assert set(seen) == {"unk", *QUESTIONS}
    assert sum(seen.values()) == 640
    assert seen["unk"] == pytest.approx(640 / 6, abs=40)  # over four standard deviations


def test_the_base_model_is_bit_identical_each_time_and_gets_a_head_of_zeros(tmp_path: Path) -> None:
    contents = []
    for i, threads in enumerate((1, 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(i)
        contents.append(model_catalogue.prepare_task_base_model(Reviews(QUICK), tmp_path / str(i), silent))
    assert contents[0] == contents[1]
    assert base_store.base_folder(tmp_path / "0", "reviews-base", contents[0]).is_dir()
    base_model = loading.load_base_model(
        ModelChoice("reviews-base", contents[0]), tmp_path / "0", "cpu", Reviews(QUICK)
    )
    assert base_model.head_names == ("classifier",)  # the pooler is pretrained
    assert not any(p.any() for p in base_model.model.classifier.parameters())
    assert base_model.tokenizer.pad_token_id == base_model.model.config.pad_token_id == 0
