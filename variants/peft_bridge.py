"""`peft:TYPE`: a variant for each tuner of the PEFT library that adapts one linear layer at a time.

PEFT's own layer computes the update (`variants.peft_layers`). `variants.peft_fields` lists the tuners and the
fields of their configs that are hyperparameters.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from variants import api
from variants.peft_fields import (
    ALPHA_FIELDS,
    DROPOUT_FIELDS,
    FIXED_FIELDS,
    OWN_ENTRIES,
    REFUSED_TYPES,
    REFUSED_VALUES,
    read_hyperparameters,
)
from variants.peft_layers import ADAPTER, SHAPES_FROM_VALUES, LayerTemplate, build_layer, split_tensors
from variants.traits import PEFT_AXIS, PEFT_PREFIX

_STARTS = {
    **dict.fromkeys(("DEFT", "HRA", "OSF"), api.Start.ROUNDED),
    "C3A": api.Start.OTHER,
    "FOURIERFT": api.Start.OTHER,
}
"""Type -> kind of start, if it is not W' = W bit for bit."""
_TYPICAL_LR_SCALES = {"C3A": 10.0, "HIRA": 10.0}
CONV1D_TYPES = ("GRALORA", "HIRA", "IA3", "LORA")
"""Types of the tuners that PEFT has for layers of type Conv1D, too."""


class PeftTuner(api.Variant):
    """W' is what PEFT's layer computes with: `peft_variant` makes a subclass for each of PEFT's types.

    Initialization: PEFT's, with noise that follows from the lane's seed and the layer's name.

    A lane group has one lane. Training with dropout computes the frozen layer once more.

    Deviations: the lane's own masks drop the input of the update; a tuner of which PEFT drops something else
    has no dropout here. IA3 counts no layer as a feed-forward layer.
    """

    batching = api.Batching.EXCLUSIVE
    dropout_on_base = True
    config_class: type[Any]
    """PEFT's config."""

    def largest_rank(self, layer: api.FrozenLayer) -> int | None:
        return None

    def scaling(self, settings: api.VariantSettings) -> float:
        """Return alpha; PEFT's layer computes the factor s from it."""
        return 1.0 if settings.alpha is None else settings.alpha

    def validate_settings(self, settings: api.VariantSettings) -> api.VariantSettings:
        complete = super().validate_settings(settings)
        for name, value in complete.extra.items():
            reason = FIXED_FIELDS.get(name) if value != self.hyperparameters[name].default else None
            reason = reason or REFUSED_VALUES.get(name, {}).get(value)
            if reason is not None:
                raise api.UnsupportedError(f"{name} {value!r}: {reason}")
        self.config(complete, 1.0)
        return complete

    def config(self, settings: api.VariantSettings, alpha: float) -> Any:
        """Return PEFT's config for complete settings, without dropout.

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
            raise api.UnsupportedError(" ".join(str(error).split())) from error

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        """Return the tensors under the names that they have in PEFT's file, without the adapter's name."""
        paths = {name: [part for part in name.split("/") if part != ADAPTER] for name in params}
        return {".".join(path): params[name] for name, path in paths.items()}

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        config = self.config(settings, self.scaling(settings)).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

    def check_layer(self, layer: api.FrozenLayer) -> None:
        out_features, in_features = layer.shape
        config = self.config(layer.settings, 1.0)
        if config.peft_type.value in SHAPES_FROM_VALUES:
            return
        try:
            build_layer(config, torch.empty(out_features, in_features, device="meta"), None, 0)
        except api.UnsupportedError as error:
            raise api.UnsupportedError(f"{layer.name}: {error}") from error

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        config = self.config(layer.settings, self.scaling(layer.settings))
        made = build_layer(config, layer.weight.to(torch.float32), layer.bias, random.seed)
        trainable, frozen = split_tensors(made)
        layer.cache[self._cache_key(layer.settings)] = LayerTemplate(
            made, self.scaling(layer.settings), self.uses_alpha
        )
        wide = {name: tensor.to(layer.dtype) for name, tensor in trainable.items()}
        return api.InitialTensors(
            wide, {n: t.to(layer.dtype) if t.is_floating_point() else t for n, t in frozen.items()}
        )

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return self.forward_with_base(x, params, layer)

    def includes_base(self, layer: api.FrozenLayer) -> bool:
        return True

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        tensors = {name: tensor[0] for name, tensor in params.items()}
        out = self._template(layer)(
            x.reshape(1, -1, x.shape[-1]), layer.weight, layer.bias, tensors, layer.scaling
        )
        return out.view(*x.shape[:-1], -1)

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        rows = torch.eye(layer.shape[1], dtype=layer.dtype, device=layer.device)
        outputs, at_zero = self._outputs(rows, params, layer)
        return (outputs - at_zero).t() - layer.weight.to(layer.dtype)

    def delta_bias(self, params: api.Params, layer: api.FrozenLayer) -> Tensor | None:
        no_rows = torch.empty(0, layer.shape[1], dtype=layer.dtype, device=layer.device)
        _, at_zero = self._outputs(no_rows, params, layer)
        return at_zero if layer.bias is None else at_zero - layer.bias.to(layer.dtype)

    def _outputs(self, rows: Tensor, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return the layer's outputs for rows of inputs, and its output for the input 0."""
        x = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).unsqueeze(0)
        bias = None if layer.bias is None else layer.bias.to(layer.dtype)
        template = self._template(layer)
        outputs = template(x, layer.weight.to(layer.dtype), bias, params, layer.scaling)[0]
        return outputs[:-1], outputs[-1]

    def _template(self, layer: api.FrozenLayer) -> LayerTemplate:
        """Return PEFT's layer for these settings, made again for a lane that was restored."""
        key = self._cache_key(layer.settings)
        if key not in layer.cache:
            made = build_layer(
                self.config(layer.settings, 1.0), layer.weight.to(torch.float32), layer.bias, 0
            )
            layer.cache[key] = LayerTemplate(made, 1.0, self.uses_alpha)
        return layer.cache[key]

    def _cache_key(self, settings: api.VariantSettings) -> str:
        return f"{self.name} {settings.rank} {sorted(settings.extra.items())}"


def peft_variant(name: str) -> api.Variant:
    """Return the variant for one of PEFT's tuners.

    Args:
        name: For example `peft:LOHA`.

    Raises:
        UnsupportedError: PEFT is not installed, or has no such tuner, or the tuner has no variant.
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
    if peft_type in REFUSED_TYPES:
        own = (
            f"; take {OWN_ENTRIES[peft_type]}, a variant of this project" if peft_type in OWN_ENTRIES else ""
        )
        raise api.UnsupportedError(f"{name}: {REFUSED_TYPES[peft_type]}{own}")
    if peft_type not in types or not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[types[peft_type]], "tuner_layer_cls"):
        known = ", ".join(sorted(types.keys() - REFUSED_TYPES.keys()))
        raise api.UnsupportedError(
            f"{name}: PEFT {peft.__version__} has no such tuner of layers; it has {known}"
        )
    if PEFT_TYPE_TO_TUNER_MAPPING[types[peft_type]].uses_shared_state:
        raise api.UnsupportedError(f"{name}: {REFUSED_TYPES['VERA']}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[types[peft_type]]
    defaults: dict[str, Any] = {each.name: each.default for each in fields(config_class)}
    attributes = {
        "__doc__": PeftTuner.__doc__,
        "name": name,
        "axis": PEFT_AXIS,
        "revision": f"peft {peft.__version__}",
        "verified_by": api.VerifiedBy.REFERENCE_IMPLEMENTATION,
        "config_class": config_class,
        "peft": api.PeftMethod(peft_type, {}, adapts_conv1d=peft_type in CONV1D_TYPES),
        "hyperparameters": read_hyperparameters(peft_type, config_class),
        "uses_rank": isinstance(defaults.get("r"), int) and defaults["r"] > 0,
        "uses_alpha": any(isinstance(defaults.get(each), int) for each in ALPHA_FIELDS),
        "uses_dropout": peft_type in DROPOUT_FIELDS,
        "start": _STARTS.get(peft_type, api.Start.BASE),
        "typical_lr_scale": _TYPICAL_LR_SCALES.get(peft_type, 1.0),
    }
    made: api.Variant = type(f"Peft{peft_type.title().replace('_', '')}", (PeftTuner,), attributes)()
    return made
