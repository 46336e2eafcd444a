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
from variants.base import Settings, Start, Unsupported, Variant
from variants.targets import find, is_conv1d

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model."
PREFIX = f"{ROOT}model."

_NOT_READ = (
    "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip
_OWN_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts after which PEFT has changed the base: unless converted, such an adapter fits no other base."""


def save_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """Everything of a lane (parameters, frozen tensors, settings, seed), bit for bit, as one safetensors
    file."""
    tensors = {f"trainable/{name}": tensor.detach() for name, tensor in adapters.trainable(lane).items()}
    tensors |= {f"frozen/{name}": tensor for name, tensor in adapters.frozen(lane).items()}
    about = {
        "variant": adapters.variant.name,
        "numerics": str(adapters.variant.numerics),
        "settings": json.dumps(asdict(adapters.settings_of(lane))),
        "seed": str(adapters.seed_of(lane)),
    }
    save_file(tensors, file, metadata=about)


def load_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """The lane that `save_lane` wrote. Raises Unsupported if it is another variant's or another model's."""
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    if about.get("variant") != adapters.variant.name:
        raise Unsupported(f"{file} holds a lane of {about.get('variant')}, not of {adapters.variant.name}")
    parts: dict[str, dict[str, Tensor]] = {"trainable": {}, "frozen": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        parts[part][rest] = tensor
    settings = Settings(**json.loads(about["settings"]))
    adapters.load(lane, parts["trainable"], parts["frozen"], settings, int(about["seed"]))


def save_peft(adapters: Adapters, lane: str, folder: Path, base_name: str) -> None:
    """Writes `folder` so that PeftModel.from_pretrained(base, folder) computes what the lane computes.

    Raises Unsupported if PEFT has no such method.
    """
    settings = adapters.settings_of(lane)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        own = {key: tensor.detach() for key, tensor in layer.one(lane).items()}
        parts = adapters.variant.to_peft(own, settings)
        if parts is None:
            raise Unsupported(f"{adapters.variant.name} cannot be exported: PEFT does not have this method")
        tensors |= {f"{PREFIX}{name}.{key}": tensor.contiguous().cpu() for key, tensor in parts.items()}
    if not adapters.layers:
        raise Unsupported(f"{adapters.variant.name} cannot be exported: PEFT does not have this method")
    for group in adapters.groups.values():
        shared = {key: tensor.detach() for key, tensor in group.one(lane).items()}
        for key, tensor in adapters.variant.group_to_peft(shared).items():
            tensors[f"{ROOT}{key}"] = tensor.contiguous().cpu()
    for name, head in adapters.heads.items():
        tensors |= {f"{PREFIX}{name}.{key}": t.detach().cpu() for key, t in head.own.one(lane).items()}
    config = {
        **adapters.variant.peft_config(settings),
        "base_model_name_or_path": base_name,
        "target_modules": sorted(adapters.layers),
        "modules_to_save": sorted(adapters.heads) or None,
        "fan_in_fan_out": all(is_conv1d(layer.base) for layer in adapters.layers.values()),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_peft(model: nn.Module, folder: Path, lane: str = "peft", seed: int = 0) -> Adapters:
    """Attaches the adapter in `folder` to `model` as one lane of the variant that it belongs to.

    What it saved whole (`modules_to_save`) is the lane's head. A PiSSA adapter comes back as what it was
    exported as, a LoRA of twice the rank. Raises Unsupported if no variant is its kind, or if it uses what
    the variants here do not have.
    """
    config = json.loads((folder / CONFIG).read_text())
    variant, settings = _recognise(config, folder)
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / TENSORS).items():
        if key.startswith(PREFIX):
            layer, rest = _split(key.removeprefix(PREFIX), modules)
            parts.setdefault(layer, {})[rest] = tensor
        else:
            shared[key.removeprefix(ROOT)] = tensor
    tops = [f".{name}." for name in config.get("modules_to_save") or ()]
    heads = {name: modules[name] for name in parts if any(top in f".{name}." for top in tops)}
    for name, module in heads.items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise Unsupported(f"{folder}: modules_to_save has {name}, a {kind}; only linear layers are read")
    # Past attach(), because a PiSSA export may have a rank above the layer's size.
    found = find(model, "re:" + "|".join(re.escape(layer) for layer in parts if layer not in heads))
    adapters = Adapters(model, variant, variant.checked_settings(settings), found, heads)
    starts = {
        n: variant.start_from_peft(parts[n], layer.layer, settings) for n, layer in adapters.layers.items()
    }
    starts |= {name: variant.group_from_peft(shared) for name in adapters.groups}
    starts |= {name: Start(parts[name]) for name in heads}
    trainable: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, begin in starts.items():
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        trainable |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in begin.trainable.items()}
        frozen |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in begin.frozen.items()}
    adapters.load(lane, trainable, frozen, settings, seed)
    return adapters


def _recognise(config: Mapping[str, Any], folder: Path) -> tuple[Variant, Settings]:
    for key in _NOT_READ:
        if config.get(key):
            raise Unsupported(f"{folder}: PEFT's {key} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OWN_BASE):
        raise Unsupported(f"{folder}: a {start} adapter over a changed base; let PEFT save it as plain LoRA")
    for name in catalogue.names():
        variant = catalogue.get(name)
        if "from_peft" not in vars(type(variant)):
            continue  # it exports what its parent loads
        settings = variant.from_peft(config)
        if settings is not None:
            return variant, settings
    raise Unsupported(f"{folder}: no variant here is PEFT's {config.get('peft_type')} with these settings")


def _split(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """ "layers.0.q_proj.lora_A.weight" -> ("layers.0.q_proj", "lora_A.weight")"""
    path = key.split(".")
    for end in range(len(path) - 1, 0, -1):
        if ".".join(path[:end]) in modules:
            return ".".join(path[:end]), ".".join(path[end:])
    raise Unsupported(f"the adapter changes {key!r}, which the model does not have")
