"""Evaluation of the formulas in which variants state their numbers of trainable values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from variants.variant_settings import Value

FUNCTIONS = {"min": min, "max": max, "ceil": math.ceil, "sqrt": math.sqrt, "round": round}


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
