"""Puts adapters on a model, lets lanes come and go, merges a lane, gives the model back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from variants.contract import MergeRefused, Settings, Unsupported, Variant, number
from variants.lane_linear import Board, BypassedLayer, LaneLinear, Rows, RowsWithoutLane
from variants.targets import find

__all__ = ["Adapters", "BypassedLayer", "LaneLinear", "RowsWithoutLane", "attach"]


def attach(model: nn.Module, variant: Variant, settings: Settings, targets: str = "blocks") -> Adapters:
    """Replaces the model's target layers by layers that K lanes share, and freezes the model.

    `settings` says what all lanes have alike (rank, dropout, extra); its alpha is checked and otherwise
    unused. Attach after the model is on its device. Raises Unsupported (a ValueError) on targets that do not
    exist or cannot be adapted, and on settings that do not fit a layer.
    """
    if any(isinstance(module, LaneLinear) for module in model.modules()):
        raise Unsupported("the model carries adapters already; detach() them first")
    settings = variant.checked_settings(settings)
    found = find(model, targets)
    largest = {name: min(module.weight.shape) for name, module in found.items()}  # type: ignore[arg-type, union-attr]
    tightest = min(largest, key=lambda name: largest[name])
    if settings.rank > largest[tightest]:
        raise Unsupported(
            f"rank {settings.rank} is larger than layer {tightest} allows: at most {largest[tightest]}"
        )
    return Adapters(model, variant, settings, found)


class Adapters:
    """A model's adapted layers and the lanes on them. Made by `attach`."""

    def __init__(
        self, model: nn.Module, variant: Variant, settings: Settings, found: Mapping[str, nn.Module]
    ) -> None:
        self.model, self.variant, self.settings = model, variant, settings
        self._board = Board()
        self._board.dropout = settings.dropout
        self.layers = {name: LaneLinear(name, base, variant, self._board) for name, base in found.items()}
        wrapper = {id(layer.base): layer for layer in self.layers.values()}
        # A layer may hang in several places of the model: all of them are replaced.
        self._places = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in wrapper
        ]
        for parent, key, child in self._places:
            parent._modules[key] = wrapper[id(child)]
        self._required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self._required:
            parameter.requires_grad_(False)

    @property
    def lanes(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._board.settings)

    def settings_of(self, lane: str) -> Settings:
        return self._board.settings[self._known(lane)]

    def seed_of(self, lane: str) -> int:
        return self._board.seeds[self._known(lane)]

    def add(self, lane: str, settings: Settings, seed: int) -> None:
        """Starts a lane. Its noise depends on the seed, the layer's and the parameter's name alone: every
        variant and every rate gets the same. Raises Unsupported if `settings` do not have the pack's
        shape."""
        settings = self._fitting(lane, settings)
        starts = {}
        for name, layer in self.layers.items():
            generator = torch.Generator().manual_seed(number(seed, name))
            with torch.no_grad():
                starts[name] = self.variant.start(layer.layer, settings, generator)
        for name, start in starts.items():
            self.layers[name].put(lane, start.trainable, start.frozen)
        self._enter(lane, settings, seed)

    def load(
        self,
        lane: str,
        trainable: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        settings: Settings,
        seed: int = 0,
    ) -> None:
        """A lane as it was, bit for bit, from what `trainable` and `frozen` returned. `seed` is for
        dropout."""
        settings = self._fitting(lane, settings)
        parts = _by_layer(trainable), _by_layer(frozen)
        foreign = sorted((set(parts[0]) | set(parts[1])) - set(self.layers))
        missing = sorted(set(self.layers) - set(parts[0]))
        if foreign or missing:
            problem = (
                f"layer {foreign[0]!r} is not adapted" if foreign else f"layer {missing[0]!r} is missing"
            )
            raise Unsupported(f"lane {lane}: its tensors do not fit the model: {problem}")
        for name, layer in self.layers.items():
            layer.put(lane, parts[0][name], parts[1].get(name, {}))
        self._enter(lane, settings, seed)

    def remove(self, lane: str) -> None:
        del self._board.settings[self._known(lane)], self._board.seeds[lane]
        for layer in self.layers.values():
            layer.drop(lane)
        self._board.changed()

    def trainable(self, lane: str) -> dict[str, nn.Parameter]:
        """The lane's parameters by "<layer>.<parameter>"."""
        self._known(lane)
        return {f"{n}.{p}": t for n, layer in self.layers.items() for p, t in layer.trainable[lane].items()}

    def frozen(self, lane: str) -> dict[str, Tensor]:
        """What the lane's start fixed (PiSSA's A0, B0), by "<layer>.<tensor>". Belongs into a checkpoint."""
        self._known(lane)
        return {f"{n}.{p}": t for n, layer in self.layers.items() for p, t in layer.frozen[lane].items()}

    @contextmanager
    def rows(
        self,
        lanes: Sequence[str],
        dropout_step: int | Sequence[int] | None,
        micro: int = 0,
        rows: int | None = None,
    ) -> Iterator[None]:
        """During it the model is called with K*R rows, lane-major: lane i has rows i*R to (i+1)*R - 1.

        dropout_step: the optimizer step, of all lanes or of each, from which dropout masks follow; None: no
        dropout (evaluation). micro: the micro-batch within the step. rows: R, if it is to be checked at every
        layer. Backward may run inside or after it. Raises BypassedLayer at the end if the model read an
        adapted layer's weight instead of calling it.
        """
        for lane in lanes:
            self._known(lane)
        if not lanes or len(set(lanes)) != len(lanes):
            raise ValueError(f"rows of lanes {list(lanes)}: must be at least one, each once")
        steps: tuple[int, ...] | None = None
        if dropout_step is not None:
            each = [dropout_step] * len(lanes) if isinstance(dropout_step, int) else dropout_step
            steps = tuple(int(step) for step in each)
            if len(steps) != len(lanes):
                raise ValueError(f"{len(steps)} dropout steps for {len(lanes)} lanes")
        now = Rows(tuple(lanes), steps, micro, rows)
        with self._during(now):
            yield
            bypassed = sorted(now.read - now.called)
            if bypassed:
                raise BypassedLayer(
                    f"{bypassed[0]}: the model reads its weight and never calls it; target other layers"
                )
        now.prepared.clear()
        self._board.latest = now

    @contextmanager
    def off(self) -> Iterator[None]:
        """During it the model is the frozen base, for any rows."""
        with self._during(Rows(())):
            yield

    def merge(self, lane: str) -> None:
        """Adds the lane's update to the base weights (in float32 or float64, then cast) and takes the
        adapters off.

        Raises MergeRefused, with nothing changed, if the variant has no such update, if other lanes still
        train over this base, or if a weight is tied to a module that would change with it.
        """
        others = [other for other in self.lanes if other != self._known(lane)]
        if others:
            raise MergeRefused(
                f"lane {lane} cannot be merged while {others[0]} uses the same base; remove it first"
            )
        bases = {id(layer.base): name for name, layer in self.layers.items()}
        weights = {id(layer.base.weight): name for name, layer in self.layers.items()}
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if id(parameter) in weights and bases.get(id(module)) != weights[id(parameter)]:
                    raise MergeRefused(
                        f"{weights[id(parameter)]} shares its weight with {path}: it cannot be merged"
                    )
        scaling = self.variant.scaling(self.settings_of(lane))
        with torch.no_grad():
            for layer in self.layers.values():
                weight = layer.layer.weight
                delta = self.variant.delta(layer.one(lane), layer.layer, scaling)
                wide = torch.promote_types(weight.dtype, layer.layer.dtype)
                weight.copy_((weight.to(wide) + delta).to(weight.dtype))
        self.detach()

    def detach(self) -> None:
        """Gives the model back as it was, bit for bit; the lanes are gone."""
        for parent, key, child in self._places:
            parent._modules[key] = child
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        self._places, self._required = [], []
        for lane in self.lanes:
            self.remove(lane)

    @contextmanager
    def _during(self, now: Rows) -> Iterator[None]:
        before, self._board.now = self._board.now, now
        try:
            yield
        finally:
            self._board.now = before

    def _known(self, lane: str) -> str:
        if lane not in self._board.settings:
            raise KeyError(f"no lane {lane!r}; there are: {', '.join(self.lanes) or 'none'}")
        return lane

    def _fitting(self, lane: str, settings: Settings) -> Settings:
        if lane in self._board.settings:
            raise ValueError(f"lane {lane!r} is there already")
        settings = self.variant.checked_settings(settings)
        for field in ("rank", "dropout", "extra"):
            mine, pack = getattr(settings, field), getattr(self.settings, field)
            if mine != pack:
                raise Unsupported(f"lane {lane}: {field} {mine!r} differs from the pack's {pack!r}")
        return settings

    def _enter(self, lane: str, settings: Settings, seed: int) -> None:
        self._board.settings[lane] = settings
        self._board.seeds[lane] = seed
        self._board.changed()


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, parameter = name.rsplit(".", 1)
        parts.setdefault(layer, {})[parameter] = tensor
    return parts
