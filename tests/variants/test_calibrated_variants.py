"""Calibration statistics, and the initializations that LoRA-GA and EVA compute from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import (
    Calibrated,
    CalibrationStatistic,
    FrozenLayer,
    Params,
    UnsupportedError,
    VariantSettings,
)
from variants.baseline.lora import LoRA
from variants.calibrate import calibrate
from variants.hooks import statistic_of
from variants.testing import Case

CALIBRATED = [name for name in catalogue.names() if statistic_of(catalogue.get(name)).needs_data]
BATCHES = 3
GPT2 = Case("gpt2", model="gpt2")
"""A model with layers of type Conv1D. The attention layers have the shape (32, 96)."""


class Gradients(Calibrated, LoRA):
    """A variant whose calibration tensor is the unchanged statistic."""

    calibration_statistic = CalibrationStatistic.MEAN_GRADIENT

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor) -> Params:
        return {"matrix": matrix}


class Inputs(Gradients):
    calibration_statistic = CalibrationStatistic.INPUT_COVARIANCE


class Moments(Gradients):
    calibration_statistic = CalibrationStatistic.INPUT_MOMENT


def ids(batch: int) -> Tensor:
    return torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(batch))


def batch_loss(model: nn.Module, batch: int) -> Tensor:
    return model(input_ids=ids(batch), labels=ids(batch)).loss


def losses(adapters: Adapters, passes: list[int], attention_mask: Tensor | None = None) -> Iterator[Tensor]:
    passes.append(len(passes))
    for batch in range(BATCHES):
        with adapters.disable_adapters(attention_mask=attention_mask):
            yield batch_loss(adapters.model, batch)


def calibration(adapters: Adapters, budget: int = 1 << 30) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return the calibration tensors and the number of passes over the batches."""
    passes: list[int] = []
    found = calibrate(adapters, adapters.settings, lambda: losses(adapters, passes), budget)
    return found, len(passes)


@pytest.mark.parametrize("variant", [Gradients(), Inputs(), Moments(), *map(catalogue.get, CALIBRATED)])
def test_a_small_memory_budget_takes_more_passes_with_equal_results(variant: LoRA) -> None:
    adapters = attach(GPT2.build(), variant, VariantSettings(3, 6.0))
    at_once, one = calibration(adapters)
    in_groups, several = calibration(adapters, budget=40_000)
    each, most = calibration(adapters, budget=1)
    assert (one, most) == (1, len(adapters.layers))
    assert one < several < most
    for found in (in_groups, each):
        assert found.keys() == at_once.keys() == adapters.layers.keys()
        for name, tensors in at_once.items():
            assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("variant", [Gradients(), Inputs(), Moments()])
def test_calibration_removes_its_hooks_and_gradients(variant: LoRA) -> None:
    adapters = attach(GPT2.build(), variant, VariantSettings(3, 6.0))
    calibration(adapters)
    assert not any(layer.base_layer._forward_hooks for layer in adapters.layers.values())
    assert all(parameter.grad is None for parameter in adapters.model.parameters())


def test_the_mean_gradient_equals_autograd_of_the_plain_model() -> None:
    """The mean gradient has the shape (out, in), although this model's weights have the shape (in, out)."""
    found, _ = calibration(attach(GPT2.build(), Gradients(), VariantSettings(3, 6.0)))
    plain = GPT2.build()
    for batch in range(BATCHES):
        (batch_loss(plain, batch) / BATCHES).backward()
    for name, tensors in found.items():
        module = plain.get_submodule(name)
        assert isinstance(module, Conv1D)
        assert module.weight.grad is not None
        torch.testing.assert_close(tensors["matrix"], module.weight.grad.T, rtol=1e-4, atol=1e-7)


def test_the_first_layer_of_a_frozen_model_gets_a_gradient() -> None:
    """No tensor before this layer needs a gradient, so the graph begins at its output."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(5, 7)])})
    adapters = attach(model, Gradients(), VariantSettings(2, 4.0))
    x = torch.randn(9, 5)

    def one() -> Iterator[Tensor]:
        with adapters.disable_adapters():
            yield adapters.layers["blocks.0"](x).square().sum()

    matrix = calibrate(adapters, adapters.settings, one)["blocks.0"]["matrix"]
    layer = adapters.layers["blocks.0"].frozen_layer
    assert layer.bias is not None
    torch.testing.assert_close(matrix, 2 * (x @ layer.weight.T + layer.bias).T @ x)


def statistic(x: Tensor, attention_mask: Tensor | None = None, variant: LoRA | None = None) -> Tensor:
    """Return the statistic that `calibrate` computes for inputs `x` (batches, rows, length, in).

    It is the covariance unless a variant with another statistic is given.
    """
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(x.shape[-1], 4)])})
    adapters = attach(model, variant or Inputs(), VariantSettings(2, 4.0))

    def batches() -> Iterable[Tensor]:
        for number, rows in enumerate(x):
            with (
                adapters.disable_adapters(
                    attention_mask=None if attention_mask is None else attention_mask[number]
                ),
                torch.no_grad(),
            ):
                yield adapters.layers["blocks.0"](rows).sum()

    return calibrate(adapters, adapters.settings, batches)["blocks.0"]["matrix"]


def test_inputs_are_centred_over_all_batches() -> None:
    """The inputs are far from zero, so mean(x x^T) - mean(x) mean(x)^T would have no correct digits."""
    x = torch.randn(4, 3, 6, 5) * torch.arange(1.0, 6) + 1000
    expected = torch.cov(x.double().reshape(-1, 5).T, correction=0)
    torch.testing.assert_close(statistic(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_padding_does_not_count_in_inputs() -> None:
    x = torch.randn(4, 3, 6, 5)
    attention_mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    attention_mask = attention_mask.expand(4, 3, 6)
    found = statistic(x, attention_mask)
    torch.testing.assert_close(found, torch.cov(x[attention_mask].T, correction=0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, statistic(torch.where(attention_mask.unsqueeze(-1), x, 1e6), attention_mask))
    assert not torch.allclose(found, statistic(x))


def sample_moment(samples: Iterable[Tensor]) -> Tensor:
    """Return PEFT's matrix for samples (positions, in): `calib_cov_distribution` of its corda.py."""
    scaled = [x / x.max().abs() for x in samples]
    return torch.stack([x.T @ x for x in scaled]).mean(0)


def test_the_moment_is_the_mean_over_samples_divided_by_their_largest_value() -> None:
    """The value with the largest absolute value of a sample is negative, and is not the one that counts."""
    x = torch.randn(4, 3, 6, 5) * torch.arange(1.0, 4)[:, None, None]
    x[:, :, 0, 2] = -20.0
    expected = sample_moment(x.flatten(0, 1))
    torch.testing.assert_close(statistic(x, variant=Moments()), expected, rtol=1e-5, atol=1e-6)
    one_by_one = statistic(x.flatten(0, 1).unsqueeze(1), variant=Moments())
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count_in_the_moment() -> None:
    x = torch.randn(4, 3, 6, 5)
    lengths = [6, 2, 4]
    attention_mask = (torch.arange(6) < torch.tensor(lengths).unsqueeze(1)).expand(4, 3, 6)
    found = statistic(torch.where(attention_mask.unsqueeze(-1), x, 1e6), attention_mask, Moments())
    samples = [row[:length] for rows in x for row, length in zip(rows, lengths, strict=True)]
    torch.testing.assert_close(found, sample_moment(samples), rtol=1e-5, atol=1e-6)


def test_samples_without_a_largest_value_are_not_divided() -> None:
    x = torch.randn(1, 3, 6, 5)
    x[0, 0] = 0.0
    x[0, 1] = -x[0, 1].abs()
    x[0, 1, 0, 0] = 0.0
    expected = (x[0, 1].T @ x[0, 1] + sample_moment(x[0, 2:])) / 3
    torch.testing.assert_close(statistic(x, variant=Moments()), expected, rtol=1e-5, atol=1e-6)


def test_inputs_without_rows_are_one_sample() -> None:
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(statistic(x, variant=Moments()), sample_moment(x), rtol=1e-5, atol=1e-6)


def decaying(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T of a matrix with the singular values 1, 1/2, 1/4, ..."""
    noise = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(out_features, out_features, generator=noise))[0]
    v = torch.linalg.qr(torch.randn(in_features, in_features, generator=noise))[0]
    smaller_side = min(out_features, in_features)
    return u[:, :smaller_side], 0.5 ** torch.arange(smaller_side), v[:, :smaller_side].T


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Return the absolute cosine similarity of corresponding rows."""
    return nn.functional.cosine_similarity(left, right, dim=1).abs()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_lora_ga_starts_from_the_gradients_singular_vectors(shape: tuple[int, int]) -> None:
    variant = catalogue.get("lora_ga")
    settings = variant.validate_settings(VariantSettings(4, 8.0))
    layer = FrozenLayer("layer", torch.zeros(shape), None)
    u, s, vh = decaying(*shape)
    found = variant.reduce_calibration(layer.with_settings(settings), u * s @ vh)
    c = shape[0] ** 0.25 / 4
    torch.testing.assert_close(found["A0"].norm(dim=1), torch.full((4,), c))
    torch.testing.assert_close(found["B0"].norm(dim=0), torch.full((4,), c))
    assert cosines(found["A0"], vh[:4]).min() > 0.999
    assert cosines(found["B0"].T, u[:, 4:8].T).min() > 0.999
    assert variant.scaling(settings) == pytest.approx(8 / math.sqrt(4))


def test_lora_ga_does_not_depend_on_the_signs_of_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signs differ between CPUs and would affect training."""
    variant = catalogue.get("lora_ga")
    settings = variant.validate_settings(VariantSettings(4, 8.0))
    layer = FrozenLayer("layer", torch.zeros(24, 40), None)
    u, s, vh = decaying(24, 40)
    found = variant.reduce_calibration(layer.with_settings(settings), u * s @ vh)
    svd = torch.linalg.svd

    def svd_with_other_signs(*matrix: Tensor, **how: bool) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(*matrix, **how)
        signs = torch.tensor([-1.0, 1.0]).repeat(len(s))[: len(s)]
        return u * signs, s, signs.unsqueeze(1) * vh

    monkeypatch.setattr(torch.linalg, "svd", svd_with_other_signs)
    again = variant.reduce_calibration(layer.with_settings(settings), u * s @ vh)
    assert torch.equal(found["A0"], again["A0"])
    assert torch.equal(found["B0"], again["B0"])


def test_lora_ga_starts_at_the_base_with_dropout_too() -> None:
    settings = VariantSettings(4, 8.0, dropout=0.5)
    adapters = attach(GPT2.build(), catalogue.get("lora_ga"), settings)
    adapters.add_lane("a", settings, seed=0, calibration=calibration(adapters)[0])
    with torch.no_grad():
        with adapters.disable_adapters():
            base = adapters.model(ids(0)).logits
        with adapters.activate_lanes(["a"], 0):
            assert torch.equal(adapters.model(ids(0)).logits, base)


def test_lora_ga_limits_the_rank_to_half_of_the_smaller_side() -> None:
    attach(GPT2.build(), catalogue.get("lora_ga"), VariantSettings(16, 8.0))
    with pytest.raises(UnsupportedError, match=r"rank 17 is larger than layer .* allows: at most 16"):
        attach(GPT2.build(), catalogue.get("lora_ga"), VariantSettings(17, 8.0))


def eva(rank: int = 3, rho: float = 2.0) -> tuple[Adapters, dict[str, dict[str, Tensor]]]:
    settings = VariantSettings(rank, 6.0, extra={"rho": rho})
    adapters = attach(GPT2.build(), catalogue.get("eva"), settings)
    found, _ = calibration(adapters)
    adapters.add_lane("a", settings, seed=0, calibration=found)
    return adapters, found


def test_eva_with_rho_1_gives_all_layers_the_same_rank() -> None:
    adapters, _ = eva(rho=1.0)
    assert set(adapters.ranks_in_use("a").values()) == {3}


def test_eva_masks_unused_ranks() -> None:
    """Unused ranks have no effect and no gradients, whatever values they contain."""
    adapters, _ = eva()
    with torch.no_grad():
        for parameter in adapters.trainable("a").values():
            parameter.add_(torch.randn_like(parameter))
    with adapters.activate_lanes(["a"], None):
        batch_loss(adapters.model, 0).backward()
    for name, rank in adapters.ranks_in_use("a").items():
        a, b = (adapters.trainable("a")[f"{name}.{key}"].grad for key in "AB")
        assert a is not None
        assert b is not None
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        assert rank == 0 or (a[:rank].any() and b[:, :rank].any())


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_lane_without_calibration_is_refused(name: str) -> None:
    adapters = attach(GPT2.build(), catalogue.get(name), VariantSettings(3, 6.0))
    with pytest.raises(UnsupportedError, match=f"{name} starts from .*: calibrate first"):
        adapters.add_lane("a", VariantSettings(3, 6.0), seed=0)
