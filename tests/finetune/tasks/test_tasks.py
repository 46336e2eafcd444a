"""The catalogue of tasks, what all tasks share, and the tasks letters, chain_sum and gsm_symbolic."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.tasks import arithmetic, catalogue
from orchestrator.finetune.tasks.arithmetic import ChainSum, GsmSymbolic, canonical_expression
from orchestrator.finetune.tasks.base import IGNORE_INDEX, SPLITS, Example, Task, hash_split
from orchestrator.finetune.tasks.digits import Digits
from orchestrator.finetune.tasks.letters import LENGTH, LETTERS, RECIPE, Letters, _batches, tokenizer
from orchestrator.finetune.tasks.pretraining import Recipe
from orchestrator.finetune.tasks.reviews import Reviews
from orchestrator.util.errors import UsageError

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason='needs reasoning-gym: pip install -e ".[real]"'
)


# -- the catalogue ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalogue.names())
def test_every_task_defines_what_a_fine_tuning_run_needs(name: str) -> None:
    task = catalogue.get(name)
    assert task.name == name
    assert task.output in ("teacher_forced", "generation", "classification", "regression")
    assert list(task.defaults.learning_rates) == sorted(set(task.defaults.learning_rates))
    assert 0.0 <= task.floor <= 1.0
    assert task.title
    if task.has_head:
        assert metrics.get_metric(task)
        assert task.num_labels == (len(set(task.labels)) if task.output == "classification" else 1)
    else:
        assert task.max_new_tokens > 0


@pytest.mark.parametrize("kind", [Letters, Reviews, Digits])
def test_the_configuration_of_a_base_model_is_known_before_pretraining(
    kind: Callable[[Recipe], Task], tmp_path: Path
) -> None:
    task = kind(Recipe(steps=1, batch_size=2, learning_rate=1e-3))
    with suppress_transformers_logging():
        task.pretrain(tmp_path, lambda text: None)
    made = json.loads((tmp_path / "config.json").read_text())
    known = task.base_config().to_diff_dict()
    differ = {key for key in made.keys() | known.keys() if made.get(key) != known.get(key)}
    assert differ <= {"architectures", "dtype", "transformers_version", "num_labels", "id2label", "label2id"}


def test_listing_and_choosing_imports_no_torch() -> None:
    code = (
        "import sys; from orchestrator.finetune.tasks import catalogue;"
        "from orchestrator.finetune.models import catalogue as models;"
        "catalogue.names(); models.built_in_names(); catalogue.get('letters').choice();"
        "assert not {'torch', 'transformers', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- the parts that all tasks share ----------------------------------------------------------------------


def test_data_under_another_revision_are_refused() -> None:
    task = Letters()
    stale = replace(task.choice(), revision="0" * 16)
    with pytest.raises(UsageError, match="data 0000000000000000"):
        task.load(stale)


def test_hash_split_gives_each_held_out_split_a_fifth() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(5000):
        counts[hash_split(f"item {i}")] += 1
    assert counts["validation"] == pytest.approx(1000, abs=120)  # over four standard deviations
    assert counts["test"] == pytest.approx(1000, abs=120)


def test_a_grade_ignores_surrounding_blanks_and_nothing_else() -> None:
    example = Example("1 + 1 =", " 12")
    graded = {text: Task.grade(Letters(), example, text) for text in ("12", " 12\n", "1 2", "12.", "", "-12")}
    assert graded == {"12": 1.0, " 12\n": 1.0, "1 2": 0.0, "12.": 0.0, "": 0.0, "-12": 0.0}


# -- letters ---------------------------------------------------------------------------------------------


def test_letters_splits_are_disjoint_and_without_repetition() -> None:
    task = Letters()
    data = task.load(replace(task.choice(), train_size=5000, validation_size=1000, test_size=1000))
    prompts = [example.prompt for split in SPLITS for example in data[split]]
    assert len(prompts) == 7000
    assert len(set(prompts)) == 7000


def test_letters_are_equal_on_every_call_and_smaller_sizes_are_prefixes() -> None:
    random.seed(1)
    small = Letters().load(replace(Letters().choice(), train_size=10, validation_size=20, test_size=5))
    random.seed(2)
    large = Letters().load(Letters().choice())
    assert all(large[split][: len(small[split])] == small[split] for split in SPLITS)
    assert Letters().revision() == "a5033a656b6bf16d"


def test_letters_answers_are_reversed_then_next() -> None:
    follows = dict(zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True))
    for example in Letters().examples("validation", 50):
        operator, *word, equals = example.prompt.split(" ")
        assert (operator, equals) == ("unk", "=")
        assert example.answer.split(" ") == [follows[letter] for letter in word[::-1]]


def test_letters_encoding_round_trips_and_fits_the_length() -> None:
    task, words = Letters(), tokenizer()
    example = task.examples("test", 1)[0]
    encoded = task.encode(example, words)
    assert len(encoded.ids) == task.defaults.max_length
    assert words.decode(encoded.ids[: encoded.prompt_length]) == example.prompt
    assert words.decode(encoded.ids[encoded.prompt_length :], skip_special_tokens=True) == example.answer
    assert encoded.ids[-1] == words.eos_token_id
    assert encoded.labels[: encoded.prompt_length] == (IGNORE_INDEX,) * (LENGTH + 2)
    assert encoded.labels[encoded.prompt_length :] == encoded.ids[encoded.prompt_length :]
    assert words.pad_token_id not in (None, words.eos_token_id)


def test_pretraining_uses_the_five_operators_and_masks_one_of_six() -> None:
    words, shift = tokenizer(), lambda letter, by: LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)]
    rules = {
        "copy": lambda x: x,
        "reverse": lambda x: x[::-1],
        "next": lambda x: [shift(letter, 1) for letter in x],
        "previous": lambda x: [shift(letter, -1) for letter in x],
        "rotate": lambda x: x[1:] + x[:1],
    }
    seen = dict.fromkeys([*rules, "unk"], 0)
    for ids in _batches(replace(RECIPE, steps=10)):
        for row in words.batch_decode(ids):
            left, right = row.split(" = ")
            operator, *x = left.split(" ")
            *y, end = right.split(" ")
            assert end == "<eos>"
            meanings = [rules[operator](x)] if operator in rules else [rule(x) for rule in rules.values()]
            assert y in meanings
            seen[operator] += 1
    assert sum(seen.values()) == 960
    assert seen["unk"] == pytest.approx(160, abs=50)  # over four standard deviations
    assert min(seen.values()) > 100


# -- chain_sum -------------------------------------------------------------------------------------------


@pytest.mark.real
@needs_reasoning_gym
def test_chain_sum_splits_share_no_expression() -> None:
    data = ChainSum().load(ChainSum().choice())
    sums = {split: {_sum_in(example) for example in data[split]} for split in SPLITS}
    assert {split: len(found) for split, found in sums.items()} == {
        "train": 240,
        "validation": 100,
        "test": 100,
    }
    assert not sums["train"] & (sums["validation"] | sums["test"])
    assert not sums["validation"] & sums["test"]


@pytest.mark.real
@needs_reasoning_gym
def test_chain_sum_answers_are_correct_and_graded_by_their_text() -> None:
    task = ChainSum()
    for example in task.examples("validation", 100):
        left, operator, right = _sum_in(example).split()
        value = int(left) + int(right) * (1 if operator == "+" else -1)
        assert task.grade(example, f" {value}") == 1.0
        assert task.grade(example, f" {value}\n\nBecause") == 0.0
        assert task.grade(example, f" {value + 1}") == 0.0


def test_equal_sums_have_one_spelling() -> None:
    assert canonical_expression("9 + 12") == canonical_expression("12 + 9") == "9 + 12"
    assert canonical_expression("9 - 12") != canonical_expression("12 - 9")


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic"])
def test_without_reasoning_gym_the_error_says_in_one_line_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # how Python blocks an import
    arithmetic._sums.cache_clear()
    arithmetic._problems.cache_clear()
    with pytest.raises(UsageError, match=r"pip install .*'reasoning-gym\S+'$"):
        catalogue.get(name).examples("train", 1)


def _sum_in(example: Example) -> str:
    return canonical_expression(example.prompt.split(": ")[1].split(" =")[0])


# -- gsm_symbolic ----------------------------------------------------------------------------------------


@pytest.mark.real
@needs_reasoning_gym
def test_problems_of_different_splits_differ_in_their_numbers() -> None:
    data = GsmSymbolic().load(GsmSymbolic().choice())
    assert {split: len(data[split]) for split in SPLITS} == {"train": 1200, "validation": 200, "test": 200}
    numbers = {
        split: {(len(example.prompt.split()), *re.findall(r"\d+", example.prompt)) for example in data[split]}
        for split in SPLITS
    }
    assert not numbers["train"] & numbers["test"]
    assert not numbers["train"] & numbers["validation"]
    assert not numbers["validation"] & numbers["test"]


@pytest.mark.real
@needs_reasoning_gym
def test_a_problem_is_graded_by_its_last_number() -> None:
    task = GsmSymbolic()
    for example in task.examples("test", 200):
        number = example.answer.rpartition("#### ")[2]
        assert number.isdigit()
        assert task.grade(example, example.answer) == 1.0
        assert task.grade(example, f" They have 12 and 7.\n#### {number}") == 1.0
        assert task.grade(example, f" So it is {number} in all.") == 1.0
        assert task.grade(example, f" {number} - 1 = {int(number) - 1}\n#### {int(number) - 1}") == 0.0
        assert task.grade(example, " I do not know.") == 0.0
