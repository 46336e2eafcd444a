"""The local text classification tasks: their data, and the base model of one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import SPLITS, Example, Split, Task
from orchestrator.finetune.tasks.local import glosses
from orchestrator.finetune.tasks.local.glosses import WORDNET_FOLDER, Glosses
from orchestrator.finetune.tasks.local.reviews import (
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

needs_wordnet = pytest.mark.skipif(
    not Path(WORDNET_FOLDER, "data.noun").is_file(), reason="needs WordNet: apt-get install wordnet-base"
)
BOTH = [Reviews(), pytest.param(Glosses(), marks=needs_wordnet)]
QUICK = replace(RECIPE, steps=3, batch_size=8, hidden_size=16, intermediate_size=32, layers=1, heads=2)


def silent(_: str) -> None:
    pass


@cache
def loaded(task: Task) -> dict[Split, list[Example]]:
    """Return the data of the task. A test session reads them once."""
    return task.load(task.choice())


@pytest.mark.parametrize("task", BOTH, ids=lambda task: task.name)
def test_splits_are_disjoint_and_balanced_and_the_floor_is_the_score_of_a_guess(task: Task) -> None:
    data = loaded(task)
    texts = [example.prompt for split in SPLITS for example in data[split]]
    assert len(texts) == len(set(texts)) == sum(len(data[split]) for split in SPLITS)
    for split in SPLITS:
        shares = Counter(example.answer for example in data[split])
        assert set(shares) == set(task.labels)
        assert set(shares.values()) == {len(data[split]) // len(task.labels)}
    assert task.floor == 1 / len(task.labels)


@pytest.mark.parametrize("task", BOTH, ids=lambda task: task.name)
def test_smaller_sizes_are_prefixes_of_larger_ones(task: Task) -> None:
    small = task.load(replace(task.choice(), train_size=20, validation_size=30, test_size=10))
    large = loaded(task)
    assert all(large[split][: len(small[split])] == small[split] for split in SPLITS)
    for split in SPLITS:
        with pytest.raises(UsageError, match=rf"has \d+ {split} examples, 1000000 are needed"):
            task.load(replace(task.choice(), **{f"{split}_size": 1_000_000}))


@needs_wordnet
def test_the_data_of_glosses_do_not_change() -> None:
    assert Glosses().revision() == "940c35ef235a05f9"


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


# -- glosses ---------------------------------------------------------------------------------------------

NOUNS_FILE = """  1 This software and database is being provided to you
00001740 05 n 01 dog 0 000 | a friendly animal that barks; "the dog barked all night"
00001741 13 n 01 soup 0 000 | a warm dish that is eaten with a spoon
00001742 05 n 01 cat 0 000 | is in two classes at once
00001743 13 n 01 cat 0 000 | is in two classes at once
00001744 03 n 01 entity 0 000 | of a class that the task does not have
00001745 05 n 01 ant 0 000 | too few words
"""


def test_a_gloss_is_the_definition_of_one_class_without_example_sentences(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS_FILE)
    assert glosses._read_glosses(tmp_path) == {
        "a friendly animal that barks": "animal",
        "a warm dish that is eaten with a spoon": "food",
    }


def test_without_wordnet_the_error_says_in_one_line_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get install wordnet-base") as caught:
        Glosses().examples("train", 1)
    assert "\n" not in str(caught.value)
