"""`peft:TYPE`: a variant for each tuner of the PEFT library that adapts one linear layer at a time.

PEFT's own layer computes the update; a lane's tensors are the state of that layer. A probe of a small layer
decides whether a tuner fits, so that no list of tuners is kept here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from variants import api
from variants.errors import format_error
from variants.peft_format import peft_method
from variants.variant_settings import PEFT_AXIS, PEFT_PREFIX, Choice, Flag, Hyperparameter, Int, Number

ADAPTER = "default"
"""Name of the only adapter in each of PEFT's layers."""
PROBE_SIZES = (64, 256, 768, 1280)
"""Sizes of the layer that is probed: the first that the settings fit, for example a block size that divides
it."""
RULE = (
    "PEFT must add to each linear layer tensors of its own that change its output, and compute with these "
    "and the frozen weights alone, of which it changes none and trains no copy"
)
"""The condition that a tuner must fulfil: lanes share the frozen weights and own only their tensors."""


class PeftTuner(api.FusesBase, api.PeftFormat, api.BiasUpdate, api.Variant):
    """W' is the weight that PEFT's own layer applies.

    Initialization: PEFT's. Its random values follow from the lane's seed and the layer's name.

    A lane group has one lane.

    Deviations: A lane trains without dropout, because PEFT draws the masks from the global random state.
    PEFT's dropout fields are therefore no hyperparameters.
    """

    axis = PEFT_AXIS
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    batching = api.Batching.EXCLUSIVE
    uses_dropout = False
    config_class: type[Any]
    """PEFT's config."""

    def validate_settings(self, settings: api.VariantSettings) -> api.VariantSettings:
        complete, defaults = super().validate_settings(settings), self.extra_defaults
        try:
            _probe(self, complete.rank, tuple(complete.extra.items()))
        except api.UnsupportedError as refusal:
            own = [
                f"{n} {v!r} (default {defaults[n]!r})" for n, v in complete.extra.items() if v != defaults[n]
            ]
            raise api.UnsupportedError(f"{', '.join(own) or f'rank {complete.rank}'}: {refusal}") from refusal
        return complete

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        words: Mapping[Any, Any] = {"true": True, "false": False}
        values = {name: words.get(value, value) for name, value in super().peft_config(settings).items()}
        complete: dict[str, Any] = self.config_class(target_modules=r".*\.layer", **values).to_dict()
        return complete

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        """Return the tensors under the names that they have in PEFT's file, without the adapter's name."""
        return {name.replace(f"/{ADAPTER}", "").replace("/", "."): t for name, t in params.items()}

    def check_layer(self, layer: api.FrozenLayer) -> None:
        weight = torch.empty(layer.shape, device="meta")
        try:
            build_layers(self, layer.settings, {"one": (weight, None)}, 0)
        except ValueError as error:
            raise _refusal(error, f"{layer.name}: ") from error
        except (TypeError, RuntimeError):
            pass  # PEFT needs the values of the weight, and refuses a shape when a lane starts

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return self._build(layer, random.seed)

    def fuses(self, layer: api.FrozenLayer) -> bool:
        return True  # PEFT's layer calls the frozen layer by itself

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return self.forward_with_base(x, params, layer)

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        tensors = {name: tensor[0] for name, tensor in params.items()}
        rows = x.reshape(1, -1, x.shape[-1])
        return call_layer(self._layer(layer), rows, layer.weight, layer.bias, tensors).view(*x.shape[:-1], -1)

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        outputs, at_zero = self._outputs(params, layer)
        return (outputs - at_zero).t() - layer.weight.to(layer.dtype)

    def delta_bias(self, params: api.Params, layer: api.FrozenLayer) -> Tensor | None:
        _, at_zero = self._outputs(params, layer)
        return at_zero if layer.bias is None else at_zero - layer.bias.to(layer.dtype)

    def _outputs(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return the layer's outputs for the rows of the identity, and its output for the input 0."""
        size = layer.shape[1]
        rows = torch.eye(size + 1, size, dtype=layer.dtype, device=layer.device).unsqueeze(0)
        bias = None if layer.bias is None else layer.bias.to(layer.dtype)
        outputs = call_layer(self._layer(layer), rows, layer.weight.to(layer.dtype), bias, params)[0]
        return outputs[:-1], outputs[-1]

    def _build(self, layer: api.FrozenLayer, seed: int) -> api.InitialTensors:
        """Make PEFT's layer, and return its initial tensors.

        The layer is made on the CPU, so that its initial values are the same on every device. `layer.cache`
        keeps PEFT's layer with its settings, but without the values of its parameters.
        """
        device = "meta" if layer.device.type == "meta" else "cpu"
        weight = layer.weight.to(device, torch.float32)
        bias = None if layer.bias is None else layer.bias.to(device, torch.float32)
        made = build_layers(self, layer.settings, {"one": (weight, bias)}, seed)["one"]
        state = read_state(made.to(layer.device, layer.dtype))
        trainable = {name: tensor.detach() for name, tensor in state.items() if tensor.requires_grad}
        frozen = {name: tensor for name, tensor in state.items() if name not in trainable}
        for parameter in made.parameters():
            parameter.data = parameter.new_empty(0)
        layer.cache[self.name] = layer.settings, made
        return api.InitialTensors(trainable, frozen)

    def _layer(self, layer: api.FrozenLayer) -> nn.Module:
        """Return PEFT's layer for these settings, made again for a lane that was restored."""
        if layer.cache.get(self.name, (None,))[0] != layer.settings:
            self._build(layer, 0)
        made: nn.Module = layer.cache[self.name][1]
        return made


def build_layers(
    variant: PeftTuner,
    settings: api.VariantSettings,
    layers: Mapping[str, tuple[Tensor, Tensor | None]],
    seed: int,
) -> dict[str, nn.Module]:
    """Return PEFT's layers around frozen weights. Their random values follow from the seed alone.

    Args:
        variant: The tuner.
        settings: Complete settings.
        layers: Name -> weight (out, in), in the dtype of the trainable tensors, and bias (out,). On the
            device "meta" only the names and shapes of a layer's tensors are right.
        seed: The seed.
    """
    from peft import inject_adapter_in_model

    blocks, is_meta = nn.ModuleDict(), any(weight.is_meta for weight, _ in layers.values())
    for name, (weight, bias) in layers.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        blocks[name] = nn.ModuleDict({"layer": linear})
    config = variant.config_class(**variant.peft_config(settings))
    with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        inject_adapter_in_model(config, blocks, ADAPTER, low_cpu_mem_usage=is_meta)
    made = {name: block.get_submodule("layer").eval() for name, block in blocks.items()}
    for layer in made.values():  # a search for gradient hooks in each call takes 12 microseconds
        found = ((path, parameter._backward_hooks or {}) for path, parameter in layer.named_parameters())
        vars(layer)["_hooks"] = [(path, hook) for path, hooks in found for hook in hooks.values()]
    return made


def read_state(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that PEFT adds to a layer, by their path with "/" for "."."""
    names = layer.state_dict().keys()  # without buffers that follow from the weight and the config
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return {n.replace(".", "/"): t for n, t in tensors if n in names and not n.startswith("base_layer.")}


def call_layer(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: api.Params
) -> Tensor:
    """Return the output of one of PEFT's layers, (1, N, out), with other tensors in place of its own.

    Args:
        layer: A result of `build_layers`.
        x: (1, N, in).
        weight: The frozen weight, (out, in).
        bias: (out,).
        tensors: Name, as in the result of `read_state` -> tensor.
    """
    values = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    for path, hook in vars(layer)["_hooks"] if torch.is_grad_enabled() else ():
        if values[path].requires_grad:
            values[path].register_hook(hook)
    values["base_layer.weight"] = weight
    if bias is not None:
        values["base_layer.bias"] = bias
    for name, value in vars(layer).items():
        if isinstance(value, torch.dtype):  # to which the layer casts x
            setattr(layer, name, weight.dtype)
    return torch.func.functional_call(layer, values, (x,), tie_weights=False)


def _refusal(error: Exception, where: str = "") -> api.UnsupportedError:
    """Return a refusal with PEFT's words, or with `RULE` and the error where PEFT does not check."""
    is_check = isinstance(error, ValueError)
    says = f"PEFT says: {' '.join(str(error).split())}" if is_check else f"{RULE} ({format_error(error)})"
    return api.UnsupportedError(where + says)


@cache
def _probe(variant: PeftTuner, rank: int, extra: tuple[tuple[str, Any], ...]) -> api.Start:
    """Return which function PEFT's layer computes at step 0, measured on a small layer.

    Raises:
        UnsupportedError: PEFT cannot make the layer with these settings, or it breaks `RULE`.
    """
    for size in PROBE_SIZES:
        try:
            return _start(variant, api.VariantSettings(rank, 8.0, 0.0, dict(extra)), size)
        except api.UnsupportedError:
            raise
        except Exception as error:  # of any class, because the tuner is not known
            refusal = _refusal(error)
    raise refusal


def _start(variant: PeftTuner, settings: api.VariantSettings, size: int) -> api.Start:
    """Return which function PEFT's layer of `size` inputs and outputs computes at step 0.

    PEFT's layer is made twice: first beside two other layers, then alone with another seed. The trained
    tensors of the first copy are changed, and its output must change with them. With these tensors, the
    second copy must give the same output and gradients as the first.

    Raises:
        UnsupportedError: The layer breaks `RULE`.
    """
    noise = torch.Generator().manual_seed(0)
    shapes = (size, size), (2 * size, size), (1, 6, size)
    weight, larger, x = (torch.randn(shape, generator=noise) / 8 for shape in shapes)
    layers = {"one": (weight, x[0, 0]), "equal": (weight.clone(), x[0, 0]), "larger": (larger, None)}
    made = build_layers(variant, settings, copy.deepcopy(layers), 1)
    alone = build_layers(variant, settings, copy.deepcopy({"one": layers["one"]}), 2)["one"]
    layer: Any = made["one"]
    state, equal = read_state(layer), read_state(made["equal"])
    first, base = layer(x).detach(), layer.base_layer(x)
    trained = [tensor for tensor in layer.parameters() if tensor.requires_grad]
    has_copy = any(each.shape == weight.shape and torch.equal(each, weight) for each in trained)
    with torch.no_grad():
        for seed, tensor in enumerate(trained):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    values = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in state.items()}
    expected = _outputs_and_gradients(layer.train(), x, state)
    found = _outputs_and_gradients(lambda rows: call_layer(alone, rows, *layers["one"], values), x, values)
    is_shared = any(one is other for one in state.values() for other in equal.values())
    same = (torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(found, expected, strict=True))
    has_effect = not torch.allclose(first, expected[0])
    if has_copy or is_shared or not has_effect or not all(same):
        raise api.UnsupportedError(RULE)
    if torch.equal(first, base):
        return api.Start.BASE
    return api.Start.ROUNDED if torch.allclose(first, base, atol=1e-5) else api.Start.OTHER


def _outputs_and_gradients(layer: Callable[[Tensor], Tensor], x: Tensor, state: api.Params) -> list[Tensor]:
    trained = [tensor for tensor in state.values() if tensor.requires_grad]
    with torch.enable_grad():
        output = layer(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), trained, materialize_grads=True)]


def peft_variant(name: str, own: api.Variant | None) -> api.Variant:
    """Return the variant for one of PEFT's tuners.

    Args:
        name: For example `peft:LOHA`.
        own: The variant of this project for the same method.

    Raises:
        UnsupportedError: PEFT is not installed, or has no such tuner, or a study cannot train it.
    """
    peft_type = name.removeprefix(PEFT_PREFIX)
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError as error:
        raise api.UnsupportedError(
            f"{name} needs peft, which is not installed: pip install 'peft<0.22,>=0.21'"
        ) from error
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise api.UnsupportedError(f"{name}: PEFT {peft.__version__} has no such tuner; it has {known}")
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(peft_type))
    own_peft, variant = peft_method(own), PeftTuner()
    ints = [each.name for each in fields(config_class) if isinstance(each.default, int)]
    rank, alpha = "r" if "r" in ints else None, next((n for n in ints if n.endswith("alpha")), None)
    hyperparameters = _read_hyperparameters(config_class, tuner, {rank, alpha})
    method = api.PeftMethod(
        peft_type, {}, alpha=alpha or "", fields={n: n for n in hyperparameters},
        # PEFT does not say which of its tuners take layers of type Conv1D; a variant of this project does.
        adapts_conv1d=own_peft is not None and own_peft.peft_type == peft_type and own_peft.adapts_conv1d,
    )  # fmt: skip
    vars(variant).update(
        name=name, revision=f"peft {peft.__version__}", config_class=config_class, peft=method,
        hyperparameters=hyperparameters, uses_rank=rank is not None, uses_alpha=alpha is not None,
        typical_lr_scale=1.0 if own is None else own.typical_lr_scale,
    )  # fmt: skip
    complete = api.Variant.validate_settings(variant, api.VariantSettings(rank=4, alpha=8.0))
    try:
        vars(variant)["start"] = _probe(variant, complete.rank, tuple(complete.extra.items()))
    except api.UnsupportedError as refusal:
        other = "`python -m variants` names the variants" if own is None else f"take {own.name}, a variant"
        raise api.UnsupportedError(f"{name}: {refusal}; {other} of this project") from refusal
    return variant


def _read_hyperparameters(
    config_class: type[Any], tuner: Any, shared: set[str | None]
) -> dict[str, Hyperparameter]:
    """Return the hyperparameters: the fields of a tuner's config that are numbers, flags or given words.

    These fields are left out:

    - the fields of all tuners (`PeftConfig`), and the fields for dropout
    - the fields that `update_and_allocate` reads, because a study does not call it after a step
    - the flags that are true and whose name begins with `init_`, because PEFT's tests switch them off

    Args:
        config_class: PEFT's config.
        tuner: The class that adapts a model.
        shared: The fields for the rank and alpha.
    """
    from peft import PeftConfig

    hints, own = get_type_hints(config_class), {each.name: each.default for each in fields(config_class)}
    layout = "fan_in_fan_out"  # of the weights: it follows from the model
    skipped = {layout, *shared, *(each.name for each in fields(PeftConfig))}
    each_step = inspect.getsource(tuner.update_and_allocate) if hasattr(tuner, "update_and_allocate") else ""
    found: dict[str, Hyperparameter] = {}
    for name, default in own.items():
        # A word with a config of its own (`eva_config`) needs a call of PEFT that a study does not make.
        words = [word for word in _words(hints[name]) if f"{word}_config" not in own]
        declared = _declare(name, default, words)
        is_skipped = name in skipped or "dropout" in name or f"config.{name}" in each_step
        if declared is not None and not is_skipped:
            found[name] = declared
    return found


def _words(hint: Any) -> list[str]:
    """Return the words that a type permits, without patterns such as "pissa_niter_[number of iters]"."""
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if isinstance(word, str) and "[" not in word]
    return [word for part in get_args(hint) for word in _words(part)]


def _declare(name: str, default: object, words: list[str]) -> Hyperparameter | None:
    if isinstance(default, bool) and words:
        return Choice(str(default).lower(), (str(default).lower(), *words))
    if isinstance(default, bool):
        return None if default and name.startswith("init_") else Flag(default)
    if isinstance(default, str):
        return Choice(default, tuple(words)) if len(words) > 1 else None
    if isinstance(default, int):
        return Int(default, minimum=min(default, 0))
    return Number(default, minimum=min(default, 0.0)) if isinstance(default, float) else None
