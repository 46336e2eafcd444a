"""RandLoRA's rule, initialization and export."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, UnsupportedError, VariantSettings
from variants.storage import load_peft, save_peft
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes, base_outputs, lane_outputs, perturb_lanes, relative_error


def sum_of_bases(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Add one outer product for each basis and rank.

    The j-th column of B in the order (basis, rank) belongs to the j-th scaled row of A in the order
    (rank, basis): this is how `get_scaled_bases` of PEFT and of the authors' code flattens both.
    """
    p, q = sorted(weight.shape)
    r, n = params["l"].shape
    assert r == settings.rank * settings["rank_factor"]
    assert n == math.ceil(min(p, settings["base_limit"]) / r)
    rows = [params["l"][k, i] * params["A"][k, 0, :p] * params["g"][i] for k in range(r) for i in range(n)]
    columns = [params["B"][:q, i, k] for i in range(n) for k in range(r)]
    change = s * sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
    assert isinstance(change, Tensor)
    if settings["normalized"]:
        change = change / math.sqrt(n)
    return change if weight.shape[0] == q else change.T


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("base_limit", [1024, 7])
def test_the_update_is_a_sum_over_scaled_bases(normalized: bool, base_limit: int) -> None:
    extra = {"rank_factor": 2, "base_limit": base_limit, "normalized": normalized}
    check_update("rand_lora", sum_of_bases, settings=VariantSettings(2, 6.0, extra=extra))


def test_it_starts_at_the_base_with_bases_of_unit_deviation() -> None:
    """The published study's code draws l from N(0, 1), and divides B by the deviation of A."""
    case = Case("llama", model="llama")
    adapters = attach_lanes(case, catalogue.get("rand_lora"), 1)
    assert torch.equal(lane_outputs(case, adapters), base_outputs(case, adapters))
    tensors, frozen = adapters.trainable("0"), adapters.frozen("0")
    assert tensors["model.layers.1.mlp.down_proj.l"].shape == (16, 2)
    assert not tensors["model.layers.1.mlp.down_proj.l"].any()
    assert (tensors["model.layers.1.mlp.down_proj.g"] == 1 / 32).all()
    assert {name: tuple(t.shape) for name, t in frozen.items()} == {
        "group:rand_lora.A": (16, 1, 48), "group:rand_lora.B": (48, 3, 16)
    }  # fmt: skip
    for basis in frozen.values():
        torch.testing.assert_close(basis.std(), torch.tensor(1.0))
        assert basis.abs().max() < 1.1 * math.sqrt(3), "uniform, as Kaiming's"


def test_without_a_limit_the_update_has_full_rank() -> None:
    ranks = []
    for base_limit in (1024, 16):
        settings = VariantSettings(4, 8.0, extra={"base_limit": base_limit})
        adapters = attach_lanes(
            Case("tall", out_features=40, in_features=32), catalogue.get("rand_lora"), 1, settings
        )
        for parameter in adapters.trainable("0").values():
            torch.nn.init.normal_(parameter)
        layer = adapters.layers["there.0"]
        tensors = {name: tensor.double() for name, tensor in layer.lane_tensors("0").items()}
        change = adapters.variant.delta_weight(
            tensors, layer.frozen_layer.with_settings(adapters.settings, 1.0)
        )
        ranks.append(int(torch.linalg.matrix_rank(change)))
    assert ranks == [32, 16]


def test_the_default_counts_equal_the_published_ones() -> None:
    """23.3 million values for Llama 3.1 8B, table II of the published study."""
    settings = catalogue.get("rand_lora").validate_settings(VariantSettings(8, 16.0))
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    r = settings.rank * settings["rank_factor"]
    count = sum(math.ceil(min(*shape, settings["base_limit"]) / r) * (r + min(shape)) for shape in shapes)
    assert round(32 * count / 1e6, 1) == 23.3


def test_a_limited_base_cannot_be_exported(tmp_path: Path) -> None:
    case = Case("tall", out_features=40, in_features=32)
    adapters = attach_lanes(case, catalogue.get("rand_lora"), 1, VariantSettings(4, extra={"base_limit": 16}))
    with pytest.raises(UnsupportedError, match="rand_lora with base_limit 16 cannot be exported"):
        save_peft(adapters, "0", tmp_path, "base")


def test_the_export_of_a_normalized_update_computes_the_same(tmp_path: Path) -> None:
    case = Case("tall", out_features=40, in_features=32, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("rand_lora"), 1)
    perturb_lanes(case, adapters)
    save_peft(adapters, "0", tmp_path, "base")
    loaded = load_peft(case.build(), tmp_path, lane="0")
    assert not loaded.lane_settings("0")["normalized"]
    assert relative_error(lane_outputs(case, loaded), lane_outputs(case, adapters)) < 1e-12
