"""Encoders as base models of classification, with single texts and pairs."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import encoders
import pytest
import torch
from scripted import Script, configuration, leases, numbers_of, train
from three_lanes import compute_logits, three_lanes
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.finetune.data.batches import Batch, encode_examples, pad_rows
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Example, Task, TaskDefaults
from orchestrator.finetune.tasks.base import Split as SplitName
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.util.errors import UsageError
from variants import catalogue as variants
from variants.adapters import attach
from variants.api import VariantSettings

HEADS = {
    "roberta": ("classifier",),
    "bert": ("classifier", "bert.pooler.dense"),
    "electra": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta": ("pooler", "classifier"),
    "deberta-conv": ("pooler", "classifier"),
    "deberta-v1": ("pooler", "classifier"),
}
TYPED = ("bert", "electra")
"""The models that have token types."""


class Same(Task):
    """A task that asks whether two texts are equal."""

    name = "same"
    title = "equal texts"
    metric = "accuracy"
    floor = 0.5
    default_model = "reviews-base"
    output = "classification"
    labels = ("other", "same")
    defaults = TaskDefaults(64, 16, 16, 8, 8, max_length=40, evaluations=2, learning_rates=(1e-3,))

    def examples(self, split: SplitName, count: int) -> list[Example]:
        found = []
        for number in range(count):
            draw = random.Random(f"{split} {number}")
            first, other = (" ".join(draw.choices("abcdefg", k=draw.choice((1, 4, 9)))) for _ in range(2))
            found.append(Example(first, self.labels[number % 2], first if number % 2 else other))
        return found


@pytest.fixture(scope="module", params=HEADS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: encoders.save(kind, tmp_path_factory.mktemp(kind)) for kind in HEADS}


def load(folder: Path) -> BaseModel:
    return loading.load_base_model(
        ModelChoice(str(folder), base_store.content_hash(folder)), folder, "cpu", Same()
    )


def batch_of(base_model: BaseModel, length: int = 48, count: int = 16) -> Batch:
    rows = encode_examples(Same().examples("train", count), Same(), base_model.tokenizer, 40)
    assert len({len(row.ids) for row in rows}) > 2
    return pad_rows(rows, length, base_model.tokenizer.pad_token_id)


# -- one model -------------------------------------------------------------------------------------------


def test_a_head_is_initialized_to_zero(kind: str, folders: dict[str, Path]) -> None:
    base_model = load(folders[kind])
    assert base_model.head_names == HEADS[kind]
    assert (base_model.is_causal, base_model.has_token_types) == (False, kind in TYPED)
    with three_lanes(base_model, 0.3) as adapters, adapters.disable_adapters(), torch.no_grad():
        assert not compute_logits(base_model, Same(), batch_of(base_model))[0].any()


def test_logits_of_one_lane_equal_those_of_transformers_without_padding(
    kind: str, folders: dict[str, Path]
) -> None:
    """transformers' own class computes each text alone, with the tokenizer's token types and no mask."""
    base_model = load(folders[kind])
    own = AutoModelForSequenceClassification.from_pretrained(folders[kind], num_labels=2).eval()
    words = AutoTokenizer.from_pretrained(folders[kind])
    with three_lanes(base_model, 0.3) as adapters, torch.no_grad():
        head = {k: v for k, v in adapters.trainable("y").items() if adapters.is_head(k)}
        adapters.remove_lane("x")
        adapters.remove_lane("z")
        for name, parameter in own.named_parameters():
            if name in head:
                parameter.copy_(head[name])
        found = attach(own, variants.get("lora"), VariantSettings(rank=4, alpha=8.0), "blocks")
        found.add_lane("y", VariantSettings(rank=4, alpha=8.0), seed=0)
        for name, parameter in found.trainable("y").items():
            parameter.copy_(adapters.trainable("y")[name])
        for length in (40, 64):  # DeBERTa has no buckets at the first length, and buckets at the second
            with adapters.activate_lanes(["y"], None, rows_per_lane=16):
                logits, _ = compute_logits(base_model, Same(), batch_of(base_model, length))
            assert logits.std(dim=0).min() > 0.01
            for example, lane_logits in zip(Same().examples("train", 16), logits, strict=True):
                text = words(example.prompt, example.pair, return_tensors="pt")
                text.pop("attention_mask")
                if kind not in TYPED:
                    text.pop("token_type_ids", None)
                with found.activate_lanes(["y"], None):
                    torch.testing.assert_close(own(**text).logits[0], lane_logits, rtol=1e-4, atol=1e-5)


def test_a_causal_encoder_is_refused(tmp_path: Path) -> None:
    """The head of a causal encoder would read the first token, which attends to no other token."""
    folder = encoders.save("bert", tmp_path / "decoder", is_decoder=True)
    choice = ModelChoice(str(folder), base_store.content_hash(folder))
    for call in (loading.build_meta_model, partial(loading.load_base_model, device="cpu")):
        with pytest.raises(UsageError, match="set is_decoder to false"):
            call(choice, tmp_path, task=Same())


# -- lanes -----------------------------------------------------------------------------------------------


def train_together(members: list[Configuration], folder: Path, work: Path) -> list[Record]:
    load_model = partial(loading.load_base_model, root=folder, device="cpu")
    model = ModelChoice(str(folder), base_store.content_hash(folder))
    store = Store(work)
    train(
        Script(leases(members)),
        store,
        lanes=len(members),
        data=work.parent / "data",
        load_base_model=lambda choice, task: load_model(model, task=task),
    )
    records = [store.get(one.fingerprint) for one in members]
    assert all(record is not None and record.state == "finished" for record in records), [
        record and record.traceback for record in records
    ]
    return records  # type: ignore[return-value]


USER_FILE = """
from test_encoders import Same as Base

class Same(Base):
    name = "same"
"""


FEW = ("deberta",)
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in HEADS if kind not in FEW]


@pytest.mark.parametrize("kind", [*FEW, *MORE])
def test_lanes_learn_and_a_lane_in_a_group_equals_the_lane_alone(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "same.py"
    path.write_text(USER_FILE)
    # Every step has the same eight rows, so their loss falls in a model that learns.
    members = [
        configuration(task=str(path), seed=seed, rate=rate, train_size=8)
        for seed, rate in ((0, 1e-2), (1, 3e-3))
    ]
    together = train_together(members, folders[kind], tmp_path / "group")
    assert all(record.provenance.lane_group_size == 2 for record in together)
    for number, one in enumerate(members):
        (alone,) = train_together([one], folders[kind], tmp_path / f"alone-{number}")
        assert numbers_of(alone) == numbers_of(together[number])
        # Each step changes the loss, except the first one, whose learning rate is 0.
        assert len({step.loss for step in alone.curve[1:]}) == 7
        assert alone.curve[-1].loss < alone.curve[0].loss


# -- pairs -----------------------------------------------------------------------------------------------


def test_token_types_reach_only_models_that_have_them_and_are_0_at_padding(folders: dict[str, Path]) -> None:
    base_model = load(folders["bert"])
    batch = batch_of(base_model)
    assert not batch.token_type_ids[~batch.attention_mask].any()
    for example, types, length in zip(
        Same().examples("train", 16), batch.token_type_ids, batch.lengths.tolist(), strict=True
    ):
        assert types[:length].tolist() == base_model.tokenizer(example.prompt, example.pair)["token_type_ids"]
    both = Batch.concatenate([batch, replace(batch, second_segment_starts=batch.lengths)])
    assert torch.equal(both.token_type_ids[:16], batch.token_type_ids)
    assert not both.token_type_ids[16:].any()
    for kind in ("bert", "electra", "deberta", "distilbert"):
        base_model = load(folders[kind])
        batch = batch_of(base_model)
        with three_lanes(base_model, 0.3) as adapters, adapters.activate_lanes(["y"], None), torch.no_grad():
            given, _ = compute_logits(base_model, Same(), batch)
            without, _ = compute_logits(
                base_model, Same(), replace(batch, second_segment_starts=batch.lengths)
            )
        assert torch.equal(given, without) == (kind not in TYPED)


def truncate_as_glue_does(first: list[int], second: list[int], most: int) -> tuple[list[int], list[int]]:
    """Remove one token at a time from the end of the longer text, like GLUE's reference code."""
    first, second = list(first), list(second)
    while len(first) + len(second) > most:
        (first if len(first) > len(second) else second).pop()
    return first, second


@pytest.mark.parametrize("kind", ["roberta", "bert", "deberta"])
@pytest.mark.parametrize(("a", "b"), [(60, 5), (5, 60), (40, 41), (60, 60), (18, 18), (30, 3)])
def test_a_long_pair_is_truncated_at_the_end_of_its_longer_text(
    kind: str, a: int, b: int, folders: dict[str, Path]
) -> None:
    words = AutoTokenizer.from_pretrained(folders[kind])
    draw = random.Random(a * 100 + b)
    one, two = (" ".join(draw.choices("abcdefg", k=size)) for size in (a, b))
    (row,) = encode_examples([Example(one, "same", two)], Same(), words, 40)
    first, second = (words(text, add_special_tokens=False)["input_ids"] for text in (one, two))
    special = words.num_special_tokens_to_add(pair=True)
    whole = words(one, two)["input_ids"]
    if len(whole) <= 40:
        assert list(row.ids) == whole
        return
    assert len(row.ids) == 40
    kept_first, kept_second = truncate_as_glue_does(first, second, 40 - special)
    found = [i for i in row.ids if i not in words.all_special_ids]
    place = next(n for n, i in enumerate(row.ids[1:], 1) if i in words.all_special_ids) - 1
    # If both texts are truncated to an odd total, libraries differ in which text keeps one token more.
    assert abs(place - len(kept_first)) <= 1
    assert found[:place] == first[:place]
    assert found[place:] == second[: len(found) - place]
    assert len(found) == len(kept_first) + len(kept_second)
    if row.second_segment_start is not None:
        assert row.second_segment_start == place + 2
    assert row.targets == (*[IGNORE_INDEX] * 39, 1)
