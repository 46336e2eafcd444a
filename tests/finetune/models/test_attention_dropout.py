"""Dropout of the base model: at all its places in the model, with separate masks for each lane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from scripted import (
    Script,
    configuration,
    crash_at,
    leases,
    numbers_of,
    solo,
    train,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from orchestrator.finetune.models import changes
from orchestrator.finetune.sources import base_store
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue, forward_context
from variants.adapters import Adapters, attach
from variants.api import VariantSettings

SETTINGS = VariantSettings(rank=4, alpha=8.0)
ROWS, LENGTH = 8, 12


def model_of(kind: str, folder: Path) -> Any:
    """Return a classifier, or GPT-2's language model, with the default dropout of its class."""
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(**sizes)).eval().requires_grad_(False)
    encoders.save(kind, folder)
    with base_store.suppress_transformers_logging(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    changes.patch_deberta_attention(model)
    return model.eval().requires_grad_(False)


@contextmanager
def lane_with_dropout(model: Any) -> Iterator[Adapters]:
    changes.check_dropout_supported(model, "it")
    adapters = attach(model, catalogue.get("lora"), SETTINGS, base_dropout=True)
    changes.enable_lane_dropout(model)
    adapters.add_lane("lane", SETTINGS, seed=3)
    for number, parameter in enumerate(adapters.trainable("lane").values()):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    yield adapters
    changes.disable_lane_dropout(model)
    adapters.detach()


class GivenMasks(TorchFunctionMode):
    """A mode in which transformers' dropout uses given masks, in their order."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.dropout:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("input", "p", "training"), args, strict=False)) | (kwargs or {})
        if not given["training"] or given["p"] == 0:
            return given["input"]
        return given["input"] * self.masks.pop(0).view_as(given["input"])


@pytest.mark.parametrize("kind", [*encoders.KINDS, "gpt2"])
def test_outputs_equal_those_of_transformers_in_training_mode_with_the_same_masks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout has the same places and the same rate as in transformers, and no two masks are equal."""
    model = model_of(kind, tmp_path)
    ids = torch.randint(5, 25, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    real = torch.arange(LENGTH).expand(ROWS, LENGTH) < torch.tensor([[LENGTH], [LENGTH - 5]] * (ROWS // 2))
    given = {"input_ids": ids, "attention_mask": real.long()}
    masks: list[Tensor] = []
    draw_dropout_masks = forward_context.draw_dropout_masks

    def drawn(*args: Any) -> Tensor:
        masks.append(draw_dropout_masks(*args))
        return masks[-1]

    monkeypatch.setattr(forward_context, "draw_dropout_masks", drawn)
    with lane_with_dropout(model) as adapters, torch.no_grad():
        with adapters.activate_lanes(["lane"], 2, rows_per_lane=ROWS):
            ours = model(**given).logits
        with adapters.activate_lanes(["lane"], 2, rows_per_lane=ROWS):
            again = model(**given).logits
        with adapters.activate_lanes(["lane"], None, rows_per_lane=ROWS):
            clean = model(**given).logits
        masks = masks[: len(masks) // 2]
        assert not any(torch.equal(a, b) for a, b in combinations(masks, 2))
        assert torch.equal(ours, again)
        assert not torch.allclose(ours, clean, atol=1e-3)
        zeros = torch.cat([mask.flatten() for mask in masks]).eq(0).float().mean()
        assert 0.05 < zeros < 0.15
        parameters = {name: p.clone() for name, p in adapters.trainable("lane").items()}

    plain = attach(model, catalogue.get("lora"), SETTINGS)
    plain.add_lane("lane", SETTINGS, seed=0)
    with torch.no_grad():
        for name, parameter in plain.trainable("lane").items():
            parameter.copy_(parameters[name])
        with plain.activate_lanes(["lane"], None, rows_per_lane=ROWS):
            assert torch.equal(model(**given).logits, clean)
        model.train()
        if not kind.startswith("deberta"):
            model.config._attn_implementation = "eager"
        with plain.activate_lanes(["lane"], None, rows_per_lane=ROWS), GivenMasks(masks):
            theirs = model(**given).logits
    assert not masks, "transformers used all masks"
    if kind == "gpt2":  # GPT-2's logits at padding have no meaning
        ours, theirs = ours[real], theirs[real]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# -- lanes in the loop -----------------------------------------------------------------------------------


def point(seed: int = 0, **more: Any) -> Configuration:
    one = configuration(seed=seed, task="reviews", steps=8, evaluations=4, dropout=0.1, **more)
    return replace(one, base_dropout="on")


def get(store: Store, one: Configuration) -> Record:
    record = store.get(one.fingerprint)
    assert record is not None
    assert record.state == "finished", record.traceback
    return record


def test_a_lane_in_a_group_and_a_resumed_lane_equal_the_lane_alone(store: Store, tmp_path: Path) -> None:
    together = [point(seed, rate=0.003 * (seed + 1)) for seed in range(3)]
    train(Script(leases(together)), store)
    for one in together:
        record = get(store, one)
        assert record.provenance.lane_group_size == 3
        assert numbers_of(record) == numbers_of(solo(one, tmp_path))
    again = Store(tmp_path / "again")
    crash_at(4, together[:1], again)
    train(Script(leases(together[:1], attempt=2)), again)
    assert numbers_of(get(again, together[0])) == numbers_of(solo(together[0], tmp_path))


def test_dropout_is_off_in_evaluation_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    """At a learning rate near 0, scores equal those without dropout, but training losses do not."""
    on, off = point(rate=1e-30), replace(point(rate=1e-30), base_dropout="off")
    assert on.fingerprint != off.fingerprint
    assert on.group_key != off.group_key
    with_it, without = solo(on, tmp_path), solo(off, tmp_path)
    assert with_it.evaluations == without.evaluations
    assert [s.loss for s in with_it.curve] != [s.loss for s in without.curve]
