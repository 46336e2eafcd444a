"""`peft:TYPE`: a variant for each tuner of the PEFT library that adapts one linear layer at a time.

PEFT's own layer computes the update; a lane's tensors are the state of that layer. A probe of a small layer
decides whether a tuner fits, so that no list of tuners is kept here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from variants import api
from variants.peft_format import peft_method
from variants.variant_settings import PEFT_AXIS, PEFT_PREFIX, Choice, Flag, Hyperparameter, Int, Number

ADAPTER = "default"
"""Name of the only adapter in each of PEFT's layers."""
ALPHA_FIELDS = ("lora_alpha", "alpha", "psoft_alpha")
"""Fields that are the alpha of the variant."""
PROBE_SIZES = (64, 256, 768, 1280)
"""Sizes of the layer that is probed: the first that the settings fit, for example a block size that divides
it."""
SHARED = "its layers share tensors, and `peft:` makes each layer alone"
PROBE_SETTINGS = api.VariantSettings(rank=4, alpha=8.0)


class PeftTuner(api.FusesBase, api.PeftFormat, api.BiasUpdate, api.Variant):
    """W' is what PEFT's layer computes with: `peft_variant` makes a subclass for each of PEFT's types.

    Initialization: PEFT's, with noise that follows from the lane's seed and the layer's name.

    A lane group has one lane.

    Deviations: trained without dropout, and PEFT's fields of a dropout are no hyperparameters, because its
    masks follow from the global random state. IA3 counts no layer as a feed-forward layer.
    """

    batching = api.Batching.EXCLUSIVE
    uses_dropout = False
    config_class: type[Any]
    """PEFT's config."""

    def scaling(self, settings: api.VariantSettings) -> float:
        """Return alpha; PEFT's layer computes the factor s from it."""
        return 1.0 if settings.alpha is None else settings.alpha

    def validate_settings(self, settings: api.VariantSettings) -> api.VariantSettings:
        complete = super().validate_settings(settings)
        _probe(self, complete.rank, tuple(complete.extra.items()))
        return complete

    def config(self, settings: api.VariantSettings, alpha: float) -> Any:
        """Return PEFT's config for complete settings.

        Raises:
            UnsupportedError: PEFT refuses a value.
        """
        words: Mapping[Any, Any] = {"true": True, "false": False}
        values: dict[str, Any] = {name: words.get(value, value) for name, value in settings.extra.items()}
        names = {each.name for each in fields(self.config_class)}
        if self.uses_rank:
            values["r"] = settings.rank
        if self.uses_alpha:
            values[next(name for name in ALPHA_FIELDS if name in names)] = alpha
        if "feedforward_modules" in names:
            values["feedforward_modules"] = []
        try:
            return self.config_class(target_modules=["layer"], **values)
        except (ValueError, TypeError) as error:
            raise _refusal(error) from error

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        """Return the tensors under the names that they have in PEFT's file, without the adapter's name."""
        paths = {name: [part for part in name.split("/") if part != ADAPTER] for name in params}
        return {".".join(path): params[name] for name, path in paths.items()}

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        config = self.config(settings, self.scaling(settings)).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

    def largest_rank(self, layer: api.FrozenLayer) -> None:
        return None

    def check_layer(self, layer: api.FrozenLayer) -> None:
        weight = torch.empty(layer.shape, device="meta")
        try:
            build_layers(self.config(layer.settings, 1.0), {"one": (weight, None)}, 0)
        except (ValueError, TypeError) as error:
            raise _refusal(error, f"{layer.name}: ") from error
        except (NotImplementedError, RuntimeError):
            pass  # PEFT needs the values of the weight, and refuses a shape when a lane starts

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        alpha = self.scaling(layer.settings)
        built = self._build(layer, random.seed, alpha)
        state = read_state(built)
        trainable = {name: tensor.detach() for name, tensor in state.items() if tensor.requires_grad}
        frozen = {name: tensor for name, tensor in state.items() if name not in trainable}
        layer.cache[self._cache_key(layer)] = LayerTemplate(built, alpha)
        return api.InitialTensors(trainable, frozen)

    def fuses(self, layer: api.FrozenLayer) -> bool:
        return True

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return self.forward_with_base(x, params, layer)

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        tensors = {name: tensor[0] for name, tensor in params.items()}
        out = self._template(layer)(x.reshape(1, -1, x.shape[-1]), layer.weight, layer.bias, tensors)
        return out.view(*x.shape[:-1], -1)

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
        outputs = self._template(layer)(rows, layer.weight.to(layer.dtype), bias, params)[0]
        return outputs[:-1], outputs[-1]

    def _build(self, layer: api.FrozenLayer, seed: int, alpha: float) -> nn.Module:
        """Return PEFT's layer, made on the CPU so that every device has the same values."""
        device = "meta" if layer.device.type == "meta" else "cpu"
        weight = layer.weight.to(device, torch.float32)
        bias = None if layer.bias is None else layer.bias.to(device, torch.float32)
        made = build_layers(self.config(layer.settings, alpha), {"one": (weight, bias)}, seed)["one"]
        return made.to(layer.device, layer.dtype)

    def _template(self, layer: api.FrozenLayer) -> LayerTemplate:
        """Return PEFT's layer for these settings, made again for a lane that was restored."""
        key = self._cache_key(layer)
        template = layer.cache.get(key)
        if template is None or template.scaling is not layer.scaling:  # read once: the host waits for a GPU
            alpha = layer.scaling.item()
            if template is None or template.alpha != alpha:
                template = layer.cache[key] = LayerTemplate(self._build(layer, 0, alpha), alpha)
            template.scaling = layer.scaling
        return template

    def _cache_key(self, layer: api.FrozenLayer) -> str:
        return f"{self.name} {layer.settings.rank} {sorted(layer.settings.extra.items())}"


def build_layers(
    config: Any, layers: Mapping[str, tuple[Tensor, Tensor | None]], seed: int
) -> dict[str, nn.Module]:
    """Return PEFT's layers around frozen weights. Their random values follow from the seed alone.

    Args:
        config: PEFT's config.
        layers: Name -> weight (out, in), in the dtype of the trainable tensors, and bias (out,). On the
            device "meta" only the names and shapes of a layer's tensors are right.
        seed: The seed.
    """
    from peft import inject_adapter_in_model

    config, blocks = copy.copy(config), nn.ModuleDict()
    is_meta = any(weight.is_meta for weight, _ in layers.values())
    for name, (weight, bias) in layers.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        blocks[name] = nn.ModuleDict({"layer": linear})
    with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        inject_adapter_in_model(config, blocks, ADAPTER, low_cpu_mem_usage=is_meta)
    return {name: block.get_submodule("layer").eval() for name, block in blocks.items()}


def read_state(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that PEFT adds to a layer, by their path with "/" for "."."""
    names = layer.state_dict().keys()  # without buffers that follow from the weight and the config
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return {n.replace(".", "/"): t for n, t in tensors if n in names and not n.startswith("base_layer.")}


class LayerTemplate:
    """One of PEFT's layers, which computes with the tensors that a call passes in place of its own.

    Attributes:
        alpha: The alpha in its config.
        scaling: The tensor that `alpha` was read from last.
    """

    def __init__(self, layer: Any, alpha: float) -> None:
        """Take over a layer, whose parameters become empty.

        Args:
            layer: A result of `build_layers`.
            alpha: The alpha in its config.
        """
        self.layer, self.alpha, self.scaling = layer, alpha, None
        self.hooks = [
            (path, hook)
            for path, parameter in layer.named_parameters()
            for hook in (parameter._backward_hooks or {}).values()
        ]
        for parameter in layer.parameters():
            parameter.data = parameter.new_empty(0)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: api.Params) -> Tensor:
        """Return the layer's output, (1, N, out).

        Args:
            x: (1, N, in).
            weight: The frozen weight, (out, in).
            bias: (out,).
            tensors: Values for the names of `read_state`.
        """
        values = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
        for path, hook in self.hooks if torch.is_grad_enabled() else ():
            if values[path].requires_grad:
                values[path].register_hook(hook)
        values["base_layer.weight"] = weight
        if bias is not None:
            values["base_layer.bias"] = bias
        for name, value in vars(self.layer).items():
            if isinstance(value, torch.dtype):  # to which the layer casts x
                setattr(self.layer, name, weight.dtype)
        return torch.func.functional_call(self.layer, values, (x,), tie_weights=False)


def _refusal(error: Exception, where: str = "") -> api.UnsupportedError:
    return api.UnsupportedError(where + " ".join(str(error).split()))


@cache
def _probe(variant: PeftTuner, rank: int, extra: tuple[tuple[str, Any], ...]) -> api.Start:
    """Build PEFT's layer around small weights, and return the function that it computes at step 0.

    Raises:
        UnsupportedError: A study cannot train the layer with these settings.
    """
    names = {each.name for each in fields(variant.config_class)}
    for word in dict(extra).values():
        if f"{word}_config" in names:
            raise api.UnsupportedError(f"{word!r}: PEFT computes it in a call of its own (`{word}_config`)")
    config = variant.config(api.VariantSettings(rank, 8.0, 0.0, dict(extra)), 8.0)
    for size in PROBE_SIZES:
        noise = torch.Generator().manual_seed(0)
        shapes = (size, size), (2 * size, size), (1, 6, size)
        weight, larger, x = (torch.randn(shape, generator=noise) / 8 for shape in shapes)
        layers = {"one": (weight, x[0, 0]), "equal": (weight.clone(), x[0, 0]), "larger": (larger, None)}
        original = weight.clone()
        try:
            made = build_layers(config, layers, 1)
            alone = build_layers(config, {"one": layers["one"]}, 2)["one"]
            break
        except Exception as error:  # of any class, because the tuner is not known
            refusal = _refusal(error)
    else:
        raise refusal
    try:
        return _check(made["one"], made["equal"], alone, x, original)
    except api.UnsupportedError:
        raise
    except Exception as error:
        raise _refusal(error, "its layer fails on a small input: ") from error


def _check(layer: Any, equal: nn.Module, alone: nn.Module, x: Tensor, weight: Tensor) -> api.Start:
    """Check that a lane can train a layer by its state alone, and return the function at step 0.

    Args:
        layer: The layer, made beside others.
        equal: One of the others, of the same shape.
        alone: The same layer, made alone and with another seed.
        x: Inputs.
        weight: The frozen weight before the layers were made.
    """

    def check(is_met: bool, fault: str) -> None:
        if not is_met:
            raise api.UnsupportedError(fault)

    base: Any = getattr(layer, "base_layer", None)
    check(isinstance(base, nn.Linear), "it does not adapt a linear layer")
    is_frozen = torch.equal(base.weight, weight) and not any(each.requires_grad for each in base.parameters())
    check(is_frozen, "it changes the frozen weights, which all lanes share")
    state, start = read_state(layer), base(x)
    check(not {*map(id, state.values())} & {*map(id, read_state(equal).values())}, SHARED)
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (state, read_state(alone))]
    check(shapes[0] == shapes[1], "the sizes of its tensors depend on the other layers")
    trained = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
    copies = (t.shape == weight.shape and torch.equal(t, weight) for t in trained.values())
    check(not any(copies), "it trains a copy of the frozen weights")
    first = layer(x).detach()
    with torch.no_grad():
        for seed, tensor in enumerate(trained.values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    values = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in state.items()}
    expected = _outputs_and_gradients(layer.train(), x, list(trained.values()))
    is_kept = all(torch.equal(tensor, values[name]) for name, tensor in state.items())
    check(is_kept, "its layer overwrites its tensors in the forward pass")
    template = LayerTemplate(alone, 8.0)
    found = _outputs_and_gradients(
        lambda rows: template(rows, weight, base.bias, values), x, [values[name] for name in trained]
    )
    same = (torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(found, expected, strict=True))
    check(all(same), "its layer computes with more than its parameters and buffers")
    check(not torch.allclose(first, expected[0]), "its tensors have no effect on the layer's output")
    if torch.equal(first, start):
        return api.Start.BASE
    return api.Start.ROUNDED if torch.allclose(first, start, atol=1e-5) else api.Start.OTHER


def _outputs_and_gradients(layer: Any, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        output = layer(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors, materialize_grads=True)]


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
            f"{name} needs peft, which is not installed: in the clone of this project, pip install -c "
            "constraints.txt -e '.[peft]'"
        ) from error
    types = {each.value: each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
    if peft_type not in types:
        known = ", ".join(sorted(types))
        raise api.UnsupportedError(f"{name}: PEFT {peft.__version__} has no such tuner; it has {known}")
    config_class: type[Any] = PEFT_TYPE_TO_CONFIG_MAPPING[types[peft_type]]
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(types[peft_type])
    defaults: dict[str, Any] = {each.name: each.default for each in fields(config_class)}
    own_peft = peft_method(own)
    # PEFT does not say which of its tuners take layers of type Conv1D; a variant of this project does.
    adapts_conv1d = own_peft is not None and own_peft.peft_type == peft_type and own_peft.adapts_conv1d
    attributes = {
        "__doc__": PeftTuner.__doc__,
        "name": name,
        "axis": PEFT_AXIS,
        "revision": f"peft {peft.__version__}",
        "verified_by": api.VerifiedBy.REFERENCE_IMPLEMENTATION,
        "config_class": config_class,
        "peft": api.PeftMethod(peft_type, {}, adapts_conv1d=adapts_conv1d),
        "hyperparameters": _read_hyperparameters(config_class, tuner),
        "uses_rank": isinstance(defaults.get("r"), int) and defaults["r"] > 0,
        "uses_alpha": any(isinstance(defaults.get(each), int) for each in ALPHA_FIELDS),
        "typical_lr_scale": 1.0 if own is None else own.typical_lr_scale,
    }
    made: Any = type(f"Peft{peft_type.title().replace('_', '')}", (PeftTuner,), attributes)
    variant: PeftTuner = made()
    try:
        if "target_modules" not in defaults or not hasattr(tuner, "tuner_layer_cls"):
            raise api.UnsupportedError("it changes something else than single linear layers")
        if tuner.uses_shared_state:
            raise api.UnsupportedError(SHARED)
        complete = api.Variant.validate_settings(variant, PROBE_SETTINGS)
        made.start = _probe(variant, complete.rank, tuple(complete.extra.items()))
    except api.UnsupportedError as refusal:
        hint = "" if own is None else f"; take {own.name}, a variant of this project"
        raise api.UnsupportedError(f"{name}: {refusal}{hint}") from refusal
    return variant


def _read_hyperparameters(config_class: type[Any], tuner: Any) -> dict[str, Hyperparameter]:
    """Return the fields of a tuner's config that are numbers, flags or one of several words.

    Fields of all tuners are none, nor are those of a dropout, those that PEFT reads in its call after each
    step, which a study does not make, and a flag for an initialization, which PEFT's tests switch off.
    """
    from peft import PeftConfig

    hints = get_type_hints(config_class)
    layout = "fan_in_fan_out"  # of the weights: it follows from the model
    skipped = {layout, *ALPHA_FIELDS, *(each.name for each in fields(PeftConfig))}
    each_step = inspect.getsource(tuner.update_and_allocate) if hasattr(tuner, "update_and_allocate") else ""
    found: dict[str, Hyperparameter] = {}
    for each in fields(config_class):
        is_rank = each.name == "r" and isinstance(each.default, int) and each.default > 0
        is_skipped = each.name in skipped or "dropout" in each.name or f"config.{each.name}" in each_step
        declared = (
            None if is_rank or is_skipped else _declare(each.name, each.default, _words(hints[each.name]))
        )
        if declared is not None:
            found[each.name] = declared
    return found


def _words(hint: Any) -> tuple[str, ...]:
    """Return the words that a type permits, without patterns such as "pissa_niter_[number of iters]"."""
    if get_origin(hint) is Literal:
        return tuple(word for word in get_args(hint) if isinstance(word, str) and "[" not in word)
    return tuple(word for part in get_args(hint) for word in _words(part))


def _declare(name: str, default: object, words: tuple[str, ...]) -> Hyperparameter | None:
    if isinstance(default, bool) and words:
        return Choice(str(default).lower(), (str(default).lower(), *words))
    if isinstance(default, bool):
        return None if default and name.startswith("init_") else Flag(default)
    if isinstance(default, str):
        return Choice(default, words) if len(words) > 1 else None
    if isinstance(default, int):
        return Int(default, minimum=min(default, 0))
    return Number(default, minimum=min(default, 0.0)) if isinstance(default, float) else None
