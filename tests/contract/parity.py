"""Comparison of ten optimizer steps of a variant with a trusted implementation, in float64.

For variants that PEFT has, the reference is PEFT, with PEFT's own optimizer, loss term or call after each
step where PEFT has one. For the two controls, the reference is plain AdamW on the model itself. The initial
random values are copied from one side to the other, and then all parameters are compared after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from variants.adapters import Adapters
from variants.api import ExtraSettings, Variant, VariantSettings
from variants.full_parameters import MODEL_PREFIX
from variants.peft_format import peft_method
from variants.targets import is_conv1d
from variants.testing.rig import Case, LaneOptimizer, attach_lanes, model_output

RANK, ALPHA, STEPS, LEARNING_RATE, DECAY = 4, 8.0, 10, 0.01, 0.01

LANGUAGE_MODELS = ("llama", "gpt2")
"""A model whose layers are of type Linear, and one whose layers are of type Conv1D."""


@dataclass(frozen=True)
class Reference:
    """A trusted implementation of a variant."""

    config: Callable[[list[str]], PeftConfig] | None
    """Function that returns PEFT's config for a list of target layers. If None, the reference is the model
    itself, whose parameters have the lane's names."""
    names: dict[str, str] = field(default_factory=dict)
    """Our name of a tensor, by the end of PEFT's name."""
    residual: bool = False
    """Whether PEFT writes the residual of the initialization into the weight (PiSSA)."""
    residual_tolerance: float = 1e-5
    """Largest error of the subtracted product, which PEFT computes in float32."""
    extra: ExtraSettings = field(default_factory=dict)
    """Extra settings of our variant."""
    init: Callable[[PeftModel, Adapters, Case], None] | None = None
    """Function that completes the initialization in PEFT (EVA) or copies PEFT's frozen tensors (VeRA)."""
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] | None = None
    """Function that makes PEFT's own optimizer (LoRA+). If None, AdamW is used."""
    after_step: Callable[[PeftModel, int], None] | None = None
    """Function that is called after each step with the number of steps taken (AdaLoRA)."""
    tolerance: float = 1e-6
    """Largest relative difference of a parameter; larger than this if PEFT always computes in float32."""
    models: tuple[str, ...] = LANGUAGE_MODELS
    """The models to compare on."""


AB = {"lora_A.weight": "A", "lora_B.weight": "B"}
"""Names of LoRA's tensors, for `Reference.names`."""


def lora_config(**more: object) -> Callable[[list[str]], PeftConfig]:
    """Return a function that makes PEFT's config of LoRA with further fields."""
    return lambda targets: LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, **more)


def compare_steps(variant: Variant, reference: Reference, model: str) -> Adapters:
    """Take ten steps on both sides, and compare the loss and all parameters of each step.

    Args:
        variant: Our variant.
        reference: The implementation to compare it with.
        model: The model of a `Case`.

    Returns:
        Our adapters after the steps.

    Raises:
        AssertionError: The loss differs by more than 1e-6 of its value, or a parameter by more than the
            reference's tolerance; the message names the step.
    """
    case = Case(model, model=model, dtype=torch.float64)
    settings = VariantSettings(RANK, ALPHA, extra=reference.extra)
    adapters = attach_lanes(case, variant, 1, settings)
    reference_model, expected = (
        _peft_model(case, adapters, reference) if reference.config else _plain_model(case, adapters)
    )
    mine = adapters.trainable("0")
    assert mine.keys() == expected.keys()
    optimizer = LaneOptimizer(adapters, "0", LEARNING_RATE, STEPS)
    if reference.optimizer is not None:
        reference_optimizer = reference.optimizer(reference_model)  # type: ignore[arg-type]
    else:
        reference_optimizer = torch.optim.AdamW(expected.values(), lr=LEARNING_RATE, weight_decay=DECAY)
    for step in range(STEPS):
        rows = case.rows(0, step)
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        with adapters.activate_lanes(["0"], step) as context:
            loss, auxiliary = case.loss(model_output(adapters.model, rows), rows), context.auxiliary_loss()
            loss = loss if auxiliary is None else loss + auxiliary.sum()
            loss.backward()
        expected_loss = _reference_loss(reference_model, case, rows)
        expected_loss.backward()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0, msg=lambda m: f"step {step}: {m}")  # noqa: B023
        optimizer.step()
        reference_optimizer.step()
        if reference.after_step is not None:
            reference.after_step(reference_model, step + 1)  # type: ignore[arg-type]
        for name, tensor in mine.items():
            expected_tensor = _pad_ranks(expected[name], tensor)
            rtol = reference.tolerance
            assert torch.allclose(tensor, expected_tensor, rtol=rtol, atol=1e-3 * rtol), (
                f"step {step}: {name} differs"
            )
    return adapters


def _reference_loss(reference_model: nn.Module, case: Case, rows: Tensor) -> Tensor:
    """Return the reference's loss; for PEFT this includes the term that its forward pass adds."""
    if isinstance(reference_model, PeftModel):
        return reference_model.base_model(input_ids=rows, labels=rows).loss
    return case.loss(model_output(reference_model, rows), rows)


def _plain_model(case: Case, adapters: Adapters) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model with the lane's initial head, and its parameters by our names."""
    model = case.build()
    names = {name: name.removeprefix(MODEL_PREFIX) for name in adapters.trainable("0")}
    trained = {name: model.get_parameter(path) for name, path in names.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained.values()))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapters.trainable("0")[name])
    return model, trained


def _peft_model(
    case: Case, adapters: Adapters, reference: Reference
) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """Return PEFT's model and its parameters by our names, after copying their initial values to the lane."""
    assert reference.config is not None
    # PEFT's model is made in float32 and then converted to float64, because PEFT's SVD needs float32, and
    # PEFT would train AdaLoRA's `ranknum` in float64.
    base_model = case.build().float()
    # The loss function of transformers would cast to float32.
    base_model.loss_function = lambda logits, labels, **_: case.loss(logits, labels)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        reference_model = get_peft_model(base_model, reference.config(sorted(adapters.layers))).eval()
    if reference.init is not None:
        with torch.no_grad():
            reference.init(reference_model, adapters, case)
    trained = {name for name, parameter in reference_model.named_parameters() if parameter.requires_grad}
    for name, parameter in reference_model.double().named_parameters():
        parameter.requires_grad_(name in trained)
    expected = _peft_parameters(reference_model, reference, adapters)
    initial = {name: parameter.detach().clone() for name, parameter in adapters.trainable("0").items()}
    with torch.no_grad():
        for name, parameter in adapters.trainable("0").items():
            parameter.copy_(_pad_ranks(expected[name], parameter))
        if reference.residual:
            _assert_same_products(initial, expected, adapters.layers, reference.residual_tolerance)
            _share_residual(adapters, reference_model, expected)
    return reference_model, expected


def _peft_parameters(
    reference_model: PeftModel, reference: Reference, adapters: Adapters
) -> dict[str, nn.Parameter]:
    """Return PEFT's parameters by our names."""
    found = {}
    peft = peft_method(adapters.variant)
    shared = set() if peft is None else set(peft.group_names.values())
    for key, parameter in reference_model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = key.removeprefix("base_model.model.").replace(".default", "")
        ending = next(end for end in reference.names if f".{end}" in name)
        # PEFT has no layer groups: all layers share such a tensor, and the first one names it.
        owner = next(iter(adapters.layer_groups)) if ending in shared else name[: name.index(f".{ending}")]
        found[f"{owner}.{reference.names[ending]}"] = parameter
    return found


def _pad_ranks(tensor: Tensor, like: Tensor) -> Tensor:
    """Pad PEFT's tensor with zeros for the ranks that only the lane has allocated (EVA)."""
    padded = torch.zeros_like(like)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded


def _share_residual(adapters: Adapters, reference_model: PeftModel, expected: Mapping[str, Tensor]) -> None:
    """Copy PEFT's initial factors to the lane's A0 and B0, and the lane's residual weight to PEFT."""
    scaling = adapters.variant.scaling(adapters.settings)
    modules = dict(reference_model.get_base_model().named_modules())
    frozen = adapters.frozen("0")
    for name, layer in adapters.layers.items():
        a, b = expected[f"{name}.A"].detach(), expected[f"{name}.B"].detach()
        frozen[f"{name}.A0"].copy_(a)
        frozen[f"{name}.B0"].copy_(b)
        residual = layer.frozen_layer.weight - scaling * b @ a
        weight = modules[name].base_layer.weight.data  # type: ignore[union-attr]
        stored = weight.t() if is_conv1d(layer.base_layer) else weight
        # The tolerance allows for PEFT's residual, which is computed in float32.
        torch.testing.assert_close(stored, residual, rtol=0, atol=1e-6)
        stored.copy_(residual)


def _assert_same_products(
    initial: Mapping[str, Tensor], expected: Mapping[str, Tensor], layers: Iterable[str], tolerance: float
) -> None:
    """Compare products of the initial factors, because singular vectors are unique only up to sign."""
    for name in layers:
        own, reference = (tensors[f"{name}.B"] @ tensors[f"{name}.A"] for tensors in (initial, expected))
        torch.testing.assert_close(own, reference.detach(), rtol=0, atol=tolerance)
