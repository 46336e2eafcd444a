"""The part of a variant that converts a lane to the format of the PEFT library and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from variants.lane_views import InitialTensors, Params
from variants.variant_settings import VariantSettings

PEFT_FLAGS = ("use_rslora", "use_dora")
"""Fields of PEFT's config that turn LoRA into another method."""


class PeftFormat:
    """Mixin with the conversions to and from PEFT.

    The defaults are right for a method that PEFT does not have: nothing is exported or loaded.
    """

    peft_method: ClassVar[tuple[str, ...]] = ()
    """PEFT's `peft_type` of the method, followed by those of `PEFT_FLAGS` that are set. A subclass that does
    not define this attribute itself loads no adapters: what it exports, its parent class loads."""
    peft_names: ClassVar[Mapping[str, str]] = {}
    """Name of a layer's tensor -> PEFT's name; empty if PEFT does not have the method."""
    peft_group_names: ClassVar[Mapping[str, str]] = {}
    """Name of a frozen tensor of a layer group -> PEFT's name, relative to the root of PEFT's model."""

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor]:
        """Return the tensors of one layer under PEFT's names.

        Args:
            params: One lane's tensors of the layer, those of its layer group included.
            settings: The lane's settings.

        Returns:
            An empty mapping if PEFT does not have the method.
        """
        return {peft_name: params[name] for name, peft_name in self.peft_names.items()}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        """Return the fields of PEFT's adapter_config.json that describe the result of `to_peft`."""
        raise NotImplementedError

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings:
        """Return the settings that a PEFT config of this method describes.

        Args:
            config: The content of adapter_config.json.
        """
        raise NotImplementedError

    def init_from_peft(self, tensors: Params, settings: VariantSettings) -> InitialTensors:
        """Invert `to_peft`.

        Args:
            tensors: One layer's tensors under PEFT's names.
            settings: The result of `settings_from_peft`.
        """
        return InitialTensors({name: tensors[peft_name] for name, peft_name in self.peft_names.items()})
