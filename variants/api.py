"""Types and helpers that most variants need, imported as `from variants import api`."""

from variants.base import RANK_MASK, Variant
from variants.batch_invariant import baddbmm, bmm
from variants.errors import MergeError, UnsupportedError
from variants.frozen_layer import (
    FrozenLayer,
    InitialTensors,
    LaneView,
    LayerRandom,
    Layers,
    LayerView,
    Params,
    RandomOf,
    shared_settings,
    stable_seed,
)
from variants.peft_format import PeftMethod
from variants.traits import AdaptationScope, Batching, CalibrationStatistic, Start, VerifiedBy
from variants.variant_settings import Choice, ExtraSettings, Flag, Int, Number, VariantSettings

__all__ = [
    "RANK_MASK", "AdaptationScope", "Batching", "CalibrationStatistic", "Choice", "ExtraSettings", "Flag",
    "FrozenLayer", "InitialTensors", "Int", "LaneView", "LayerRandom", "LayerView", "Layers", "MergeError",
    "Number", "Params", "PeftMethod", "RandomOf", "Start", "UnsupportedError", "Variant", "VariantSettings",
    "VerifiedBy", "baddbmm", "bmm", "shared_settings", "stable_seed",
]  # fmt: skip
