"""CorDA: update and initialization, computed in float64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
from rule import check_update, initial_tensors
from torch import Tensor, nn

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, UnsupportedError, VariantSettings

RANK, ALPHA, OUT, IN = 3, 12.0, 12, 16


def test_update_is_relative_to_the_initial_product() -> None:
    check_update(
        "corda",
        lambda params, weight, settings, s: s * (params["B"] @ params["A"] - params["B0"] @ params["A0"]),
        VariantSettings(RANK, ALPHA),
    )


def inputs(positions: int = 200) -> Tensor:
    """Return inputs with a mean other than zero and very unequal directions."""
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(positions, IN, generator=noise, dtype=torch.float64)
    return x * torch.logspace(0, -2, IN, dtype=torch.float64) + 0.5


def start(mode: str, moment: Tensor, weight: Tensor) -> InitialTensors:
    variant = catalogue.get("corda")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA, extra={"mode": mode}))
    found = variant.reduce_calibration(FrozenLayer("layer", weight, None).with_settings(settings), moment)
    layer = FrozenLayer("layer", weight, None, calibration=found)
    return initial_tensors(variant, layer, settings)


def random_weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_start_is_a_part_of_the_decomposition_of_the_weighted_weight(mode: str) -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    initial = start(mode, moment, weight)
    damped = moment + 0.01 * moment.trace() / IN * torch.eye(IN, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    used = slice(0, RANK) if mode == "instruction" else slice(OUT - RANK, OUT)
    expected = torch.linalg.solve(damped, ((u[:, used] * s[used]) @ vh[used]).t()).t()
    a, b = initial.trainable["A"], initial.trainable["B"]
    torch.testing.assert_close(ALPHA / RANK * b @ a, expected)
    torch.testing.assert_close(b.norm(dim=0), (s[used] * RANK / ALPHA).sqrt())
    assert torch.equal(initial.frozen["A0"], a)
    assert torch.equal(initial.frozen["B0"], b)


@pytest.mark.parametrize(("mode", "peft_mode"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_both_modes_take_the_part_that_peft_takes(mode: str, peft_mode: str) -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data.copy_(weight)
    layer.covariance_matrix, layer.rank, layer.corda_method = moment, RANK, peft_mode
    layers, config = nn.ModuleDict({"layer": layer}), LoraConfig(r=RANK, target_modules=["layer"])
    collect_eigens(layers, config, verbose=False)
    crop_corda_eigens(layers, config)
    expected = (layer.eigens.U_WC * layer.eigens.S_WC) @ layer.eigens.V_WC.t()
    initial = start(mode, moment, weight)
    found = ALPHA / RANK * initial.trainable["B"] @ initial.trainable["A"]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_instruction_mode_takes_what_the_inputs_use_and_knowledge_mode_spares_it() -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    outputs = {}
    for mode in ("instruction", "knowledge"):
        initial = start(mode, moment, weight)
        part = ALPHA / RANK * initial.trainable["B"] @ initial.trainable["A"]
        outputs[mode] = ((x @ part.t()).norm() / (x @ weight.t()).norm()).item()
    assert outputs["instruction"] > 0.9
    assert outputs["knowledge"] < 0.05


def test_a_singular_moment_is_damped_until_its_inverse_is_accurate() -> None:
    x = inputs(positions=2).float()
    initial = start("instruction", x.t() @ x / len(x), random_weight().float())
    assert all(tensor.isfinite().all() for tensor in initial.trainable.values())


def test_the_damping_doubles_until_the_inverse_is_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    x, inverse, dampings = inputs(), torch.linalg.inv_ex, []
    moment = x.t() @ x / len(x)

    def inaccurate_at_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
        dampings.append(((matrix - moment).trace() / moment.trace()).item())
        found, failure = inverse(matrix)
        return (found if len(dampings) > 2 else 2 * found), failure

    monkeypatch.setattr(torch.linalg, "inv_ex", inaccurate_at_first)
    start("instruction", moment, random_weight())
    assert dampings == pytest.approx([0.01, 0.02, 0.04])


def test_a_moment_of_zero_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layer: the second moment of its inputs cannot be inverted"):
        start("instruction", torch.zeros(IN, IN, dtype=torch.float64), random_weight())
