"""Errors that variants and adapters raise."""

from __future__ import annotations


class MergeError(ValueError):
    """The update of a lane cannot be added to the base model's weights."""


class UnsupportedError(ValueError):
    """A setting, layer, model or file is not supported; the message names it and says why."""


class UnassignedRowsError(RuntimeError):
    """An adapted layer was called with rows that belong to no known lane."""


class BypassedLayerError(RuntimeError):
    """The model read an adapted layer's weight without calling the layer, so the adapter has no effect."""
