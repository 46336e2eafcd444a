"""Attaching adapters, adding and removing lanes, merging, and restoring the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import MergeError, UnsupportedError, VariantSettings
from variants.baseline.lora import LoRA
from variants.errors import BypassedLayerError, UnassignedRowsError
from variants.merging import merge_and_detach
from variants.testing.rig import Case, LaneOptimizer, attach_lanes, lane_outputs, train_step

SETTINGS = VariantSettings(rank=2, alpha=4.0)


class Blocks(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def adapted(
    model: nn.Module, lanes: int = 2, name: str = "lora", settings: VariantSettings = SETTINGS
) -> Adapters:
    adapters = attach(model, catalogue.get(name), settings)
    for lane in range(lanes):
        adapters.add_lane(f"lane{lane}", settings, seed=lane)
    return adapters


def randomize(adapters: Adapters) -> None:
    with torch.no_grad():
        for seed, lane in enumerate(adapters.lanes):
            for parameter in adapters.trainable(lane).values():
                parameter.normal_(generator=torch.Generator().manual_seed(seed))


def test_rows_without_a_lane_are_refused() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)))
    with pytest.raises(UnassignedRowsError, match=r"blocks\.0 was called outside"):
        adapters.model(torch.randn(4, 6))
    with (
        adapters.activate_lanes(["lane0", "lane1"], None),
        pytest.raises(UnassignedRowsError, match="3 rows"),
    ):
        adapters.model(torch.randn(3, 6))
    with (
        adapters.activate_lanes(["lane0", "lane1"], None, rows_per_lane=4),
        pytest.raises(UnassignedRowsError, match="4 rows"),
    ):
        adapters.model(torch.randn(4, 6))
    with (
        pytest.raises(KeyError, match="no lane 'x'; there are: lane0, lane1"),
        adapters.activate_lanes(["x"], None),
    ):
        pass
    with pytest.raises(ValueError, match="each once"), adapters.activate_lanes(["lane0", "lane0"], None):
        pass
    with pytest.raises(ValueError, match="1 dropout steps for 2 lanes"):
        adapters.activate_lanes(["lane0", "lane1"], [1]).__enter__()


def test_contexts_nest_and_close_on_errors() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)))
    randomize(adapters)
    x = torch.randn(2, 6)
    with pytest.raises(ZeroDivisionError), adapters.activate_lanes(["lane0"], None):
        raise ZeroDivisionError
    with pytest.raises(UnassignedRowsError):
        adapters.model(x)
    with adapters.disable_adapters():
        base = adapters.model(x)
        with adapters.activate_lanes(["lane0"], None):
            assert not torch.equal(adapters.model(x), base)
        assert torch.equal(adapters.model(x), base)


def test_lanes_can_be_added_and_removed() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)), lanes=3)
    randomize(adapters)
    x = torch.randn(8, 6)
    with adapters.activate_lanes(["lane2"], None):
        alone = adapters.model(x)
    adapters.remove_lane("lane1")
    assert adapters.lanes == ("lane0", "lane2")
    with adapters.activate_lanes(["lane0", "lane2"], None):
        assert torch.equal(adapters.model(torch.cat([x, x]))[8:], alone)
    with pytest.raises(ValueError, match="'lane0' is there already"):
        adapters.add_lane("lane0", SETTINGS, seed=0)
    with pytest.raises(UnsupportedError, match="rank 3 differs from the lane group's 2"):
        adapters.add_lane("lane9", VariantSettings(rank=3, alpha=4.0), seed=0)


def test_a_parameter_change_inside_the_context_takes_effect() -> None:
    """Cached results of `prepare` must not be used after a change of the parameters."""
    adapters = adapted(Blocks(nn.Linear(6, 6)), lanes=1)
    x = torch.randn(2, 6)
    with torch.no_grad(), adapters.activate_lanes(["lane0"], None):
        before = adapters.model(x)
        assert torch.equal(adapters.model(x), before)
        randomize(adapters)
        assert not torch.equal(adapters.model(x), before)


def test_initial_tensors_depend_only_on_seed_layer_and_parameter() -> None:
    first = adapted(Blocks(nn.Linear(6, 6), nn.Linear(6, 6)), lanes=2)
    again = adapted(Blocks(nn.Linear(6, 6), nn.Linear(6, 6)), lanes=1, name="dora")
    a = "blocks.0.A"
    assert torch.equal(first.trainable("lane0")[a], again.trainable("lane0")[a])
    assert not torch.equal(first.trainable("lane0")[a], first.trainable("lane1")[a])
    assert not torch.equal(first.trainable("lane0")[a], first.trainable("lane0")["blocks.1.A"])


def test_initial_tensors_and_masks_do_not_use_the_global_random_state() -> None:
    model = Blocks(nn.Linear(6, 6))
    before = torch.get_rng_state()
    adapters = adapted(model, settings=VariantSettings(2, 4.0, dropout=0.5))
    with adapters.activate_lanes(["lane0", "lane1"], 3):
        adapters.model(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_layer_is_replaced_and_restored_everywhere() -> None:
    layer = nn.Linear(6, 6)
    model = Blocks(layer, layer)
    adapters = adapted(model, lanes=1)
    assert model.blocks[0] is model.blocks[1] is adapters.layers["blocks.0"]
    adapters.detach()
    assert model.blocks[0] is model.blocks[1] is layer


def test_requires_grad_is_restored() -> None:
    model = Blocks(nn.Linear(6, 6), nn.Linear(6, 6))
    model.blocks[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    adapters = adapted(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UnsupportedError, match="carries adapters already"):
        adapted(model)
    adapters.detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    adapted(model).detach()


def test_merging_is_refused_if_it_would_change_other_lanes_or_modules() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)))
    with pytest.raises(MergeError, match="while lane1 uses the same base"):
        merge_and_detach(adapters, "lane0")
    model = Blocks(nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 6))
    model.head.weight = model.blocks[0].weight
    adapters = adapted(model, lanes=1)
    with pytest.raises(MergeError, match=r"blocks\.0 shares its weight with head"):
        merge_and_detach(adapters, "lane0")


def test_an_output_layer_that_shares_its_weight_with_the_embeddings_gets_its_own(tmp_path: Path) -> None:
    config = copy.deepcopy(Case("llama", model="llama").build().config)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    adapters = attach(model, catalogue.get("lora"), SETTINGS, "q_proj,lm_head")
    adapters.add_lane("a", SETTINGS, 0)
    with torch.no_grad():
        for parameter in adapters.trainable("a").values():
            parameter.normal_(std=0.3)
    rows = torch.arange(16).view(8, 2)
    with torch.no_grad(), adapters.activate_lanes(["a"], None):
        expected = model(input_ids=rows).logits
    merge_and_detach(adapters, "a")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=rows).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


class Unmergeable(LoRA):
    name = "unmergeable"
    merge_obstacle = "its update is no matrix"


def test_a_refused_merge_changes_nothing() -> None:
    model = Blocks(nn.Linear(6, 6))
    before = model.blocks[0].weight.clone()
    adapters = attach(model, Unmergeable(), SETTINGS)
    adapters.add_lane("a", SETTINGS, 0)
    with pytest.raises(MergeError, match="unmergeable cannot be merged: its update is no matrix"):
        merge_and_detach(adapters, "a")
    assert torch.equal(model.blocks[0].weight, before)
    assert adapters.lanes == ("a",)


class BypassingLayer(nn.Linear):
    """A layer that reads the weight of its child without calling it, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_a_bypassed_layer_is_an_error() -> None:
    adapters = attach(Blocks(BypassingLayer()), catalogue.get("lora"), SETTINGS, "inner")
    adapters.add_lane("a", SETTINGS, 0)
    with pytest.raises(BypassedLayerError, match=r"blocks\.0\.inner"), adapters.activate_lanes(["a"], None):
        adapters.model(torch.randn(2, 6))


def test_models_can_read_attributes_of_the_replaced_layer() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)))
    layer = adapters.layers["blocks.0"]
    assert (layer.in_features, layer.weight.dtype) == (6, torch.float32)
    with pytest.raises(AttributeError):
        layer.nothing  # noqa: B018


def test_restoring_a_lane_names_tensors_that_do_not_fit() -> None:
    adapters = adapted(Blocks(nn.Linear(6, 6)))
    with pytest.raises(UnsupportedError, match=r"'blocks\.7' is not adapted"):
        adapters.restore_lane("new", {"blocks.7.A": torch.ones(2, 6)}, {}, SETTINGS)
    with pytest.raises(UnsupportedError, match=r"'blocks\.0' is missing"):
        adapters.restore_lane("new", {}, {}, SETTINGS)


# Full fine-tuning, in which the lane's copies replace the model's parameters during computation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_lanes_copies_are_float32_and_leave_the_model_and_its_dtype(dtype: torch.dtype) -> None:
    case = Case("full", model="llama", dtype=dtype)
    model = case.build()
    frozen = dict(model.named_parameters())
    adapters = attach_lanes(case, catalogue.get("full"), 1, model=model)
    assert {p.dtype for p in adapters.trainable("0").values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in adapters.trainable("0").items()}
    # The learning rate is below the resolution of most weights in bfloat16.
    train_step(case, adapters, {"0": LaneOptimizer(adapters, "0", 1e-4, 1)})
    assert all(not torch.equal(p, before[name]) for name, p in adapters.trainable("0").items())
    assert lane_outputs(case, adapters).dtype == dtype
    with pytest.raises(RuntimeError, match="in the middle"), adapters.activate_lanes(["0"], 0):
        raise RuntimeError("in the middle")
    assert all(parameter is frozen[name] for name, parameter in model.named_parameters())
    assert adapters.max_lanes == 1
    with pytest.raises(UnsupportedError, match="one lane at a time"):
        adapters.add_lane("1", adapters.settings, seed=1)
