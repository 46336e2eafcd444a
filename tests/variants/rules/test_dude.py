"""DuDe: DoRA's rule over PiSSA's factors, computed in float64."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from rule import adapt, check_update, initial_tensors
from torch import Tensor, nn

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.forward_context import draw_dropout_masks

RANK, ALPHA, DROPOUT = 3, 12.0, 0.25


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    direction = weight + s * (params["B"] @ params["A"] - params["B0"] @ params["A0"])
    norms = direction.norm(dim=1).detach()
    return (params["m"] / norms).unsqueeze(1) * direction - weight


def test_update_normalizes_the_weight_with_the_residual() -> None:
    check_update("dude", change, VariantSettings(RANK, ALPHA))


def test_start_is_that_of_pissa_with_the_norms_of_the_weight() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("dude")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    product = start.trainable["B"] @ start.trainable["A"]
    torch.testing.assert_close(ALPHA / RANK * product, (u[:, :RANK] * s[:RANK]) @ vh[:RANK])
    # Both factors contain the square roots of the singular values.
    a, b = start.trainable["A"], start.trainable["B"]
    torch.testing.assert_close(a @ a.T, b.T @ b)
    torch.testing.assert_close(start.trainable["m"], weight.norm(dim=1))
    assert torch.equal(start.frozen["A0"], start.trainable["A"])


class FixedDropout(nn.Module):
    """Dropout with a given mask, whose values are 0 or 1 / (1 - p)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_dropout_is_that_of_peft() -> None:
    """In PEFT the frozen weight is the residual W - s B0 A0, so dropout also applies to s B0 A0."""
    adapters = adapt("dude", VariantSettings(RANK, ALPHA, dropout=DROPOUT))
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=DROPOUT,
        target_modules=["0"],
        init_lora_weights="pissa",
        use_dora=True,
    )
    noise, s = torch.Generator().manual_seed(0), ALPHA / RANK
    for layer in adapters.layers.values():
        frozen, tensors = layer.frozen_layer, layer.lane_tensors("0")
        x = torch.randn(8, frozen.shape[1], generator=noise, dtype=torch.float64, requires_grad=True)
        own_x = x.detach().clone().requires_grad_()
        direction = torch.randn(8, frozen.shape[0], generator=noise, dtype=torch.float64)
        with adapters.activate_lanes(["0"], 3, rows_per_lane=8) as context:
            found = layer(own_x)
            context.mask_draws.clear()  # This makes the next draw repeat the same mask.
            masks = draw_dropout_masks(
                x.unsqueeze(0), DROPOUT, layer.name, context, layer.adapter_state.seeds
            )
        assert 0.1 < (masks == 0).double().mean() < 0.4
        reference = nn.Sequential(nn.Linear(frozen.shape[1], frozen.shape[0]))
        with torch.no_grad():
            reference[0].weight.copy_(frozen.weight)
            reference[0].bias.copy_(frozen.bias)
        peft_layer = get_peft_model(reference, config).double().train().base_model.model[0]
        residual = frozen.weight - s * tensors["B0"] @ tensors["A0"]
        torch.testing.assert_close(peft_layer.base_layer.weight, residual, rtol=0, atol=1e-5)
        peft_layer.lora_dropout["default"] = FixedDropout(masks[0])
        own = {
            "A": peft_layer.lora_A["default"].weight,
            "B": peft_layer.lora_B["default"].weight,
            "m": peft_layer.lora_magnitude_vector["default"].weight,
        }
        with torch.no_grad():
            peft_layer.base_layer.weight.copy_(residual)
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        expected = peft_layer(x)
        torch.testing.assert_close(found, expected)
        (found * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(own_x.grad, x.grad)
        for name, parameter in own.items():
            torch.testing.assert_close(tensors[name].grad, parameter.grad)
