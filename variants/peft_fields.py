"""The tuners of the PEFT library that a variant can have, and the hyperparameters in their configs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from variants.variant_settings import Choice, Flag, Hyperparameter, Int, Number

_SHARED = "its layers share tensors, and `peft:` makes each layer alone"
_SEQUENCE = "it adds positions to the sequence instead of changing a linear layer"
_MODEL = "it changes the whole model instead of one linear layer"
REFUSED_TYPES = {
    **dict.fromkeys(("FROD", "LILY", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA"), _SHARED),
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
        _SEQUENCE,
    ),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW", "XLORA"), _MODEL),
    "ADALORA": "its ranks stay as they are unless PEFT's allocator is called after each step",
    "LN_TUNING": "it trains normalization layers instead of linear layers",
    "POLY": "it needs the number of the task with every input",
    "TRAINABLE_TOKENS": "it trains rows of an embedding instead of a linear layer",
}
"""PEFT's types that have no variant, with the reason."""
OWN_ENTRIES = {"ADALORA": "adalora", "RANDLORA": "rand_lora", "VBLORA": "vb_lora", "VERA": "vera"}
"""Variants of this project for refused types."""

DROPOUT_FIELDS = {
    "DELORA": "module_dropout",
    "GRALORA": "gralora_dropout",
    "HIRA": "hira_dropout",
    "LORA": "lora_dropout",
    "MISS": "miss_dropout",
    "PSOFT": "psoft_dropout",
}
"""Type -> field of the probability with which an input of the update is zeroed. The variant's `dropout`
replaces it, so that the masks follow from the lane's seed."""
ALPHA_FIELDS = ("lora_alpha", "alpha", "psoft_alpha")
"""Fields that are the alpha of the variant."""

_GLOBAL_NOISE = "PEFT draws its masks from PyTorch's global random state"
_CHANGES_BASE = "PEFT changes the weights of the base model for it, which all lanes share"
FIXED_FIELDS = {
    "apply_GS": "PEFT's initial vectors are equal in pairs, of which orthogonalization makes NaN",
    "boft_dropout": _GLOBAL_NOISE,
    "boft_n_butterfly_factor": "PEFT ignores it without its CUDA extension",
    "coft": "PEFT overwrites the parameters in the forward pass",
    "deft_dropout": "PEFT applies it to a part of the update only",
    "module_dropout": _GLOBAL_NOISE,
    "proportional_parameters": "PEFT distributes the values over all layers of a model for it",
    "rank_dropout": _GLOBAL_NOISE,
    "use_asa": "PEFT masks subspaces in a call after each step, which a study does not make",
    "use_qalora": "it needs a base model that is quantized with GPTQ",
}
"""Fields of which only the default is accepted, with the reason."""
REFUSED_VALUES: dict[str, dict[Any, str]] = {
    "init_lora_weights": {
        **dict.fromkeys(("corda", "loftq", "olora", "pissa"), _CHANGES_BASE),
        "eva": "PEFT computes it from calibration data",
    }
}
"""Field -> values that are not accepted -> reason."""
_OMITTED = {
    "asa_importance_beta", "asa_schedule_exponent", "asa_target_subspaces", "asa_uncertainty_beta", "bias",
    "ensure_weight_tying", "eps", "fan_in_fan_out", "final_warmup", "inference_mode", "init_scale",
    "init_warmup", "lora_dropout", "mask_interval", "qalora_group_size", "rank_dropout_scale",
    "save_precomputed_indices", "use_effective_conv2d",
}  # fmt: skip
"""Fields without effect on one linear layer, or with an effect only together with a refused value."""


def read_hyperparameters(peft_type: str, config_class: type[Any]) -> dict[str, Hyperparameter]:
    """Return the hyperparameters of a tuner that only its variant has.

    They are the fields of the config that are numbers, flags or one of several words. A flag for an
    initialization that only PEFT's tests switch off is none.

    Args:
        peft_type: PEFT's type.
        config_class: PEFT's config.
    """
    hints = get_type_hints(config_class)
    skipped = {*_OMITTED, *ALPHA_FIELDS, DROPOUT_FIELDS.get(peft_type)}
    found: dict[str, Hyperparameter] = {}
    for each in fields(config_class):
        is_rank = each.name == "r" and isinstance(each.default, int) and each.default > 0
        if each.name not in skipped and not is_rank:
            declared = _declare(each.name, each.default, _words(hints[each.name]))
            if declared is not None:
                reason = FIXED_FIELDS.get(each.name)
                fixed = f"only the default: {reason}" if reason else ""
                found[each.name] = replace(declared, help=fixed)
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
