"""Turn the options of a study into checked configurations.

Three steps, in this order: `resolve_options` checks names and values without loading anything;
`build_configuration_templates` makes one complete configuration for each variant and checks it against the
layer shapes of the base model; `prepare_datasets` writes examples and token ids to the store.
"""

from __future__ import annotations

from orchestrator.finetune.resolve.data_preparation import prepare_datasets, report_train_overlap
from orchestrator.finetune.resolve.option_names import ResolvedOptions, default_model, resolve_options
from orchestrator.finetune.resolve.templates import (
    build_configuration_templates,
    corner_configurations,
    find_settings_error,
    has_layer_shapes,
    resolve_base_model,
)

__all__ = [
    "ResolvedOptions",
    "build_configuration_templates",
    "corner_configurations",
    "default_model",
    "find_settings_error",
    "has_layer_shapes",
    "prepare_datasets",
    "report_train_overlap",
    "resolve_base_model",
    "resolve_options",
]
