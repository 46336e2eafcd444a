"""The part of a variant that converts a lane to the format of the PEFT library and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from variants.lane_views import FrozenLayer, InitialTensors, Params
from variants.variant_settings import VariantSettings


class PeftFormat:
    """Mixin with the conversions to and from PEFT.

    The defaults are right for a method that PEFT does not have: nothing is exported or recognized.
    """

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor] | None:
        """Return the tensors of one layer under PEFT's names.

        Args:
            params: One lane's tensors of the layer, those of its layer group included.
            settings: The lane's settings.

        Returns:
            None if PEFT does not have the method.
        """
        return None

    def layer_group_to_peft(self, params: Params) -> dict[str, Tensor]:
        """Return the tensors of a layer group under PEFT's names, relative to the root of PEFT's model."""
        return {}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        """Return the fields of PEFT's adapter_config.json that describe the result of `to_peft`."""
        raise NotImplementedError

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings | None:
        """Return the settings that a PEFT config describes.

        A subclass that does not define this method itself loads no adapters. What it exports, its parent
        class loads.

        Args:
            config: The content of adapter_config.json.

        Returns:
            None if the config belongs to another method.
        """
        return None

    def init_from_peft(
        self, tensors: Mapping[str, Tensor], layer: FrozenLayer, settings: VariantSettings
    ) -> InitialTensors:
        """Invert `to_peft`.

        Args:
            tensors: One layer's tensors under PEFT's names.
            layer: The frozen layer.
            settings: The result of `settings_from_peft`.
        """
        raise NotImplementedError

    def init_layer_group_from_peft(self, tensors: Mapping[str, Tensor]) -> InitialTensors:
        """Invert `layer_group_to_peft`."""
        raise NotImplementedError
