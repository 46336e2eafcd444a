"""The part of a variant that converts a lane to the format of the PEFT library and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from variants.frozen_layer import FrozenLayer, InitialTensors, Params
from variants.variant_settings import VariantSettings

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
"""PEFT's name for the kind of a task, which decides the class `AutoPeftModelFor...` that loads an adapter."""
PATTERN_FIELDS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "block_size": "block_size_pattern"}
"""Field of PEFT's config -> its field for the values of single layers."""
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
"""Task type -> endings of the names of the modules that PEFT's model of this type always reads as a whole
from the file of the adapter."""


@dataclass(frozen=True)
class PeftMethod:
    """A method of the PEFT library: its name, and the names of its tensors and of its config's fields."""

    peft_type: str
    names: Mapping[str, str]
    """Name of a layer's tensor -> PEFT's name below the module, without the adapter's name."""
    group_names: Mapping[str, str] = field(default_factory=dict)
    """Name of a frozen tensor of a layer group -> PEFT's name, relative to the root of PEFT's model."""
    rank: str = "r"
    """PEFT's field for the rank. It is written if the variant uses the rank."""
    alpha: str = "lora_alpha"
    """PEFT's field for alpha, likewise."""
    dropout: str = "lora_dropout"
    """PEFT's field for the dropout, likewise."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Own hyperparameter of the variant -> PEFT's field."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields that have the same value in every adapter of the method. An adapter in which they have another
    value belongs to another method."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Own hyperparameter of the variant -> the value that it has in an adapter of PEFT."""
    optional: frozenset[str] = frozenset()
    """Those of our tensors in `names` that not every layer has."""
    adapts_conv1d: bool = True
    """False if PEFT has the method for layers of type Linear only, and not for Conv1D (GPT-2)."""

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Return whether an adapter_config.json belongs to this method."""
        fixed = ((config.get(name), value) for name, value in self.constants.items())
        # A field that an older PEFT did not write counts as false.
        return config.get("peft_type") == self.peft_type and all(
            given == value or (not given and not value) for given, value in fixed
        )


class PeftFormat:
    """Mixin with the conversions to and from PEFT.

    They follow from `peft`; a variant overrides them where a value has to be converted.
    """

    peft: ClassVar[PeftMethod | None] = None
    """The method's description for PEFT; None if PEFT does not have the method. A subclass that does not
    define this attribute itself loads no adapters: what it exports, its parent class loads."""
    uses_rank: ClassVar[bool]
    uses_alpha: ClassVar[bool]
    uses_dropout: ClassVar[bool]

    def to_peft(self, params: Params, layer: FrozenLayer) -> dict[str, Tensor]:
        """Return the tensors of one layer under PEFT's names.

        Args:
            params: One lane's tensors of the layer, those of its layer group included.
            layer: The frozen layer, with the lane's settings and its factor s, ().
        """
        assert self.peft is not None
        missing = self.peft.optional - params.keys()
        return {theirs: params[ours] for ours, theirs in self.peft.names.items() if ours not in missing}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        """Return the fields of PEFT's adapter_config.json that describe the result of `to_peft`."""
        peft = self.peft
        assert peft is not None
        values = (
            (self.uses_rank, peft.rank, settings.rank),
            (self.uses_alpha, peft.alpha, settings.alpha),
            (self.uses_dropout, peft.dropout, settings.dropout),
        )
        config = {name: value for is_used, name, value in values if is_used}
        own = {name: settings.extra[ours] for ours, name in peft.fields.items()}
        return {"peft_type": peft.peft_type, **config, **own, **peft.constants}

    def peft_layer_fields(self, params: Params, layer: FrozenLayer) -> dict[str, Any]:
        """Return the fields of PEFT's config that depend on the layer.

        A value that differs between layers needs a further field of PEFT, such as `block_size_pattern`, which
        maps layers to values.

        Args:
            params: One lane's tensors of the layer.
            layer: The frozen layer, with the lane's settings.
        """
        return {}

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings:
        """Return the settings that a PEFT config of this method describes.

        Args:
            config: The content of adapter_config.json.
        """
        peft = self.peft
        assert peft is not None
        own = {ours: config[name] for ours, name in peft.fields.items() if config.get(name) is not None}
        return VariantSettings(
            int(config[peft.rank]) if self.uses_rank else 0,
            float(config[peft.alpha]) if self.uses_alpha else None,
            float(config.get(peft.dropout) or 0.0) if self.uses_dropout else 0.0,
            {**own, **peft.fixed},
        )

    def init_from_peft(self, tensors: Params, settings: VariantSettings) -> InitialTensors:
        """Invert `to_peft`. Tensors of whole numbers are frozen, because they have no gradient.

        Args:
            tensors: One layer's tensors under PEFT's names.
            settings: The result of `settings_from_peft`.
        """
        peft = self.peft
        assert peft is not None
        present = {
            ours: tensors[theirs]
            for ours, theirs in peft.names.items()
            if theirs in tensors or ours not in peft.optional
        }
        trainable = {name: tensor for name, tensor in present.items() if tensor.is_floating_point()}
        return InitialTensors(trainable, {n: t for n, t in present.items() if n not in trainable})

    def init_group_from_peft(self, tensors: Params, settings: VariantSettings) -> InitialTensors:
        """Return a layer group's tensors.

        Args:
            tensors: The tensors of PEFT's file that belong to no module of the base model, by PEFT's name.
            settings: The result of `settings_from_peft`.
        """
        names = {} if self.peft is None else self.peft.group_names
        return InitialTensors({}, {name: tensors[peft_name] for name, peft_name in names.items()})


def peft_method(variant: object) -> PeftMethod | None:
    """Return the description of a variant's method for PEFT; None if PEFT does not have it."""
    return variant.peft if isinstance(variant, PeftFormat) else None
