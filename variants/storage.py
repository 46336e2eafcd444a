"""A lane on disk: exactly as it is, or in the PEFT library's format, there and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from variants import catalogue
from variants.attach import Adapters
from variants.base import InitialTensors, UnsupportedError, Variant, VariantSettings
from variants.targets import find_target_layers, is_conv1d

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_ROOT = "base_model."
PEFT_PREFIX = f"{PEFT_ROOT}model."

_UNSUPPORTED_PEFT_KEYS = (
    "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts after which PEFT has changed the base: unless converted, such an adapter fits no other base."""


def save_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """Everything of a lane (parameters, frozen tensors, settings, seed), bit for bit, as one safetensors
    file.
    """
    tensors = {f"trainable/{name}": tensor.detach() for name, tensor in adapters.trainable(lane).items()}
    tensors |= {f"frozen/{name}": tensor for name, tensor in adapters.frozen(lane).items()}
    metadata = {
        "variant": adapters.variant.name,
        "numerics": str(adapters.variant.numerics),
        "settings": json.dumps(asdict(adapters.lane_settings(lane))),
        "seed": str(adapters.lane_seed(lane)),
    }
    save_file(tensors, file, metadata=metadata)


def load_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """The lane that `save_lane` wrote. Raises Unsupported if it is another variant's or another model's."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    if metadata.get("variant") != adapters.variant.name:
        raise UnsupportedError(
            f"{file} holds a lane of {metadata.get('variant')}, not of {adapters.variant.name}"
        )
    parts: dict[str, dict[str, Tensor]] = {"trainable": {}, "frozen": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        parts[part][rest] = tensor
    settings = VariantSettings(**json.loads(metadata["settings"]))
    adapters.restore_lane(lane, parts["trainable"], parts["frozen"], settings, int(metadata["seed"]))


def save_peft(adapters: Adapters, lane: str, folder: Path, base_model_name: str) -> None:
    """Writes `folder` so that PeftModel.from_pretrained(base, folder) computes what the lane computes.

    Raises Unsupported if PEFT has no such method.
    """
    settings = adapters.lane_settings(lane)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        lane_tensors = {key: tensor.detach() for key, tensor in layer.lane_tensors(lane).items()}
        parts = adapters.variant.to_peft(lane_tensors, settings)
        if parts is None:
            raise UnsupportedError(
                f"{adapters.variant.name} cannot be exported: PEFT does not have this method"
            )
        tensors |= {f"{PEFT_PREFIX}{name}.{key}": tensor.contiguous().cpu() for key, tensor in parts.items()}
    if not adapters.layers:
        raise UnsupportedError(f"{adapters.variant.name} cannot be exported: PEFT does not have this method")
    for group in adapters.layer_groups.values():
        shared = {key: tensor.detach() for key, tensor in group.lane_tensors(lane).items()}
        for key, tensor in adapters.variant.layer_group_to_peft(shared).items():
            tensors[f"{PEFT_ROOT}{key}"] = tensor.contiguous().cpu()
    for name, head in adapters.heads.items():
        tensors |= {
            f"{PEFT_PREFIX}{name}.{key}": t.detach().cpu()
            for key, t in head.own_tensors.lane_tensors(lane).items()
        }
    config = {
        **adapters.variant.peft_config(settings),
        "base_model_name_or_path": base_model_name,
        "target_modules": sorted(adapters.layers),
        "modules_to_save": sorted(adapters.heads) or None,
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in adapters.layers.values()),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_peft(model: nn.Module, folder: Path, lane: str = "peft", seed: int = 0) -> Adapters:
    """Attaches the adapter in `folder` to `model` as one lane of the variant that it belongs to.

    What it saved whole (`modules_to_save`) is the lane's head. A PiSSA adapter comes back as what it was
    exported as, a LoRA of twice the rank. Raises Unsupported if no variant is its kind, or if it uses what
    the variants here do not have.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    variant, settings = _match_variant(config, folder)
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / TENSORS_FILE).items():
        if key.startswith(PEFT_PREFIX):
            layer, rest = _split_key(key.removeprefix(PEFT_PREFIX), modules)
            parts.setdefault(layer, {})[rest] = tensor
        else:
            shared[key.removeprefix(PEFT_ROOT)] = tensor
    tops = [f".{name}." for name in config.get("modules_to_save") or ()]
    heads = {name: modules[name] for name in parts if any(top in f".{name}." for top in tops)}
    for name, module in heads.items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UnsupportedError(
                f"{folder}: modules_to_save has {name}, a {kind}; only linear layers are read"
            )
    # Past attach(), because a PiSSA export may have a rank above the layer's size.
    target_layers = find_target_layers(
        model, "re:" + "|".join(re.escape(layer) for layer in parts if layer not in heads)
    )
    adapters = Adapters(model, variant, variant.validate_settings(settings), target_layers, heads)
    initial = {
        n: variant.init_from_peft(parts[n], layer.frozen_layer, settings)
        for n, layer in adapters.layers.items()
    }
    initial |= {name: variant.init_layer_group_from_peft(shared) for name in adapters.layer_groups}
    initial |= {name: InitialTensors(parts[name]) for name in heads}
    trainable: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, owner_initial in initial.items():
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        trainable |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in owner_initial.trainable.items()}
        frozen |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in owner_initial.frozen.items()}
    adapters.restore_lane(lane, trainable, frozen, settings, seed)
    return adapters


def _match_variant(config: Mapping[str, Any], folder: Path) -> tuple[Variant, VariantSettings]:
    for key in _UNSUPPORTED_PEFT_KEYS:
        if config.get(key):
            raise UnsupportedError(f"{folder}: PEFT's {key} is not supported")
    init_method = config.get("init_lora_weights")
    if isinstance(init_method, str) and init_method.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedError(
            f"{folder}: a {init_method} adapter over a changed base; let PEFT save it as plain LoRA"
        )
    for name in catalogue.names():
        variant = catalogue.get(name)
        if "settings_from_peft" not in vars(type(variant)):
            continue  # it exports what its parent loads
        settings = variant.settings_from_peft(config)
        if settings is not None:
            return variant, settings
    raise UnsupportedError(
        f"{folder}: no variant here is PEFT's {config.get('peft_type')} with these settings"
    )


def _split_key(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """ "layers.0.q_proj.lora_A.weight" -> ("layers.0.q_proj", "lora_A.weight")"""
    path = key.split(".")
    for end in range(len(path) - 1, 0, -1):
        if ".".join(path[:end]) in modules:
            return ".".join(path[:end]), ".".join(path[end:])
    raise UnsupportedError(f"the adapter changes {key!r}, which the model does not have")
