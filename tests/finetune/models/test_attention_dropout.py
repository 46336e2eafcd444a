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
    SimulatedCrashError,
    configuration,
    dies_at,
    leases,
    numbers_of,
    solo,
    tiny_base_model,
    train,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from orchestrator.finetune.models import attention_dropout, deberta
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models.activation_checkpointing import enable_activation_checkpointing
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from variants import base_dropout, catalogue, forward_context
from variants.api import VariantSettings
from variants.attach import Adapters, attach
from variants.base_dropout import LaneDropout

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
    deberta.patch_deberta_attention(model)
    return model.eval().requires_grad_(False)


@contextmanager
def lane_with_dropout(model: Any) -> Iterator[Adapters]:
    attention_dropout.check_dropout_supported(model, "it")
    adapters = attach(model, catalogue.get("lora"), SETTINGS, base_dropout=True)
    attention_dropout.enable_lane_dropout(model)
    adapters.add_lane("lane", SETTINGS, seed=3)
    for number, parameter in enumerate(adapters.trainable("lane").values()):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    yield adapters
    attention_dropout.disable_lane_dropout(model)
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

    def drawn(*args: Any) -> Tensor:
        masks.append(forward_context.draw_dropout_masks(*args))
        return masks[-1]

    monkeypatch.setattr(base_dropout, "draw_dropout_masks", drawn)
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_restored(attention: str, tmp_path: Path) -> None:
    model = model_of("bert", tmp_path)
    model.config._attn_implementation = attention
    before = [(name, type(module), module.training) for name, module in model.named_modules()]
    with lane_with_dropout(model):
        assert [(n, type(m), m.training) for n, m in model.named_modules()] != before
        assert model.config._attn_implementation != attention
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == before
    assert model.config._attn_implementation == attention


def test_a_worker_draws_the_masks_of_its_own_rows(tmp_path: Path) -> None:
    with lane_with_dropout(model_of("bert", tmp_path)) as adapters:
        adapters.add_lane("other", SETTINGS, seed=4)
        dropout = next(m for m in adapters.model.modules() if isinstance(m, LaneDropout) and m.p)
        x = torch.ones(2 * ROWS, LENGTH, 32)
        with adapters.activate_lanes(["lane", "other"], [1, 5], rows_per_lane=ROWS):
            whole = dropout(x).view(2, ROWS, LENGTH, 32)
        assert not torch.equal(whole[0], whole[1])
        for first, last in ((0, 3), (3, ROWS)):
            mine = torch.ones(2 * (last - first), LENGTH, 32)
            with adapters.activate_lanes(
                ["lane", "other"], [1, 5], rows_per_lane=last - first, shard=(first, ROWS)
            ):
                assert torch.equal(dropout(mine).view(2, -1, LENGTH, 32), whole[:, first:last])


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
    with pytest.raises(SimulatedCrashError):
        train(Script(leases(together[:1]), answers=dies_at(4)), again)
    train(Script(leases(together[:1], attempt=2)), again)
    assert numbers_of(get(again, together[0])) == numbers_of(solo(together[0], tmp_path))


def test_activation_checkpointing_changes_no_result(store: Store, tmp_path: Path) -> None:
    def recomputing(choice: ModelChoice, task: Task) -> BaseModel:
        base_model = tiny_base_model(choice, task)
        enable_activation_checkpointing(base_model.model)
        return base_model

    one = point(accumulation=2)
    train(Script(leases([one])), store, load_base_model=recomputing)
    assert numbers_of(get(store, one)) == numbers_of(solo(one, tmp_path))


def test_dropout_is_off_in_evaluation_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    """At a learning rate near 0, scores equal those without dropout, but training losses do not."""
    on, off = point(rate=1e-30), replace(point(rate=1e-30), base_dropout="off")
    assert on.fingerprint != off.fingerprint
    assert on.group_key != off.group_key
    with_it, without = solo(on, tmp_path), solo(off, tmp_path)
    assert with_it.evaluations == without.evaluations
    assert [s.loss for s in with_it.curve] != [s.loss for s in without.curve]


# -- options ---------------------------------------------------------------------------------------------


def test_only_glue_tasks_have_base_dropout_by_default() -> None:
    defaults = {name: tasks.get(name).defaults.base_dropout for name in tasks.names()}
    glue = {name for name in defaults if name.startswith("glue_")}
    assert len(glue) == 9
    assert {name for name, drops in defaults.items() if drops == "on"} == glue


@pytest.mark.parametrize(
    ("task", "kind", "more", "message"),
    [
        (
            "reviews",
            "bert",
            {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            "has no dropout",
        ),
        ("letters", "llama", {}, "has type 'llama'; must be one of bert, deberta, "),
    ],
)
def test_a_model_without_dropout_is_refused_in_one_line(
    task: str, kind: str, more: dict[str, float], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if kind == "llama":
        base_model = tiny_base_model(ModelChoice("tiny", "0" * 64))
        base_model.model.save_pretrained(folder)
        base_model.tokenizer.save_pretrained(folder)
    else:
        encoders.save(kind, folder, **more)
    typed = StudyOptions(model=str(folder), base_dropout="on")
    chosen = resolve_options(typed, task, ("lora",), tmp_path)
    content = model_catalogue.prepare_base_model(str(folder), tmp_path, lambda text: None)
    with pytest.raises(UsageError, match=message) as caught:
        build_configuration_templates(typed, chosen, content, tmp_path)
    assert "\n" not in str(caught.value)
    assert "Use --base-dropout off." in str(caught.value)
