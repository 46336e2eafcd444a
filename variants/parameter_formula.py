"""The part of a variant that states its number of trainable values, as formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import ClassVar

from variants.frozen_layer import FrozenLayer
from variants.variant_settings import ExtraSettings, Value, VariantSettings

FUNCTIONS = {"min": min, "max": max, "ceil": math.ceil, "sqrt": math.sqrt, "round": round, "gcd": math.gcd}


def evaluate_formula(
    formula: str, rank: int, shape: tuple[int, int], layers: int, names: Mapping[str, Value]
) -> int:
    """Return the number that a formula such as "rank * (in + out)" has for one layer or layer group.

    Args:
        formula: A Python expression over `rank`, `in`, `out`, `layers`, `names`, and `FUNCTIONS`.
        rank: The rank in use.
        shape: (out, in) of the layer, or the largest of the group's layers.
        layers: The number of adapted layers, or of the group's layers.
        names: The result of the variant's `formula_names`.
    """
    values = {**FUNCTIONS, **names, "rank": rank, "layers": layers}
    values |= {"out": shape[0], "in_": shape[1]}  # `in` is a keyword of Python
    expression = re.sub(r"\bin\b", "in_", formula or "0")
    return int(eval(expression, {"__builtins__": {}}, values))


class ParameterCount:
    """Mixin with a variant's formulas."""

    parameters: ClassVar[str] = ""
    """Formula of the number of trainable values of one layer. It may use `rank` (the rank in use), `in`,
    `out`, `layers` (the number of adapted layers), `formula_names`, and `FUNCTIONS`."""
    shared_parameters: ClassVar[str] = ""
    """The same for the trainable tensors of each layer group, with the largest `in` and `out` of its layers
    and their number `layers`."""

    def formula_names(self, settings: VariantSettings) -> ExtraSettings:
        """Return the values that the formulas may use by name: by default, the own hyperparameters."""
        return settings.extra

    def layer_parameters(self, layer: FrozenLayer, rank: int, layers: int) -> int:
        """Return the number of trainable values of one layer; by default the value of `parameters`.

        A variant overrides this method if no formula over the layer's shape states the number.

        Args:
            layer: The frozen layer, with the lanes' settings.
            rank: The rank in use.
            layers: The number of adapted layers.
        """
        return evaluate_formula(
            self.parameters, rank, layer.shape, layers, self.formula_names(layer.settings)
        )
