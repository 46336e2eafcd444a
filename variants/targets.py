"""Choice of the layers that carry adapters, and refusal of models that would bypass an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping

import regex
import torch
from torch import Tensor, nn

from variants.api import FrozenLayer, UnsupportedError
from variants.errors import suggest_nearest
from variants.nf4 import NF4Linear, NF4Weight, find_block_modules

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that adapters are computed for; others belong to quantized layers."""

PATTERN_TIMEOUT_SECONDS = 5.0
"""Time limit for matching a regular expression to the name of one layer. With nested repetitions a
match may take years; `re` of the standard library has no time limit, so `regex` is used."""


def find_target_layers(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """Return the linear layers that `targets` selects, by dotted path.

    Args:
        model: The model.
        targets: "blocks" for every linear layer inside a ModuleList, which excludes heads and embeddings; a
            comma-separated list of name endings such as "q_proj,v_proj"; or "re:" and a regular expression
            for the whole name.

    Raises:
        UnsupportedError: A name matches nothing, a selected module cannot be adapted, or the regular
            expression is invalid or takes too long.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names_layers = targets != "blocks" and not targets.startswith("re:")
    if targets == "blocks":
        scope = list(find_block_modules(model))
        if not scope:
            raise UnsupportedError(
                "targets 'blocks': the model has no ModuleList of blocks; list the layers by name"
            )
    elif names_layers:
        scope = _match_suffixes(modules, targets)
    else:
        scope = _match_pattern(modules, targets)
    for name in scope:
        _check_adaptable(name, modules, match_all=targets == "blocks")
        if names_layers and not is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise UnsupportedError(
                f"target {name!r} is of type {kind}; only Linear and Conv1D carry adapters"
            )
    found = {name: modules[name] for name in scope if is_linear(modules[name])}
    if not found:
        nearest = _suggest_layer(targets, modules)
        raise UnsupportedError(f"targets {targets!r}: it selects no linear layer. {nearest}")
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear, an NF4Linear, or transformers' Conv1D (weight (in, out))."""
    return isinstance(module, (nn.Linear, NF4Linear)) or is_conv1d(module)


def view_layer(name: str, module: nn.Module) -> FrozenLayer:
    """Return a linear layer of the model as variants see it.

    Args:
        name: The dotted path of the layer in the model.
        module: The layer.
    """
    # An nn.Module's attributes have no types.
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if isinstance(module, NF4Linear):
        weight: Tensor | NF4Weight = module.quantized_weight
    else:
        stored: Tensor = module.weight.detach()  # type: ignore[operator]
        weight = stored.t() if is_conv1d(module) else stored
    return FrozenLayer(name, weight, None if bias is None else bias.detach())


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D; checks the name, so transformers is not imported."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(module).__mro__
    )


def _match_pattern(modules: Mapping[str, nn.Module], targets: str) -> list[str]:
    try:
        re.compile(targets.removeprefix("re:"))  # `regex` accepts patterns that `re` does not
        pattern = regex.compile(targets.removeprefix("re:"))
    except (re.error, regex.error) as error:
        raise UnsupportedError(f"targets {targets!r}: not a regular expression ({error})") from None
    try:
        return [name for name in modules if pattern.fullmatch(name, timeout=PATTERN_TIMEOUT_SECONDS)]
    except TimeoutError:
        raise UnsupportedError(
            f"targets {targets!r}: matching one name takes more than {PATTERN_TIMEOUT_SECONDS:g} s; write it "
            "without a repetition inside of a repetition"
        ) from None


def _match_suffixes(modules: Mapping[str, nn.Module], targets: str) -> list[str]:
    scope: list[str] = []
    for ending in (part.strip() for part in targets.split(",")):
        fits = [name for name in modules if ending and f".{name}".endswith(f".{ending}")]
        if not fits:
            nearest = _suggest_layer(ending, modules)
            raise UnsupportedError(f"target {ending!r}: no module's name ends with it. {nearest}")
        scope += [name for name in fits if name not in scope]
    return scope


def _suggest_layer(name: str, modules: Mapping[str, nn.Module]) -> str:
    layers = [layer for layer, module in modules.items() if is_linear(module)]
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    return suggest_nearest(name, {*layers, *ends}, f"The model's linear layers end in: {', '.join(ends)}.")


def _check_adaptable(name: str, modules: Mapping[str, nn.Module], match_all: bool) -> None:
    """Raise UnsupportedError for a module that adapters cannot be applied to.

    3-D weights of experts are looked for in linear layers, with `match_all` in every module.
    """
    parts = name.split(".")
    for path in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
        if isinstance(modules[path], nn.MultiheadAttention):
            raise UnsupportedError(
                f"{path} is an nn.MultiheadAttention, which reads its weights without calling the layers"
            )
    module = modules[name]
    if "quantized" in type(module).__module__:
        raise UnsupportedError(
            f"{name} is quantized ({type(module).__name__}): with quantized inputs a row's output would "
            "depend on the others; load the 16-bit weights, which NF4Linear can quantize"
        )
    if (match_all or is_linear(module)) and not isinstance(module, nn.modules.conv._ConvNd):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                raise UnsupportedError(
                    f"{name}.{key} is a 3-D weight of experts, which adapters do not reach; "
                    "name the layers to adapt instead of 'blocks'"
                )
    if is_linear(module) and not isinstance(module, NF4Linear):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if weight.dtype not in FLOAT_DTYPES or weight.dim() != 2 or type(weight.data) is not torch.Tensor:
            raise UnsupportedError(
                f"{name} holds a {weight.dtype} {type(weight.data).__name__}, not a plain float weight; "
                "load the 16-bit weights, which NF4Linear can quantize"
            )
