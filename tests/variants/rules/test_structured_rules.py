"""Update rules of the variants whose update is no product of two factors of low rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import C3AConfig, get_peft_model
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.lokr.layer import factorization
from rule import adapt, check_output, check_update, weight_change
from torch import Tensor, nn

from variants import catalogue
from variants.adapters import attach
from variants.api import Params, UnsupportedError, VariantSettings
from variants.storage import load_peft, save_peft
from variants.testing.rig import (
    Case,
    LaneOptimizer,
    attach_lanes,
    base_outputs,
    lane_outputs,
    perturb_lanes,
    relative_error,
)

# C3A's rule and initialization, and a comparison with PEFT, whose gradient of the input is wrong.


ROWS = 8


def c3a_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    kernels = params["w"]
    size = kernels.shape[2]
    rows = [
        torch.cat([torch.stack([w[(j - i) % size] for j in range(size)]) for w in row])
        for row in kernels
        for i in range(size)
    ]
    return torch.stack(rows) / weight.shape[1]


@pytest.mark.parametrize(("block_size", "size"), [(256, 8), (4, 4), (1, 1), (6, 2)])
def test_c3a_the_update_is_a_grid_of_circulant_blocks(block_size: int, size: int) -> None:
    settings = VariantSettings(extra={"block_size": block_size})
    check_update("c3a", c3a_change, settings)
    for layer in adapt("c3a", settings, perturb=False).layers.values():
        out_features, in_features = layer.frozen_layer.shape
        w = layer.lane_tensors("0")["w"]
        assert w.shape == (out_features // size, in_features // size, size)
        bound = (6 / (out_features + in_features)) ** 0.5
        assert 0.9 * bound < w.abs().max() <= bound


def test_c3a_ten_steps_of_a_single_layer_equal_those_of_peft() -> None:
    """In the first layer of a model, PEFT's gradient of the input is not used."""
    noise = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, dtype=torch.float64))
    reference = get_peft_model(copy.deepcopy(base), C3AConfig(block_size=8, target_modules=["0"]))
    kernel = next(parameter for parameter in reference.parameters() if parameter.requires_grad)
    settings = VariantSettings(extra={"block_size": 8})
    adapters = attach(base, catalogue.get("c3a"), settings, targets="re:0")
    adapters.add_lane("0", settings, 0)
    (ours,) = adapters.trainable("0").values()
    with torch.no_grad():
        ours.copy_(kernel)
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in (ours, kernel)]
    before = ours.detach().clone()
    for step in range(10):
        x, target = (torch.randn(ROWS, n, generator=noise, dtype=torch.float64) for n in (24, 40))
        with adapters.activate_lanes(["0"], step, rows_per_lane=ROWS):
            losses = [(model(x) - target).square().mean() for model in (base, reference)]
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # PEFT computes in float32
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, kernel.to(ours.dtype), rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().mean() > 0.1


def test_c3a_the_gradient_of_the_input_is_wrong_in_peft() -> None:
    """PEFT 0.21 multiplies with the transposed spectrum, so steps of a whole model cannot be compared."""
    noise = torch.Generator().manual_seed(0)
    w, x = (torch.randn(shape, generator=noise, dtype=torch.float64) for shape in ((3, 2, 4), (5, 8)))
    x.requires_grad_()
    assert not torch.autograd.gradcheck(
        lambda x: BlockCircularConvolution.apply(x, w), (x,), raise_exception=False
    )


# DenseLoRA's rule and initialization.


DENSE_LORA_SETTINGS = VariantSettings(2, 8.0, extra={"rank_factor": 3})


def encode_adapt_decode(
    x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float
) -> Tensor:
    """Apply encoder, GELU, M, decoder and GELU, as `Linear.forward` of the authors' code does."""

    def gelu(y: Tensor) -> Tensor:
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2

    return s * gelu(gelu(x @ params["A"].T) @ params["M"].T @ params["B"].T)


def test_dense_lora_the_update_is_decoder_of_m_of_encoder() -> None:
    check_output("dense_lora", encode_adapt_decode, settings=DENSE_LORA_SETTINGS)


def test_dense_lora_encoder_and_decoder_are_shared_and_m_is_not() -> None:
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("dense_lora"), 1, DENSE_LORA_SETTINGS)
    tensors = adapters.trainable("0")
    group = "group:model.layers.self_attn.k_proj"
    assert tensors[f"{group}.A"].shape == (6, 32)
    assert tensors[f"{group}.B"].shape == (16, 6)
    assert not tensors[f"{group}.B"].any()
    first, second = (tensors[f"model.layers.{block}.self_attn.k_proj.M"] for block in (0, 1))
    assert first.shape == (6, 6)
    assert not torch.equal(first, second)


def test_dense_lora_m_is_kaiming_uniform() -> None:
    settings = VariantSettings(8, 16.0)
    adapters = attach_lanes(Case("wide"), catalogue.get("dense_lora"), 1, settings)
    m = adapters.trainable("0")["there.0.M"]
    expected = nn.init.kaiming_uniform_(torch.empty(1000, 192), a=math.sqrt(5))
    assert m.shape == (192, 192), "the published study's r = 192"
    assert m.abs().max() <= 192**-0.5
    torch.testing.assert_close(m.std(), expected.std(), rtol=0.03, atol=0)
    assert adapters.variant.scaling(adapters.settings) == 384 / 192, "the published study's alpha = 384"


# FourierFT's rule, its locations and its initialization.


FOURIER_FT_SETTINGS = VariantSettings(extra={"frequencies": 50, "scale": 7.0})


def fourier_ft_change(
    params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float
) -> Tensor:
    (out_features, in_features), (rows, columns) = weight.shape, params["locations"].long()
    i = torch.arange(out_features, dtype=torch.float64).view(-1, 1, 1)
    j = torch.arange(in_features, dtype=torch.float64).view(1, -1, 1)
    waves = torch.cos(2 * math.pi * (i * rows / out_features + j * columns / in_features))
    return 7.0 * (waves * params["entries"]).sum(2) / (out_features * in_features)


def test_fourier_ft_the_update_is_a_sum_of_cosine_waves() -> None:
    check_update("fourier_ft", fourier_ft_change, FOURIER_FT_SETTINGS)


def test_fourier_ft_entries_begin_normal_at_distinct_locations_that_layers_of_equal_shape_share() -> None:
    adapters = adapt("fourier_ft", VariantSettings(extra={"frequencies": 600}), perturb=False)
    adapters.add_lane("other seed", adapters.settings, 1)
    found = {}
    for lane in adapters.lanes:
        entries = torch.cat([layer.lane_tensors(lane)["entries"] for layer in adapters.layers.values()])
        assert entries.shape == (4 * 600,)
        assert abs(entries.mean()) < 0.1
        assert abs(entries.std() - 1) < 0.1
        assert entries.unique().shape == entries.shape
        for name, layer in adapters.layers.items():
            locations = layer.lane_tensors(lane)["locations"]
            assert not locations.is_floating_point()
            assert locations.unique(dim=1).shape == locations.shape == (2, 600)
            assert [int(side.max()) + 1 for side in locations] == list(layer.frozen_layer.shape)
            found[lane, name] = locations
    assert torch.equal(found["0", "there.0"], found["0", "there.1"])
    assert not torch.equal(found["0", "there.0"], found["0", "back.0"])
    assert not torch.equal(found["0", "there.0"], found["other seed", "there.0"])


def test_fourier_ft_a_small_layer_has_all_entries() -> None:
    every = VariantSettings(extra={"frequencies": 1000, "scale": 1.0})
    for tensor in adapt("fourier_ft", every, out_features=16, in_features=8).frozen("0").values():
        assert tensor.unique(dim=1).shape == (2, 128)


# GraLoRA's rule, with and without the hybrid, and its initialization.


def gralora_change(
    params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float
) -> Tensor:
    count, ranks = len(params["A"]), params["A"].shape[2] // len(params["A"])
    grid = []
    for j in range(count):
        row = []
        for n in range(count):
            down = params["A"][n][:, j * ranks : (j + 1) * ranks].T  # (ranks, in / k)
            up = params["B"][j][n * ranks : (n + 1) * ranks].T  # (out / k, ranks)
            row.append(up @ down)
        grid.append(torch.cat(row, dim=1))
    matrix, rank = torch.cat(grid), settings.rank
    if "HA" in params:
        matrix, rank = matrix + params["HB"] @ params["HA"], rank + len(params["HA"])
    return settings.alpha / rank * matrix


@pytest.mark.parametrize(("blocks", "hybrid_rank"), [(2, 0), (4, 3), (1, 1)])
def test_gralora_each_block_of_the_grid_has_a_lora(blocks: int, hybrid_rank: int) -> None:
    extra = {"blocks": blocks, "hybrid_rank": hybrid_rank}
    check_update("gralora", gralora_change, VariantSettings(8, 6.0, extra=extra))


def test_gralora_the_factors_on_the_output_side_begin_at_zero() -> None:
    settings = VariantSettings(4, extra={"blocks": 2, "hybrid_rank": 3})
    for layer in adapt("gralora", settings, perturb=False).layers.values():
        tensors, (out_features, in_features) = layer.lane_tensors("0"), layer.frozen_layer.shape
        assert tensors["A"].shape == (2, in_features // 2, 4)
        assert tensors["B"].shape == (2, 4, out_features // 2)
        assert not tensors["B"].any()
        assert not tensors["HB"].any()
        for name, fan_in in (("A", in_features // 2), ("HA", in_features)):
            assert 0.8 * fan_in**-0.5 < tensors[name].abs().max() <= fan_in**-0.5, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VariantSettings(3), "rank 3: must be a multiple of blocks 2"),
        (VariantSettings(16, extra={"blocks": 16}), r"there\.0 has 24 inputs: blocks 16"),
    ],
)
def test_gralora_sizes_that_do_not_fit_are_refused(settings: VariantSettings, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        adapt("gralora", settings)


# LoHa's rule and initialization, and two defects of a published implementation.


LOHA_SETTINGS = VariantSettings(rank=3, alpha=6.0)


def loha_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    first = torch.einsum("or,ri->oi", params["B1"], params["A1"])
    second = torch.einsum("or,ri->oi", params["B2"], params["A2"])
    return 6.0 / 3 * first * second


def test_loha_the_update_is_the_elementwise_product_of_two_low_rank_matrices() -> None:
    check_update("loha", loha_change, LOHA_SETTINGS)


def test_loha_one_factor_begins_at_zero_and_the_others_are_kaiming_uniform() -> None:
    for layer in adapt("loha", LOHA_SETTINGS, perturb=False).layers.values():
        tensors, (out_features, in_features) = layer.lane_tensors("0"), layer.frozen_layer.shape
        assert tensors["B1"].shape == tensors["B2"].shape == (out_features, 3)
        assert tensors["A1"].shape == tensors["A2"].shape == (3, in_features)
        assert not tensors["A2"].any()
        for name in ("A1", "B1", "B2"):
            bound = tensors[name].shape[1] ** -0.5
            assert 0.9 * bound < tensors[name].abs().max() <= bound, name
        assert not torch.equal(tensors["B1"], tensors["B2"])


# LoKr's rule, its divisors and its initialization.


def lokr_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    second = params["D"] if "D" in params else params["B"] @ params["A"]
    blocks = [[entry * second for entry in row] for row in params["C"]]
    matrix = torch.cat([torch.cat(row, dim=1) for row in blocks])
    return settings.alpha / settings.rank * matrix


@pytest.mark.parametrize(("rank", "factor"), [(3, -1), (4, -1), (3, 2), (4, 5), (2, 12)])
def test_lokr_the_update_is_a_kronecker_product(rank: int, factor: int) -> None:
    check_update("lokr", lokr_change, VariantSettings(rank, 6.0, extra={"factor": factor}))


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 5, 16, 60])
def test_lokr_the_sides_are_divided_as_in_peft(factor: int) -> None:
    for out_features, in_features in ((40, 24), (60, 48), (17, 36), (96, 13)):
        settings = VariantSettings(1, extra={"factor": factor})
        sizes = {"out_features": out_features, "in_features": in_features}
        for layer in adapt("lokr", settings, perturb=False, **sizes).layers.values():
            first, second = (factorization(side, factor) for side in layer.frozen_layer.shape)
            tensors = layer.lane_tensors("0")
            assert tensors["C"].shape == (first[0], second[0])
            is_low_rank = max(first[1], second[1]) > 2
            assert tensors.keys() == ({"A", "B", "C"} if is_low_rank else {"C", "D"})
            if is_low_rank:
                assert (tensors["B"].shape, tensors["A"].shape) == ((first[1], 1), (1, second[1]))
            else:
                assert tensors["D"].shape == (first[1], second[1])


@pytest.mark.parametrize(("rank", "names"), [(3, {"A", "B"}), (4, {"D"})])
def test_lokr_only_the_small_factor_begins_at_zero(rank: int, names: set[str]) -> None:
    for layer in adapt("lokr", VariantSettings(rank), perturb=False).layers.values():
        tensors = layer.lane_tensors("0")
        assert not tensors["C"].any()
        assert tensors.keys() == {"C", *names}
        for name in names:
            bound = tensors[name].shape[1] ** -0.5
            assert 0.8 * bound < tensors[name].abs().max() <= bound, name


def test_lokr_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="factor 0: must be at least 1, or -1 for no limit"):
        adapt("lokr", VariantSettings(2, extra={"factor": 0}))


# MiSS's rule and initialization.


def miss_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    rank = len(params["D"])
    return torch.stack([params["D"][column % rank] for column in range(weight.shape[1])], dim=1)


@pytest.mark.parametrize("rank", [4, 7])  # 7 divides neither 24 nor 40
def test_miss_one_matrix_is_repeated_along_the_inputs(rank: int) -> None:
    check_update("miss", miss_change, VariantSettings(rank, alpha=3.0))


def test_miss_the_matrix_begins_at_zero() -> None:
    tensors = adapt("miss", VariantSettings(3), perturb=False).trainable("0")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 40), (3, 24)}
    assert not any(tensor.any() for tensor in tensors.values())


# MoRA's rule in the two forms that its authors recommend, and its initialization.


def rotation_matrix(piece: int, size: int) -> Tensor:
    """Return RoPE's rotation (size, size) of a piece of the input."""
    matrix, half = torch.zeros(size, size, dtype=torch.float64), size // 2
    for pair in range(half):
        angle = piece / 10000 ** (2 * pair / size)
        matrix[pair, pair] = matrix[pair + half, pair + half] = math.cos(angle)
        matrix[pair, pair + half], matrix[pair + half, pair] = -math.sin(angle), math.sin(angle)
    return matrix


def mora_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    (out_features, in_features), m = weight.shape, params["M"]
    size = len(m)
    count = math.ceil(in_features / size)
    matrix = torch.zeros_like(weight)
    for row in range(out_features):
        for piece in range(count):
            if settings["maps"] == "rotation" and piece != row // size % count:
                continue
            is_rotated = settings["maps"] == "rotation"
            values = (m @ rotation_matrix(piece, size) if is_rotated else m)[row % size]
            columns = torch.arange(piece * size, (piece + 1) * size) % in_features
            matrix = matrix.index_put((torch.tensor(row), columns), values, accumulate=True)
    return matrix


@pytest.mark.parametrize(
    ("maps", "rank", "size"), [("rotation", 3, 14), ("sharing", 3, 14), ("sharing", 1, 8)]
)
def test_mora_a_square_matrix_learns_between_fixed_maps(maps: str, rank: int, size: int) -> None:
    settings = VariantSettings(rank, alpha=5.0, extra={"maps": maps})
    check_update("mora", mora_change, settings)
    for tensor in adapt("mora", settings, perturb=False).trainable("0").values():
        assert tensor.shape == (size, size)
        assert not tensor.any()


def test_mora_the_size_of_the_matrix_is_even_only_where_pairs_are_rotated() -> None:
    for maps, size in (("rotation", 10), ("sharing", 11)):
        settings = VariantSettings(2, extra={"maps": maps})
        tensors = adapt("mora", settings, perturb=False).trainable("0")
        assert {tuple(tensor.shape) for tensor in tensors.values()} == {(size, size)}


def test_mora_a_matrix_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"there.0 \(40 x 24\): rank 12 gives M the size 28; it must"):
        adapt("mora", VariantSettings(12))


# RandLoRA's rule, initialization and export.


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
def test_rand_lora_the_update_is_a_sum_over_scaled_bases(normalized: bool, base_limit: int) -> None:
    extra = {"rank_factor": 2, "base_limit": base_limit, "normalized": normalized}
    check_update("rand_lora", sum_of_bases, settings=VariantSettings(2, 6.0, extra=extra))


def test_rand_lora_it_starts_at_the_base_with_bases_of_unit_deviation() -> None:
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


def test_rand_lora_without_a_limit_the_update_has_full_rank() -> None:
    ranks = []
    for base_limit in (1024, 16):
        settings = VariantSettings(4, 8.0, extra={"base_limit": base_limit})
        case = Case("tall", out_features=40, in_features=32, dtype=torch.float64)
        adapters = attach_lanes(case, catalogue.get("rand_lora"), 1, settings)
        for parameter in adapters.trainable("0").values():
            torch.nn.init.normal_(parameter)
        ranks.append(int(torch.linalg.matrix_rank(weight_change(adapters, "there.0"))))
    assert ranks == [32, 16]


def test_rand_lora_the_default_counts_equal_the_published_ones() -> None:
    """23.3 million values for Llama 3.1 8B, table II of the published study."""
    settings = catalogue.get("rand_lora").validate_settings(VariantSettings(8, 16.0))
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    r = settings.rank * settings["rank_factor"]
    count = sum(math.ceil(min(*shape, settings["base_limit"]) / r) * (r + min(shape)) for shape in shapes)
    assert round(32 * count / 1e6, 1) == 23.3


def test_rand_lora_a_limited_base_cannot_be_exported(tmp_path: Path) -> None:
    case = Case("tall", out_features=40, in_features=32)
    adapters = attach_lanes(case, catalogue.get("rand_lora"), 1, VariantSettings(4, extra={"base_limit": 16}))
    with pytest.raises(UnsupportedError, match="rand_lora with base_limit 16 cannot be exported"):
        save_peft(adapters, "0", tmp_path, "base")


def test_rand_lora_the_export_of_a_normalized_update_computes_the_same(tmp_path: Path) -> None:
    case = Case("tall", out_features=40, in_features=32, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("rand_lora"), 1)
    perturb_lanes(case, adapters)
    save_peft(adapters, "0", tmp_path, "base")
    loaded = load_peft(case.build(), tmp_path, lane="0")
    assert not loaded.lane_settings("0")["normalized"]
    assert relative_error(lane_outputs(case, loaded), lane_outputs(case, adapters)) < 1e-12


# SHiRA's rule and the random positions of its values.


def shira_change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    rows, columns = params["indices"].long()
    return torch.zeros_like(weight).index_put((rows, columns), params["values"])


def test_shira_the_values_are_added_to_single_weights() -> None:
    check_update("shira", shira_change, VariantSettings(3, alpha=5.0))


def test_shira_the_values_begin_at_zero_at_distinct_random_positions_in_row_major_order() -> None:
    adapters = adapt("shira", VariantSettings(3), perturb=False)
    adapters.add_lane("other seed", adapters.settings, 1)
    seen = []
    for lane in adapters.lanes:
        for name, layer in adapters.layers.items():
            (out_features, in_features), indices = (
                layer.frozen_layer.shape,
                layer.lane_tensors(lane)["indices"],
            )
            assert not indices.is_floating_point()
            assert not adapters.trainable(lane)[f"{name}.values"].any()
            flat = indices[0].long() * in_features + indices[1]
            assert indices.shape == (2, 3 * (out_features + in_features))
            assert torch.equal(flat, flat.unique())
            assert 0 <= flat[0] < flat[-1] < out_features * in_features
            assert indices[1].max() < in_features
            assert len(indices[0].unique()) > 0.9 * out_features, "some rows are never chosen"
            seen.append(tuple(flat.tolist()))
    assert len(set(seen)) == len(seen), "layers or lanes share their positions"


def test_shira_a_layer_with_too_few_weights_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"rank 16 is larger than layer there\.0 allows: at most 15"):
        adapt("shira", VariantSettings(16))


# VB-LoRA's rule and initialization.


def mixture(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the sum of the k chosen vectors, weighted by the softmax over their logits alone."""
    chosen = sorted(range(len(logits)), key=lambda i: -float(logits[i].detach()))[:k]
    weights = torch.stack([logits[i].exp() for i in chosen])
    return sum(w * bank[i] for w, i in zip(weights / weights.sum(), chosen, strict=True))  # type: ignore[return-value]


def mixed_factors(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    bank, k = params["bank"], int(settings["top_k"])
    a = torch.stack([torch.cat([mixture(piece, bank, k) for piece in rank]) for rank in params["PA"]])
    b = torch.cat([torch.stack([mixture(rank, bank, k) for rank in piece]).T for piece in params["PB"]])
    assert (len(b), a.shape[1]) == weight.shape
    return b @ a


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_vb_lora_the_update_is_a_product_of_mixed_factors(top_k: int) -> None:
    extra = {"vectors": 5, "vector_length": 4, "top_k": top_k}
    check_update("vb_lora", mixed_factors, settings=VariantSettings(3, extra=extra))


def test_vb_lora_initial_values_and_shapes() -> None:
    settings = VariantSettings(4, extra={"vector_length": 16})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("vb_lora"), 1, settings)
    tensors = adapters.trainable("0")
    assert tensors["group:vb_lora.bank"].shape == (256, 16)
    assert 0.0199 < tensors["group:vb_lora.bank"].abs().max() <= 0.02
    a, b = (tensors[f"model.layers.0.mlp.down_proj.P{name}"] for name in "AB")
    assert a.shape == (4, 3, 256)
    assert b.shape == (2, 4, 256)
    for logits in (a, b):
        torch.testing.assert_close(logits.std(), torch.tensor(0.1), rtol=0.05, atol=0)
        assert logits.mean().abs() < 0.01


def test_vb_lora_the_logits_learn_ten_times_as_fast_as_the_bank() -> None:
    settings = VariantSettings(4, extra={"vector_length": 8})
    case = Case("square")
    adapters = attach_lanes(case, catalogue.get("vb_lora"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 1e-3, 1)
    before = {name: p.detach().clone() for name, p in adapters.trainable("0").items()}
    with adapters.activate_lanes(["0"], 0):
        adapters.model(case.rows(0)).square().sum().backward()
    optimizer.step()
    steps = {n: (p.detach() - before[n]).abs().max().item() for n, p in adapters.trainable("0").items()}
    assert steps["group:vb_lora.bank"] == pytest.approx(1e-3, rel=0.01)
    assert steps["there.0.PA"] == pytest.approx(1e-2, rel=0.02)


def test_vb_lora_sizes_that_the_vectors_do_not_divide_are_refused_at_attach() -> None:
    settings = VariantSettings(2, extra={"vector_length": 16})
    with pytest.raises(UnsupportedError, match="vector_length 16 does not divide 40 x 32"):
        attach(Case("tall", out_features=40, in_features=32).build(), catalogue.get("vb_lora"), settings)


@pytest.mark.parametrize(
    ("case", "length"),
    [
        (Case("large", out_features=512, in_features=256), 256),
        (Case("tall", out_features=96, in_features=32), 32),
        (Case("llama", model="llama"), 16),
    ],
    ids=["256", "32", "16"],
)
def test_vb_lora_the_default_length_is_the_largest_divisor_of_256_that_divides_all_sides(
    case: Case, length: int
) -> None:
    adapters = attach_lanes(case, catalogue.get("vb_lora"), 1)
    assert adapters.trainable("0")["group:vb_lora.bank"].shape == (256, length)


def test_vb_lora_more_vectors_in_a_mixture_than_in_the_bank_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="top_k 3: must be at most vectors 2"):
        catalogue.get("vb_lora").validate_settings(VariantSettings(extra={"vectors": 2, "top_k": 3}))
