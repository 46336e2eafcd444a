"""A frozen linear layer that several lanes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from variants.base import Kind, Layer, Params, Variant
from variants.lane_tensors import LaneTensors
from variants.rows import Board, Rows, by_lane, masks
from variants.targets import is_conv1d

LARGE = 1 << 20
"""A dense update with more numbers than this is recomputed in backward instead of kept: below it the Python
cost of recomputing (about 0.1 ms) outweighs the memory."""


class BypassedLayer(RuntimeError):
    """The model read an adapted layer's weight and never called the layer: its adapter has no effect."""


class LaneLinear(nn.Module):
    """Stands in the model where the frozen layer `base` stood, and adds each lane's update to its output."""

    def __init__(
        self, name: str, base: nn.Module, variant: Variant, board: Board, group: LaneTensors | None = None
    ) -> None:
        super().__init__()
        self.name, self.base, self.variant, self.board = name, base, variant, board
        self.own = LaneTensors(variant.moving, variant.unseen)
        self.group = group
        self._layer: Layer | None = None
        self._seen = (0, 0)

    @property
    def layer(self) -> Layer:
        """The frozen layer as variants see it; made anew when the weight has moved or was written."""
        stored: Tensor = self.base.weight  # type: ignore[assignment]
        seen = stored.data_ptr(), stored._version
        if self._layer is None or self._seen != seen:
            self._seen = seen
            weight = stored.detach().t() if is_conv1d(self.base) else stored.detach()
            bias: Tensor | None = self.base.bias  # type: ignore[assignment]
            self._layer = Layer(self.name, weight, None if bias is None else bias.detach())
        return self._layer

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, for models that ask for its dtype or device."""
        if self.board.now is not None:
            self.board.now.read.add(self.name)
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)  # in_features, nf, and whatever else models look at

    def one(self, lane: str) -> dict[str, Tensor]:
        """All that a lane has here: its own tensors and its group's."""
        return {**(self.group.one(lane) if self.group else {}), **self.own.one(lane)}

    def forward(self, x: Tensor) -> Tensor:
        rows = self.board.rows(self.name)
        rows.called.add(self.name)
        base = self.base(x)
        if not rows.lanes or x.numel() == 0:
            return base
        flat = by_lane(x, rows, self.name)
        flat_base = base.reshape(len(rows.lanes), -1, base.shape[-1])
        if rows.steps is not None and self.variant.auxiliary and torch.is_grad_enabled():
            self._add_auxiliary(flat, rows)
        if rows.steps is None or self.board.dropout == 0:
            return self._adapt(flat, flat_base, rows).view(base.shape)
        dropped = flat * masks(flat, self.board.dropout, self.name, rows, self.board.seeds)
        if not self.variant.drops_base:
            return self._adapt(dropped, flat_base, rows, flat).view(base.shape)
        seen = self.base(dropped)
        return (flat_base + (self._adapt(dropped, seen, rows) - seen)).view(base.shape)

    def _adapt(self, x: Tensor, base: Tensor, rows: Rows, undropped: Tensor | None = None) -> Tensor:
        """Compute the lanes' outputs.

        Args:
            x: The layer's input, after dropout if there is any, (K, N, in).
            base: The frozen layer's output, (K, N, out).
            rows: Whose rows they are.
            undropped: The input before dropout; None where the whole update reads `x`.

        Returns:
            (K, N, out).
        """
        lanes, layer, variant = rows.lanes, self.layer, self.variant
        scaling = self.board.scaling(variant, lanes, layer)
        if undropped is not None and (frozen := variant.frozen_part & self.one(lanes[0]).keys()):
            kept = self._stack(lanes)
            base = variant.undropped(undropped, base, kept, layer, scaling)
            learnt = {name: tensor for name, tensor in kept.items() if name not in frozen}
            return variant.forward(x, base, variant.prepare(learnt, layer, scaling), layer, scaling)
        if variant.kind == Kind.DENSE and layer.weight.numel() * len(lanes) > LARGE:
            parts = [self._alone(x[k : k + 1], base[k : k + 1], lane, layer) for k, lane in enumerate(lanes)]
            return torch.cat(parts)
        if torch.is_grad_enabled():
            params = variant.prepare(self._stack(lanes), layer, scaling)
        else:
            versions = self.own.versions(lanes) + (self.group.versions(lanes) if self.group else [])
            known = rows.prepared.get(self.name)
            if known is None or known[0] != versions:
                known = versions, variant.prepare(self._stack(lanes), layer, scaling)
                rows.prepared[self.name] = known
            params = known[1]
        return variant.forward(x, base, params, layer, scaling)

    def _alone(self, x: Tensor, base: Tensor, lane: str, layer: Layer) -> Tensor:
        """One lane, keeping nothing of full size for backward."""
        variant, scaling = self.variant, self.board.scaling(self.variant, (lane,), layer)

        def run(x: Tensor, base: Tensor, params: Params) -> Tensor:
            return variant.forward(x, base, variant.prepare(params, layer, scaling), layer, scaling)

        params = self._stack((lane,))
        if not torch.is_grad_enabled():
            return run(x, base, params)
        return checkpoint(run, x, base, params, use_reentrant=False, preserve_rng_state=False)

    def _stack(self, lanes: tuple[str, ...]) -> dict[str, Tensor]:
        own = self.own.stack(lanes)
        return {**self.group.stack(lanes), **own} if self.group else own

    def _add_auxiliary(self, x: Tensor, rows: Rows) -> None:
        x = x.unflatten(1, (rows.rows or 1, -1))
        real = x.new_ones(x.shape[:3])
        if rows.real is not None and rows.real.numel() == real.numel():
            real = rows.real.view(real.shape).to(x.dtype)
        term = self.variant.auxiliary_loss(x, real, self._stack(rows.lanes), self.layer)
        # Recomputed in backward, it is there already: what is added once counts once.
        rows.auxiliary.setdefault(self.name, term)
