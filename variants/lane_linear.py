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
    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    prepared: dict[str, tuple[list[int], Params]] = field(default_factory=dict)
    """Without gradients (generation, evaluation) the same parameters serve many calls: a layer's prepared
    ones."""


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
    """Stands in the model where the frozen layer `base` stood. Each lane's parameters are separate, so that
    lanes come and go and each has its own optimizer; they are stacked when the layer is called."""

    def __init__(self, name: str, base: nn.Module, variant: Variant, board: Board) -> None:
        super().__init__()
        self.name, self.base, self.variant, self.board = name, base, variant, board
        self.trainable: dict[str, dict[str, nn.Parameter]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self._stacks: dict[tuple[str, ...], dict[str, Tensor]] = {}
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

    def put(self, lane: str, trainable: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
        """Gives `lane` copies of these tensors."""
        device = self.layer.weight.device
        self.trainable[lane] = {
            name: nn.Parameter(tensor.detach().to(device, copy=True).contiguous())
            for name, tensor in trainable.items()
        }
        self.frozen[lane] = {name: tensor.detach().to(device).contiguous() for name, tensor in frozen.items()}
        self._stacks.clear()

    def drop(self, lane: str) -> None:
        del self.trainable[lane], self.frozen[lane]
        self._stacks.clear()

    def one(self, lane: str) -> dict[str, Tensor]:
        """A lane's tensors, trainable and frozen, without the lane dimension."""
        return {**self.trainable[lane], **self.frozen[lane]}

    def forward(self, x: Tensor) -> Tensor:
        rows = self.board.rows(self.name)
        rows.called.add(self.name)
        base = self.base(x)
        lanes = rows.lanes
        if not lanes or x.numel() == 0:
            return base
        size = len(lanes) * (rows.rows or 1)
        if (len(lanes) > 1 or rows.rows) and (x.dim() < 2 or x.shape[0] % size):
            raise RowsWithoutLane(
                f"{self.name} was called with {x.shape[0]} rows, not a multiple of "
                f"{len(lanes)} lanes x {rows.rows or 1} rows: no lane owns the rest"
            )
        flat = x.reshape(len(lanes), -1, x.shape[-1])
        flat_base = base.reshape(len(lanes), -1, base.shape[-1])
        if rows.steps is None or self.board.dropout == 0:
            return self._adapt(flat, flat_base, rows).view(base.shape)
        dropped = flat * self._mask(flat, rows)
        if not self.variant.drops_base:
            return self._adapt(dropped, flat_base, rows).view(base.shape)
        seen = self.base(dropped)
        return (flat_base + (self._adapt(dropped, seen, rows) - seen)).view(base.shape)

    def _adapt(self, x: Tensor, base: Tensor, rows: Rows) -> Tensor:
        lanes, layer, variant = rows.lanes, self.layer, self.variant
        scaling = self.board.scaling(variant, lanes, layer)
        if variant.kind == Kind.DENSE and layer.weight.numel() * len(lanes) > LARGE:
            parts = [self._alone(x[k : k + 1], base[k : k + 1], lane, layer) for k, lane in enumerate(lanes)]
            return torch.cat(parts)
        if torch.is_grad_enabled():
            params = variant.prepare(self._stack(lanes), layer, scaling)
        else:
            versions = [p._version for lane in lanes for p in self.trainable[lane].values()]
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

        params = {name: tensor.unsqueeze(0) for name, tensor in self.one(lane).items()}
        if not torch.is_grad_enabled():
            return run(x, base, params)
        return checkpoint(run, x, base, params, use_reentrant=False, preserve_rng_state=False)

    def _stack(self, lanes: tuple[str, ...]) -> dict[str, Tensor]:
        if len(lanes) == 1:
            return {name: tensor.unsqueeze(0) for name, tensor in self.one(lanes[0]).items()}
        parameters = [self.trainable[lane] for lane in lanes]
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in parameters[0]}
        if not self.frozen[lanes[0]]:
            return stacked
        if lanes not in self._stacks:
            if len(self._stacks) >= 2:  # training's lanes and evaluation's
                self._stacks.pop(next(iter(self._stacks)))
            frozen = [self.frozen[lane] for lane in lanes]
            self._stacks[lanes] = {name: torch.stack([each[name] for each in frozen]) for name in frozen[0]}
        return {**stacked, **self._stacks[lanes]}

    def _mask(self, x: Tensor, rows: Rows) -> Tensor:
        """(K, N, in): zero or 1 / (1 - p), a function of (seed, step, layer, micro-batch) alone."""
        assert rows.steps is not None
        keep = 1 - self.board.dropout
        masks = []
        for lane, step in zip(rows.lanes, rows.steps, strict=True):
            seed = number(self.board.seeds[lane], step, self.name, rows.micro)
            generator = torch.Generator(x.device).manual_seed(seed)
            masks.append(torch.empty_like(x[0]).bernoulli_(keep, generator=generator).div_(keep))
        return torch.stack(masks)
