"""Saving and loading of a lane: exactly, or in the format of the PEFT library."""

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
from variants.adapters import Adapters
from variants.api import InitialTensors, UnsupportedError, Variant, VariantSettings
from variants.peft_format import (
    PATTERN_FIELDS,
    TASK_HEADS,
    PeftFormat,
    PeftMethod,
    TaskType,
    peft_method,
    peft_obstacle,
)
from variants.targets import find_target_layers, is_conv1d
from variants.variant_settings import USER_AXIS

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files that PEFT writes for an adapter."""
PEFT_ROOT = "base_model."
"""Prefix of the names of all tensors in PEFT's file."""
PEFT_PREFIX = f"{PEFT_ROOT}model."
"""Prefix of the names of tensors that belong to a module of the base model."""

_UNSUPPORTED_PEFT_KEYS = (
    "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initializations for which PEFT changes the base model: such an adapter fits only that base, unless PEFT has
converted it on saving."""


def save_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """Save parameters, frozen tensors, settings and seed of a lane, bit for bit, as one safetensors file.

    Args:
        adapters: The adapters that hold the lane.
        lane: The lane to save.
        file: The path of the new file.
    """
    tensors = {f"trainable/{name}": tensor.detach() for name, tensor in adapters.trainable(lane).items()}
    tensors |= {f"frozen/{name}": tensor for name, tensor in adapters.frozen(lane).items()}
    metadata = {
        "variant": adapters.variant.name,
        "numerics": str(adapters.variant.numerics),
        "revision": adapters.variant.revision,
        "class": type(adapters.variant).__qualname__,
        "settings": json.dumps(asdict(adapters.lane_settings(lane))),
        "seed": str(adapters.lane_seed(lane)),
    }
    save_file(tensors, file, metadata=metadata)


def load_lane(adapters: Adapters, lane: str, file: Path) -> None:
    """Add a lane that `save_lane` wrote.

    A variant of a user is known by its class and by the revision of its file, so the file may be renamed; a
    variant of this package is known by its name.

    Args:
        adapters: The adapters that get the lane.
        lane: The lane's new name.
        file: The file to read.

    Raises:
        UnsupportedError: The file belongs to another variant or to other numerics or another revision of it,
            or does not fit the model.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    _check_identity(metadata, adapters.variant, file)
    parts: dict[str, dict[str, Tensor]] = {"trainable": {}, "frozen": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        parts[part][rest] = tensor
    settings = VariantSettings(**json.loads(metadata["settings"]))
    adapters.restore_lane(lane, parts["trainable"], parts["frozen"], settings, int(metadata["seed"]))


def _check_identity(metadata: Mapping[str, str], variant: Variant, file: Path) -> None:
    """Raise UnsupportedError if a file of a lane belongs to another variant, or to other code of it."""
    if variant.axis == USER_AXIS and metadata.get("revision") == variant.revision:
        is_same = metadata.get("class") == type(variant).__qualname__
    else:
        is_same = metadata.get("variant") == variant.name
    if not is_same:
        raise UnsupportedError(f"{file} holds a lane of {metadata.get('variant')}, not of {variant.name}")
    if metadata.get("numerics") != str(variant.numerics):
        raise UnsupportedError(
            f"{file} was saved with numerics {metadata.get('numerics')} of {variant.name}; "
            f"this version has {variant.numerics}"
        )
    if metadata.get("revision", "") != variant.revision:
        raise UnsupportedError(
            f"{file} was saved with revision {metadata.get('revision')!r} of {variant.name}; this "
            f"version has {variant.revision!r}"
        )


def save_peft(
    adapters: Adapters,
    lane: str,
    folder: Path,
    base_model_name: str,
    task_type: TaskType | None = None,
    base_model_revision: str | None = None,
) -> None:
    """Export a lane to a folder that PEFT loads.

    `PeftModel.from_pretrained(base, folder)` loads it, and so does the class `AutoPeftModelFor...` of the
    task type, which loads the base model too; without a task type, `AutoPeftModel` for a model of
    transformers. A model with a head needs the argument `num_labels`, unless the base model's config has it.

    Args:
        adapters: The adapters that hold the lane.
        lane: The lane to export.
        folder: The folder to write.
        base_model_name: The base model's folder, or its name on the hub, for adapter_config.json.
        task_type: PEFT's task type; None for one that PEFT does not have, such as the classes of images.
        base_model_revision: The revision of the base model on the hub.

    Raises:
        UnsupportedError: PEFT does not have the method, or not for layers of this type.
    """
    peft = peft_method(adapters.variant)
    if peft is None:
        raise UnsupportedError(
            f"{adapters.variant.name} cannot be exported: {peft_obstacle(adapters.variant)}"
        )
    if not peft.adapts_conv1d and any(is_conv1d(layer.base_layer) for layer in adapters.layers.values()):
        raise UnsupportedError(
            f"{adapters.variant.name} cannot be exported: PEFT has this method for layers of type Linear only"
        )
    heads = _saved_modules(adapters, lane, task_type)
    tensors = _convert_layers(adapters, lane)
    for group in adapters.layer_groups.values():
        for key, peft_key in peft.group_names.items():
            tensors[f"{PEFT_ROOT}{peft_key}"] = group.lane_tensors(lane)[key]
    for name, head in heads.items():
        tensors |= {f"{PEFT_PREFIX}{name}.{key}": tensor for key, tensor in head.items()}
    config = {
        **peft_fields(adapters, lane),
        **_model_fields(adapters),
        "base_model_name_or_path": base_model_name,
        "revision": base_model_revision,
        "task_type": task_type,
        "modules_to_save": sorted(heads) or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory, as those of a layer group do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / TENSORS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def peft_fields(adapters: Adapters, lane: str) -> dict[str, Any]:
    """Return the fields of PEFT's adapter_config.json that describe a lane's method and its settings.

    Args:
        adapters: The adapters that hold the lane, of a variant that PEFT has.
        lane: The lane.
    """
    variant = adapters.variant
    assert isinstance(variant, PeftFormat)
    fields = variant.peft_config(adapters.lane_settings(lane))
    by_field: dict[str, dict[str, Any]] = {}
    for name, layer in adapters.layers.items():
        own = variant.peft_layer_fields(layer.lane_tensors(lane), layer.lane_layer(lane))
        for key, value in own.items():
            by_field.setdefault(key, {})[name] = value
    for key, values in by_field.items():
        if len(set(values.values())) == 1:
            fields[key] = next(iter(values.values()))
        else:
            fields[PATTERN_FIELDS[key]] = values
    return fields


def _convert_layers(adapters: Adapters, lane: str) -> dict[str, Tensor]:
    """Return the layers' tensors by the names in PEFT's file."""
    tensors: dict[str, Tensor] = {}
    variant = adapters.variant
    assert isinstance(variant, PeftFormat)
    for name, layer in adapters.layers.items():
        lane_tensors = {key: tensor.detach() for key, tensor in layer.lane_tensors(lane).items()}
        for key, tensor in variant.to_peft(lane_tensors, layer.lane_layer(lane)).items():
            tensors[f"{PEFT_PREFIX}{name}.{key}"] = tensor
    return tensors


def _model_fields(adapters: Adapters) -> dict[str, Any]:
    """Return the fields of adapter_config.json that follow from the model and its layers."""
    fields: dict[str, Any] = {"target_modules": sorted(adapters.layers), "inference_mode": True}
    model_class = type(adapters.model)
    if model_class.__module__.startswith("transformers."):  # for `AutoPeftModel`, without a task type
        names = {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}
        fields["auto_mapping"] = names
    peft = peft_method(adapters.variant)
    if peft is not None and peft.adapts_conv1d:  # PEFT's other methods do not have this field
        layers = adapters.layers.values()
        fields["fan_in_fan_out"] = all(is_conv1d(layer.base_layer) for layer in layers)
    return fields


def _saved_modules(adapters: Adapters, lane: str, task_type: TaskType | None) -> dict[str, dict[str, Tensor]]:
    """Return the modules that PEFT reads from the adapter's file as a whole, by path, with all their tensors.

    These are the lane's heads, and the modules that PEFT's model of the task type takes for a head. Such a
    module may contain several heads (RoBERTa's classifier), and other parameters, which are the base model's.
    """
    endings = TASK_HEADS.get(task_type or "", ())
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in adapters.model.named_modules():
        inside = any(path.startswith(f"{name}.") for name in found)
        if inside or not (path in adapters.heads or (endings and path.endswith(endings))):
            continue
        own = {f".{key}".replace(".base_layer.", ".")[1:]: t for key, t in module.state_dict().items()}
        for name, head in adapters.heads.items():
            if f"{name}.".startswith(f"{path}."):
                inner = f"{name}.".removeprefix(f"{path}.")
                own |= {f"{inner}{key}": t for key, t in head.own_tensors.lane_tensors(lane).items()}
        found[path] = own
    return found


def load_peft(model: nn.Module, folder: Path, lane: str = "peft") -> Adapters:
    """Attach an adapter that PEFT or `save_peft` wrote, as one lane of the matching variant.

    The modules that PEFT saved in full (`modules_to_save`) become the lane's head. An exported PiSSA adapter
    becomes a LoRA of twice the rank.

    Args:
        model: The base model, without adapters.
        folder: The folder with adapter_config.json and adapter_model.safetensors.
        lane: The lane's name.

    Raises:
        UnsupportedError: No variant matches, or the adapter uses a feature that the variants do not have.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    variant, settings = _match_variant(config, folder)
    modules = dict(model.named_modules())
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    tensors_by_module, shared = _read_peft_tensors(folder / TENSORS_FILE, modules, dtype)
    saved_in_full = [f".{name}." for name in config.get("modules_to_save") or ()]
    heads = {
        name: modules[name]
        for name in tensors_by_module
        if any(part in f".{name}." for part in saved_in_full)
    }
    for name, module in heads.items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UnsupportedError(
                f"{folder}: modules_to_save has {name}, a {kind}; only linear layers are read"
            )
    target_layers = find_target_layers(
        model, "re:" + "|".join(re.escape(name) for name in tensors_by_module if name not in heads)
    )
    # Not by attach(): the rank of an exported PiSSA adapter may exceed the size of a layer.
    adapters = Adapters(model, variant, variant.validate_settings(settings), target_layers, heads)
    assert isinstance(variant, PeftFormat)
    initial = {name: variant.init_from_peft(tensors_by_module[name], settings) for name in adapters.layers}
    initial |= {name: variant.init_group_from_peft(shared, settings) for name in adapters.layer_groups}
    initial |= {name: InitialTensors(tensors_by_module[name]) for name in heads}
    trainable = {f"{name}.{key}": t for name, each in initial.items() for key, t in each.trainable.items()}
    frozen = {f"{name}.{key}": t for name, each in initial.items() for key, t in each.frozen.items()}
    adapters.restore_lane(lane, trainable, frozen, settings)
    return adapters


def _read_peft_tensors(
    file: Path, modules: Mapping[str, nn.Module], dtype: torch.dtype
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return module -> PEFT's name -> tensor, and the tensors that belong to no module of the base model."""
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, stored in load_file(file).items():
        tensor = stored.to(dtype) if stored.is_floating_point() else stored
        if key.startswith(PEFT_PREFIX):
            name, rest = _split_key(key.removeprefix(PEFT_PREFIX), modules)
            tensors_by_module.setdefault(name, {})[rest] = tensor
        else:
            shared[key.removeprefix(PEFT_ROOT)] = tensor
    return tensors_by_module, shared


def _match_variant(config: Mapping[str, Any], folder: Path) -> tuple[Variant, VariantSettings]:
    for key in _UNSUPPORTED_PEFT_KEYS:
        if config.get(key):
            raise UnsupportedError(f"{folder}: PEFT's {key} is not supported")
    if config.get("bias") not in (None, "none"):
        # The biases that PEFT trained are in the file, and no variant has them.
        raise UnsupportedError(f"{folder}: PEFT's bias {config['bias']!r} (trained biases) is not supported")
    init_method = config.get("init_lora_weights")
    if isinstance(init_method, str) and init_method.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedError(
            f"{folder}: a {init_method} adapter over a base model that PEFT has changed; let PEFT save it as "
            "plain LoRA (`path_initial_model_for_weight_conversion`)"
        )
    for name in catalogue.names():
        variant = catalogue.get(name)
        peft: PeftMethod | None = vars(type(variant)).get("peft")
        if peft is not None and isinstance(variant, PeftFormat) and peft.describes(config):
            return variant, variant.settings_from_peft(config)
    raise UnsupportedError(
        f"{folder}: no variant here is PEFT's {config.get('peft_type')} with these settings"
    )


def _split_key(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Split "layers.0.q_proj.lora_A.weight" into ("layers.0.q_proj", "lora_A.weight")."""
    path = key.split(".")
    for end in range(len(path) - 1, 0, -1):
        if ".".join(path[:end]) in modules:
            return ".".join(path[:end]), ".".join(path[end:])
    raise UnsupportedError(f"the adapter changes {key!r}, which the model does not have")
