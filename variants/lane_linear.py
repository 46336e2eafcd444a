"""A frozen linear layer that several lanes share, and the board on which stands whose rows are being
computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from variants.contract import Kind, Layer, Params, Settings, Variant, number
from variants.lane_tensors import LaneTensors
from variants.targets import is_conv1d

LARGE = 1 << 20
"""A dense update with more numbers than this is recomputed in backward instead of kept: below it the Python
cost of recomputing (about 0.1 ms) outweighs the memory."""


class RowsWithoutLane(RuntimeError):
    """An adapted layer was called with rows of which nobody knows the lane."""


class BypassedLayer(RuntimeError):
    """The model read an adapted layer's weight and never called the layer: its adapter has no effect."""


@dataclass(eq=False)
class Rows:
    """What a call of the model computes: K lanes' rows, lane-major. `lanes` is empty for the frozen base."""

    lanes: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    micro: int = 0
    rows: int | None = None
    part: tuple[int, int] | None = None
    """(first, of): these are the rows from `first` on of `of` that a lane has on all workers together."""
    real: Tensor | None = None
    """(K*R, L), False at padding."""
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """For the frozen base: the weights of its heads."""
    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    prepared: dict[str, tuple[list[int], Params]] = field(default_factory=dict)
    """Without gradients (generation, evaluation) the same parameters serve many calls: a layer's prepared
    ones."""
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (K,), each lane's term of the auxiliary loss."""

    def auxiliary_loss(self) -> Tensor | None:
        """(K,): the mean over layers, or None where the variant has no such loss."""
        return torch.stack(list(self.auxiliary.values())).mean(0) if self.auxiliary else None


class Board:
    """What all adapted layers of a model share."""

    def __init__(self) -> None:
        self.settings: dict[str, Settings] = {}
        self.seeds: dict[str, int] = {}
        self.dropout = 0.0
        self.now: Rows | None = None
        self.latest: Rows | None = None
        self._scalings: dict[Any, Tensor] = {}

    def rows(self, layer: str) -> Rows:
        """Whose rows `layer` is computing; raises RowsWithoutLane."""
        if self.now is not None:
            return self.now
        # Gradient checkpointing calls the model again inside backward, when rows() may be closed already:
        # what is recomputed is the latest call, because a loop goes backward before it goes forward again.
        if self.latest is not None and torch._C._current_graph_task_id() != -1:
            return self.latest
        raise RowsWithoutLane(f"{layer} was called outside rows() and off(): no lane owns these rows")

    def scaling(self, variant: Variant, lanes: tuple[str, ...], like: Layer) -> Tensor:
        """(K, 1, 1)"""
        key = (lanes, like.weight.device, like.dtype)
        if key not in self._scalings:
            factors = [variant.scaling(self.settings[lane]) for lane in lanes]
            made = torch.tensor(factors, dtype=like.dtype, device=like.weight.device)
            self._scalings[key] = made.view(-1, 1, 1)
        return self._scalings[key]

    def changed(self) -> None:
        """Lanes have come or gone."""
        self._scalings.clear()
        self.latest = None


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
        dropped = flat * self._mask(flat, rows)
        if not self.variant.drops_base:
            return self._adapt(dropped, flat_base, rows, flat).view(base.shape)
        seen = self.base(dropped)
        return (flat_base + (self._adapt(dropped, seen, rows) - seen)).view(base.shape)

    def _adapt(self, x: Tensor, base: Tensor, rows: Rows, undropped: Tensor | None = None) -> Tensor:
        """The lanes' outputs, (K, N, out), from the input and the frozen layer's output. `undropped`: the
        input without dropout where `x` is with it."""
        lanes, layer, variant = rows.lanes, self.layer, self.variant
        scaling = self.board.scaling(variant, lanes, layer)
        if undropped is not None and (frozen := variant.frozen_part & self.one(lanes[0]).keys()):
            params = self._stack(lanes)
            base = variant.undropped(undropped, base, params, layer, scaling)
            learnt = {name: tensor for name, tensor in params.items() if name not in frozen}
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

    def _mask(self, x: Tensor, rows: Rows) -> Tensor:
        """(K, N, in): zero or 1 / (1 - p), a function of (seed, step, layer, micro-batch) alone. A worker
        that has a part of a lane's rows draws for all of them and keeps its own."""
        assert rows.steps is not None
        keep = 1 - self.board.dropout
        like, mine = x[0], slice(None)
        if rows.part is not None and rows.rows is not None:
            first, of = rows.part
            each = x.shape[1] // rows.rows
            like, mine = x.new_empty(of * each, x.shape[2]), slice(first * each, (first + rows.rows) * each)
        masks = []
        for lane, step in zip(rows.lanes, rows.steps, strict=True):
            seed = number(self.board.seeds[lane], step, self.name, rows.micro)
            generator = torch.Generator(x.device).manual_seed(seed)
            mask = torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)
            masks.append(mask[mine])
        return torch.stack(masks)


def by_lane(x: Tensor, rows: Rows, layer: str) -> Tensor:
    """x (K*R, ..., features) as (K, N, features); raises RowsWithoutLane."""
    lanes = len(rows.lanes)
    size = lanes * (rows.rows or 1)
    if (lanes > 1 or rows.rows) and (x.dim() < 2 or x.shape[0] % size):
        raise RowsWithoutLane(
            f"{layer} was called with {x.shape[0]} rows, not a multiple of {lanes} lanes x "
            f"{rows.rows or 1} rows: no lane owns the rest"
        )
    return x.reshape(lanes, -1, x.shape[-1])
