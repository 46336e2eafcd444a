"""Turn the options of a study into checked configurations.

Three steps, in this order: `resolve_options` checks names and values without loading anything;
`build_configuration_templates` makes one complete configuration for each variant and checks it against the
layer shapes of the base model; `prepare_datasets` writes examples and token ids to the store.
"""
