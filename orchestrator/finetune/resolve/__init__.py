"""Turn the options of a study into checked configurations.

The steps, in this order: `option_names.resolve_tasks` checks names and values without loading anything.
`models.catalogue.prepare_base_model` finds or makes the base model.
`templates.build_configuration_templates` makes one complete configuration for each variant and checks it
against the layer shapes of the base model.
`data.prepare_datasets` writes examples and token ids to the store.
"""
