"""Tasks with a head: the model's input and output, and lanes with their own heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import WORDS_TASK, Script, configuration, leases, numbers_of, solo, tiny_base_model, train
from three_lanes import NAMES, compute_logits, three_lanes, tokenized_split
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from orchestrator.finetune.data.batches import compute_max_row_length, encode_examples, pad_rows
from orchestrator.finetune.evaluation.evaluate import EvaluationResult, EvaluationSplit, evaluate
from orchestrator.finetune.evaluation.generate import EvaluatedLanes
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Example, Task
from orchestrator.finetune.tasks.base import Split as SplitName
from orchestrator.finetune.tasks.reviews import VOCABULARY, Reviews, tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice, OptimizerConfig
from variants import catalogue as variants

pytestmark = pytest.mark.xdist_group("pair")

SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}


class Lengths(Reviews):
    """Regression of the number of words in a review."""

    name = "lengths"
    metric = "pearson"
    floor = 0.0
    output = "regression"
    labels = ()

    def examples(self, split: SplitName, count: int) -> list[Example]:
        found = Reviews().examples(split, count)
        return [Example(e.prompt, str(len(e.prompt.split()) / 10)) for e in found]


def encoder(folder: Path) -> Path:
    """Save a tiny BERT in the usual form, with a head for masked words and without a pooler."""
    torch.manual_seed(0)
    with base_store.suppress_transformers_logging():
        BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    with base_store.suppress_transformers_logging():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, task: Task) -> BaseModel:
    return loading.load_base_model(
        ModelChoice(str(folder), base_store.content_hash(folder)), folder, "cpu", task
    )


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return encoder(folder) if request.param == "encoder" else decoder(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("bert"))


def make_split(task: Task, base_model: BaseModel, size: int = 80) -> EvaluationSplit:
    length = compute_max_row_length(task, task.defaults.max_length)
    return tokenized_split(task.examples("validation", size), task, base_model.tokenizer, length)


# -- data ------------------------------------------------------------------------------------------------


def test_the_only_target_of_a_row_is_at_its_last_token() -> None:
    task = Reviews()
    review = Example("unk the soup was bad but the play was very nice", "show good")
    (row,) = encode_examples([review], task, tokenizer(), max_length=16)
    assert tokenizer().decode(row.ids) == review.prompt
    assert row.targets == (*[IGNORE_INDEX] * 10, task.labels.index("show good"))
    batch = pad_rows([row, row], 16, pad_token_id=0)
    assert (batch.target_counts, batch.target_count, batch.lengths.tolist()) == ((1, 1), 2, [11, 11])
    assert batch.attention_mask.tolist() == [[True] * 11 + [False] * 5] * 2
    assert (compute_max_row_length(task, 16), batch.targets.dtype) == (16, torch.int64)


def test_targets_of_regression_keep_their_values() -> None:
    rows = encode_examples(
        [Example("unk the", "0.123456789"), Example("unk", "7")], Lengths(), tokenizer(), 16
    )
    batch = pad_rows(rows, 8, pad_token_id=0)
    assert batch.targets[batch.targets != IGNORE_INDEX].tolist() == [0.123456789, 7.0]


# -- the model -------------------------------------------------------------------------------------------


def test_a_head_starts_with_zeros_so_that_the_base_model_guesses(folder: Path) -> None:
    task = Reviews()
    base_model = load(folder, task)
    assert base_model.is_causal == ("Llama" in type(base_model.model).__name__)
    # A pooler that the checkpoint lacks is part of the new head.
    assert base_model.head_names == (
        ("score",) if base_model.is_causal else ("classifier", "bert.pooler.dense")
    )
    with three_lanes(base_model) as adapters:
        found = evaluate(base_model, task, make_split(task, base_model), EvaluatedLanes(adapters))[0]
    assert found.scores == {"loss": pytest.approx(math.log(8)), "accuracy": task.floor}
    assert set(found.items.answers) == {task.labels[0]}


def test_a_checkpoint_with_a_head_for_other_classes_gets_a_new_one(folder: Path, tmp_path: Path) -> None:
    task = Reviews()
    base_model = load(folder, task)
    with base_store.suppress_transformers_logging():
        base_model.model.save_pretrained(tmp_path)
    base_model.tokenizer.save_pretrained(tmp_path)
    other = load(tmp_path, Lengths())
    assert other.model.config.num_labels == 1
    assert other.head_names[0] == base_model.head_names[0]
    assert not any(p.any() for p in other.model.get_submodule(other.head_names[0]).parameters())


def test_padding_and_neighboring_rows_change_nothing(folder: Path) -> None:
    task = Reviews()
    base_model = load(folder, task)
    rows = encode_examples(task.examples("train", 32), task, base_model.tokenizer, 16)
    assert len({len(row.ids) for row in rows}) > 2
    with three_lanes(base_model) as adapters, adapters.activate_lanes(["y"], None), torch.no_grad():
        logits, labels = compute_logits(base_model, task, pad_rows(rows, 16, 0))
        assert labels.tolist() == [row.targets[-1] for row in rows]
        for row, one in zip(rows, logits, strict=True):  # each row alone, without padding and mask
            alone = base_model.model(input_ids=torch.tensor([row.ids])).logits[0]
            torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)
        # Rows without padding are bit-identical beside padded rows and among themselves.
        full = [row for row in rows if len(row.ids) == max(len(r.ids) for r in rows)]
        full = (full * 8)[:8]
        length = len(full[0].ids)
        together = compute_logits(base_model, task, pad_rows([*full, *rows], length, 0))[0][:8]
        assert torch.equal(together, compute_logits(base_model, task, pad_rows(full, length, 0))[0])


def test_an_encoder_with_sliding_windows_keeps_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    special = {"cls_token_id": 1, "sep_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    config = ModernBertConfig(**SIZES, **special, local_attention=4, global_attn_every_n_layers=2)
    with base_store.suppress_transformers_logging():
        ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    task = Reviews()
    base_model = load(tmp_path, task)
    assert (base_model.head_names, base_model.has_sliding_window) == (("head", "classifier"), True)
    rows = encode_examples(task.examples("train", 16), task, base_model.tokenizer, 16)
    with three_lanes(base_model) as adapters, adapters.activate_lanes(["y"], None), torch.no_grad():
        logits, _ = compute_logits(base_model, task, pad_rows(rows, 16, 0))
        alone = [base_model.model(input_ids=torch.tensor([row.ids])).logits[0] for row in rows]
        torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-4)


# -- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Reviews(), Lengths()], ids=lambda task: task.name)
def test_scores_of_a_lane_do_not_depend_on_other_lanes(folder: Path, task: Task) -> None:
    base_model = load(folder, task)
    split = make_split(task, base_model)
    with three_lanes(base_model) as adapters:
        together = evaluate(base_model, task, split, EvaluatedLanes(adapters, NAMES, [0, 0, 0]))
        alone = [evaluate(base_model, task, split, EvaluatedLanes(adapters, [n], [0]))[0] for n in NAMES]
    assert together == alone
    assert len({one.scores["loss"] for one in alone}) == 3


@pytest.mark.parametrize("task", [Reviews(), Lengths()], ids=lambda task: task.name)
def test_scores_equal_those_computed_with_the_model_itself(folder: Path, task: Task) -> None:
    base_model = load(folder, task)
    split = make_split(task, base_model, 24)
    # With larger updates this random model multiplies rounding errors by a thousand.
    with three_lanes(base_model, deviation=0.1) as adapters, torch.no_grad():
        found = evaluate(base_model, task, split, EvaluatedLanes(adapters, ["y"], [0]))[0]
        with adapters.activate_lanes(["y"], None):
            logits = [base_model.model(input_ids=torch.tensor([row.ids])).logits[0] for row in split.rows]
    if task.output == "classification":
        classes = [task.labels[int(one.argmax())] for one in logits]
        right = [c == e.answer for c, e in zip(classes, split.examples, strict=True)]
        assert found.items.answers == tuple(classes)
        assert found.items.correct == tuple(map(float, right))
        assert found.scores["accuracy"] == pytest.approx(np.mean(right))
        each = [-one.log_softmax(0)[task.target(e)] for one, e in zip(logits, split.examples, strict=True)]  # type: ignore[index]
    else:
        values = np.array([one.item() for one in logits])
        truth = np.array([float(e.answer) for e in split.examples])
        assert [float(a) for a in found.items.answers] == pytest.approx(values.tolist(), rel=1e-4)
        near = 1 - np.abs(values - truth) / np.ptp(truth)
        assert found.items.correct == pytest.approx(np.maximum(near, 0).tolist(), abs=1e-4)
        assert found.scores["pearson"] == pytest.approx(np.corrcoef(values, truth)[0, 1], abs=1e-4)
        assert "accuracy" not in found.scores
        each = [torch.tensor((v - t) ** 2) for v, t in zip(values, truth, strict=True)]
    assert found.items.loss == pytest.approx([float(one) for one in each], rel=1e-3, abs=1e-4)
    assert found.scores["loss"] == pytest.approx(np.mean([float(one) for one in each]), rel=1e-4)


def _shared(process_group: ProcessGroup, _: Path, bert: Path) -> list[EvaluationResult]:
    """Evaluate all outputs: classes, values, greedy and sampled generation, and teacher forcing.

    This runs on two workers and in the process of the test.
    """
    found = []
    for name in ("reviews", "lengths", WORDS_TASK, "sampled", "letters"):
        task = Lengths() if name == "lengths" else tasks.get(WORDS_TASK if name == "sampled" else name)
        if name == "sampled":
            task = type(task)()
            task.samples, task.temperature, task.top_p = 3, 1.0, 0.9  # type: ignore[misc]
        base_model = load(bert, task) if task.has_head else tiny_base_model(ModelChoice("tiny", "0" * 64))
        # The smaller split has one batch, so one worker gets nothing.
        for size in (90, 9):
            split = make_split(task, base_model, size)
            with three_lanes(base_model) as adapters:
                lanes = EvaluatedLanes(adapters, NAMES, (0, 1, 2))
                found += evaluate(base_model, task, split, lanes, process_group)
    return found


def test_two_workers_get_the_results_of_one(pair: Callable[..., Any], bert: Path, tmp_path: Path) -> None:
    work = partial(_shared, bert=bert)
    first, second = pair({"shared": work}, tmp_path)["shared"]
    assert first == second
    assert first == work(SINGLE_PROCESS_GROUP, tmp_path)


# -- training --------------------------------------------------------------------------------------------


def point(variant: str = "lora", head: float | None = None, **options: object) -> Configuration:
    one = configuration(task="reviews", variant=variant, **options)  # type: ignore[arg-type]
    return replace(one, optimizer=OptimizerConfig(one.optimizer.learning_rate, head_learning_rate=head))


@pytest.fixture(scope="module")
def options(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the options of training: the model and a data folder."""
    return {"load_base_model": lambda choice, task: load(bert, task), "data": tmp_path_factory.mktemp("data")}


@pytest.mark.parametrize("variant", ["lora", pytest.param("hira", marks=pytest.mark.slow)])
def test_a_lane_with_a_head_gets_the_numbers_of_a_lane_alone(
    variant: str, options: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    alpha = 8.0 if variants.get(variant).uses_alpha else None
    members = [
        point(variant, alpha=alpha, seed=0, steps=6),
        point(variant, alpha=alpha, seed=1, steps=8, rate=3e-2),
        point(variant, alpha=alpha, seed=1, steps=4, head=1e-3),
    ]
    later = {members[2].fingerprint: 3}
    train(Script(leases(members), start_at=later), store, lanes=3, **options)
    for one in members:
        record = store.get(one.fingerprint)
        assert record is not None
        assert record.state == "finished", record.traceback
        assert record.provenance.lane_group_size > 1
        assert numbers_of(record) == numbers_of(solo(one, tmp_path, **options))
        assert record.baseline_scores["test"]["loss"] == pytest.approx(math.log(8))
        assert set(record.items["test"].answers) <= set(Reviews.labels)


def test_the_heads_learning_rate_affects_the_head_only(options: dict[str, Any], tmp_path: Path) -> None:
    same, as_typed, other = (
        solo(point(head=head, steps=6), tmp_path, **options) for head in (None, 1e-2, 1e-3)
    )
    assert same.fingerprint == as_typed.fingerprint
    assert other.fingerprint != same.fingerprint
    assert [s.loss for s in other.curve[:2]] == pytest.approx([s.loss for s in same.curve[:2]], rel=1e-2)
    assert other.curve[-1].loss != same.curve[-1].loss
    assert [s.learning_rate for s in other.curve] == [s.learning_rate for s in same.curve]
