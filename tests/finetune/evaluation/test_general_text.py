"""The split "general": its rows, its loss in two units, and what a lane has forgotten of it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Script, configuration, get_record, leases, numbers_of, solo, tiny_base_model, train
from three_lanes import NAMES, three_lanes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.finetune.data.batches import Row, encode_examples
from orchestrator.finetune.engine import lane_group
from orchestrator.finetune.evaluation import general_text
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit, evaluate_loss
from orchestrator.finetune.evaluation.general_text import FILE, make_general_split
from orchestrator.finetune.evaluation.generate import EvaluatedLanes
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import letters
from orchestrator.finetune.tasks.base import Example
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from variants import catalogue as variants
from variants.adapters import attach
from variants.api import VariantSettings

TEXT = FILE.read_text("ascii")
LETTERS = tasks.get("letters")


def byte_pairs(merges: int = 0, bos: bool = False) -> Any:
    """Return a tokenizer of bytes, or of up to `merges` longer tokens that the text itself has."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=259 + merges, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def reader(tokenizer: Any, positions: int = 512) -> BaseModel:
    """Return a tiny language model with random weights that reads English."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return BaseModel(model, tokenizer, torch.device("cpu"))


def score(base_model: BaseModel, adapters: Any, *names: str) -> list[Any]:
    split = make_general_split(LETTERS, base_model)
    assert split is not None
    lanes = EvaluatedLanes(adapters, names, [0] * len(names)) if names else EvaluatedLanes(adapters)
    return [each.scores for each in evaluate_loss(base_model, LETTERS, split, lanes)]


def test_the_text_is_the_one_that_the_module_describes() -> None:
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in (general_text.__doc__ or "")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("positions", [512, 100])
def test_every_token_is_predicted_once_as_transformers_does_it(bos: bool, positions: int) -> None:
    base_model = reader(byte_pairs(400, bos), positions)
    split = make_general_split(LETTERS, base_model)
    assert split is not None
    ids = base_model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [target for row in split.rows for target in row.targets] == (ids if bos else ids[1:])
    assert {len(row.ids) for row in split.rows[:-1]} == {min(256, positions)}
    with three_lanes(base_model) as adapters:
        (found,) = score(base_model, adapters)
    total = 0.0
    for row in split.rows:
        window = torch.tensor([[*row.ids, row.targets[-1]]])
        total += base_model.model(input_ids=window, labels=window).loss.item() * len(row.targets)
    assert found["loss"] == pytest.approx(total / (len(ids) - (not bos)), abs=1e-6)
    size = len(TEXT) if bos else len(TEXT) - len(base_model.tokenizer.decode(ids[:1]))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: reader(byte_pairs(400)), lambda: tiny_base_model(ModelChoice("t", ""))]
)
def test_lanes_score_together_as_alone_and_one_with_b_at_zero_has_forgotten_nothing(make: Any) -> None:
    base_model = make()
    with three_lanes(base_model) as adapters:
        together = score(base_model, adapters, *NAMES)
        assert together == [score(base_model, adapters, name)[0] for name in NAMES]
        (before,) = score(base_model, adapters)
        assert all(abs(each["loss"] - before["loss"]) > 1e-4 for each in together)
    settings = VariantSettings(rank=4, alpha=8.0)
    adapters = attach(base_model.model, variants.get("lora"), settings, "blocks")
    adapters.add_lane("new", settings, seed=3)
    assert score(base_model, adapters, "new") == [before]
    adapters.detach()


def test_a_tokenizer_without_english_reads_the_pretraining_of_its_task_or_nothing() -> None:
    tiny = tiny_base_model(ModelChoice("tiny", ""))
    split = make_general_split(LETTERS, tiny)
    assert split is not None
    operators = [example.prompt.split()[0] for example in split.examples]
    assert set(operators) == set(letters.OPERATORS)  # and not `unk`, which fine-tuning teaches
    by_operator = {e.prompt.split()[0]: (e.prompt, e.answer) for e in split.examples[:5]}
    prompt, answer = by_operator["rotate"]
    assert answer.split() == [*prompt.split()[2:6], prompt.split()[1]]
    prompt, answer = by_operator["previous"]
    assert [(ord(a) - ord(b)) % 16 for a, b in zip(prompt.split()[1:6], answer.split(), strict=True)] == [
        1
    ] * 5
    assert make_general_split(tasks.get("metamathqa"), tiny) is None
    assert (
        make_general_split(tasks.get("reviews"), tiny_base_model(ModelChoice("b", ""), tasks.get("reviews")))
        is None
    )


def test_bits_per_byte_is_the_same_for_two_tokenizers_that_give_a_text_the_same_probability() -> None:
    """Each byte costs 0.7 nats, and the end token costs 50, which must not count."""
    found = {}
    for merges in (0, 400):
        tokenizer = byte_pairs(merges)
        examples = [Example("Lady Russell said:", " Captain Wentworth"), Example("It is", " caf\u00e9.")]
        rows = encode_examples(examples, LETTERS, tokenizer)
        split = EvaluationSplit(examples, rows, 64, tokenizer)
        losses = [
            50.0 if token == tokenizer.eos_token_id else 0.7 * len(raw_bytes(tokenizer, int(token)))
            for token in split.flat_targets[0]
        ]
        found[len(losses)] = split.bits_per_byte(np.array(losses))
    assert len(found) == 2
    assert list(found.values()) == pytest.approx([0.7 / math.log(2)] * 2)


def raw_bytes(tokenizer: Any, token: int) -> str:
    """Return the text of a token with one character a byte, as byte-level tokenizers write it."""
    return str(tokenizer.convert_ids_to_tokens(token))


def test_the_blank_before_the_first_word_counts_with_a_tokenizer_that_drops_it_in_texts() -> None:
    class Pieces:
        """Decodes as SentencePiece does: without the blank at the start of a text."""

        all_special_ids, pad_token_id = (0,), 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(("", "sum:", " 12")[i] for i in ids).removeprefix(" ")

    split = EvaluationSplit([Example("sum:", " 12")], [Row((1, 2), (2, 0), (1,))], 8, Pieces())
    assert split.bits_per_byte(np.array([3 * math.log(2), 9.0])) == pytest.approx(1.0)


# -- in training --------------------------------------------------------------------------------------------


def general(record: Record) -> list[int]:
    return [each.step for each in record.evaluations if each.split == "general"]


def test_a_finished_lane_has_what_it_forgot_and_the_others_do_not(tmp_path: Path) -> None:
    points = [
        configuration(),
        configuration(rate=3e-3, seed=1),
        configuration(rate=1e30),
        configuration(task="reviews"),
    ]
    found = [solo(point, tmp_path) for point in points]
    assert [each.state for each in found] == ["finished", "finished", "diverged", "finished"]
    assert list(map(general, found)) == [[8], [8], [], []]
    for record in found[:2]:
        before, after = record.baseline_scores["general"], record.evaluations[-1].scores
        assert record.results()["forgetting"] == after["loss"] - before["loss"] != 0
        assert (
            record.results()["forgetting_bits_per_byte"] == after["bits_per_byte"] - before["bits_per_byte"]
        )
    assert {each.results()["forgetting"] for each in found[2:]} == {None}
    together = Store(tmp_path / "together")
    train(Script(leases(points[:2])), together)
    assert [numbers_of(get_record(together, each)) for each in points[:2]] == list(map(numbers_of, found[:2]))


def test_a_loss_on_the_text_that_is_not_finite_is_no_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(*arguments: Any) -> list[Any]:
        return [
            replace(each, scores={"loss": math.inf, "bits_per_byte": math.inf})
            for each in evaluate_loss(*arguments)
        ]

    monkeypatch.setattr(lane_group, "evaluate_loss", infinite)
    record = solo(configuration(seed=5), tmp_path, data=tmp_path / "data")
    assert (record.state, general(record)) == ("finished", [8])
    assert Record.from_json(record.to_json()).evaluations == record.evaluations


def test_a_record_without_the_split_loads_and_counts_as_trained(tmp_path: Path) -> None:
    record = solo(configuration(), tmp_path)
    data = record.to_json()
    data["evaluations"] = [each for each in data["evaluations"] if each["split"] != "general"]
    del data["baseline_scores"]["general"]
    for scores in (*data["baseline_scores"].values(), *(each["scores"] for each in data["evaluations"])):
        del scores["bits_per_byte"]
    old = Record.from_json(data)
    assert (old.results()["forgetting"], old.results()["test_score"]) == (
        None,
        record.results()["test_score"],
    )
    store = Store(tmp_path / "old")
    assert store.put(old)
    found = store.get_reusable(record.fingerprint)
    assert found is not None
    assert found.evaluations == old.evaluations
