"""Replacement of modules inside a model, and its reversal."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from variants.base_dropout import LaneDropout, TableDropout
from variants.forward_context import AdapterState
from variants.heads import LaneHead
from variants.lane_linear import LaneLinear


class ModuleSwap:
    """The modules that stand in a model in place of its own, with what is needed to undo the change.

    While they are in place, all parameters of the model are frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        wrappers: Iterable[LaneLinear | LaneHead],
        state: AdapterState,
        base_dropout: bool,
    ) -> None:
        """Put the modules into the model.

        Args:
            model: The model to change.
            wrappers: Modules that replace their `base_layer`.
            state: The state that the dropout modules share with the wrappers.
            base_dropout: Whether to replace the model's dropout by dropout with separate masks for each lane.
        """
        replacements: dict[int, nn.Module] = {id(wrapper.base_layer): wrapper for wrapper in wrappers}
        self._attention_modules: list[nn.Module] = []
        if base_dropout:
            replacements |= {
                id(module): LaneDropout(name, module.p, state, isinstance(module, TableDropout))
                for name, module in model.named_modules()
                if isinstance(module, nn.Dropout) and module.p > 0
            }
            for name, module in list(model.named_modules()):
                if hasattr(module, "is_causal"):  # an attention module of transformers
                    module.lane_dropout = LaneDropout(f"{name}.probabilities", 0.0, state)
                    module.training = True  # otherwise it passes dropout 0 to its attention function
                    self._attention_modules.append(module)
        # A module may have several parents (tied layers): it is replaced in all of them.
        self._replaced_modules = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in replacements
        ]
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = replacements[id(child)]
        self._original_requires_grad = [
            (parameter, parameter.requires_grad) for parameter in model.parameters()
        ]
        for parameter, _ in self._original_requires_grad:
            parameter.requires_grad_(False)

    def undo(self) -> None:
        """Restore the model's own modules and flags; a second call has no effect."""
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = child
        for parameter, required in self._original_requires_grad:
            parameter.requires_grad_(required)
        for module in self._attention_modules:
            del module.lane_dropout
            module.training = False
        self._replaced_modules, self._original_requires_grad, self._attention_modules = [], [], []
