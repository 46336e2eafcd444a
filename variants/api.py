"""Types and helpers that most variants need, imported as `from variants import api`."""

from variants.base import Variant
from variants.batch_invariant import baddbmm, bmm
from variants.dense_update import DenseUpdate
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
from variants.hooks import (
    RANK_MASK,
    AuxiliaryLoss,
    BiasUpdate,
    Calibrated,
    DropoutOnBase,
    FrozenUpdate,
    FusesBase,
    GradientConstants,
    InitTogether,
    RankAllocation,
    RateScales,
    SharedTensors,
    StepHooks,
    parameter_lr_scale,
    schedule_lr_scale,
    statistic_of,
)
from variants.low_rank import LowRank
from variants.peft_format import PeftFormat, PeftMethod
from variants.variant_settings import (
    AdaptationScope,
    Batching,
    CalibrationStatistic,
    Choice,
    ExtraSettings,
    Flag,
    Int,
    Number,
    Start,
    VariantSettings,
    VerifiedBy,
)

__all__ = [
    "RANK_MASK", "AdaptationScope", "AuxiliaryLoss", "Batching", "BiasUpdate", "Calibrated",
    "CalibrationStatistic", "Choice", "DenseUpdate", "DropoutOnBase", "ExtraSettings", "Flag", "FrozenLayer",
    "FrozenUpdate", "FusesBase", "GradientConstants", "InitTogether", "InitialTensors", "Int", "LaneView",
    "LayerRandom", "LayerView", "Layers", "LowRank", "MergeError", "Number", "Params", "PeftFormat",
    "PeftMethod", "RandomOf", "RankAllocation", "RateScales", "SharedTensors", "Start", "StepHooks",
    "UnsupportedError", "Variant", "VariantSettings", "VerifiedBy", "baddbmm", "bmm", "parameter_lr_scale",
    "schedule_lr_scale", "shared_settings", "stable_seed", "statistic_of",
]  # fmt: skip
