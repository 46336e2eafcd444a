"""Puts adapters on a model, lets lanes come and go, merges a lane, gives the model back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants.base import (
    Adapts,
    Evidence,
    Kind,
    LaneView,
    LayerView,
    MergeRefused,
    Settings,
    Start,
    Unsupported,
    Variant,
    number,
)
from variants.base_dropout import LaneDropout, TableDropout
from variants.full_finetune import PREFIX, Whole
from variants.heads import LaneHead
from variants.lane_linear import BypassedLayer, LaneLinear
from variants.lane_tensors import LaneTensors
from variants.rows import Board, Rows, RowsWithoutLane
from variants.targets import find

__all__ = ["Adapters", "BypassedLayer", "LaneLinear", "RowsWithoutLane", "attach"]

GROUP = "group:"
Distilled = Mapping[str, Mapping[str, Tensor]]
"""Layer -> what the variant's `distill` made of its evidence."""


def attach(
    model: nn.Module,
    variant: Variant,
    settings: Settings,
    targets: str = "blocks",
    heads: Sequence[str] = (),
    base_dropout: bool = False,
) -> Adapters:
    """Replaces the model's target layers by layers that K lanes share, and freezes the model.

    `settings` says what all lanes have alike (rank, dropout, extra); its alpha is checked and otherwise
    unused. `heads` names the modules that are the task's own: every linear layer in them is learnt whole, by
    each lane. `base_dropout` turns the model's own dropout on in training, with separate masks for each
    lane (`LaneDropout`). Attach after the model is on its device. Raises Unsupported (a ValueError) on
    targets that do not exist or cannot be adapted, and on settings that do not fit a layer.
    """
    if any(isinstance(module, (LaneLinear, LaneHead)) for module in model.modules()):
        raise Unsupported("the model carries adapters already; detach() them first")
    settings = variant.checked_settings(settings)
    own = {name: model.get_submodule(name) for name in heads}
    inside = {
        f"{head}.{name}" if name else head: module
        for head, top in own.items()
        for name, module in top.named_modules()
        if isinstance(module, nn.Linear)
    }
    if variant.adapts is Adapts.NOTHING and not inside:
        raise Unsupported(f"{variant.name} trains the task's head alone, and this task has none")
    found: Mapping[str, nn.Module] = {}
    if variant.adapts is Adapts.LAYERS:
        found = {name: module for name, module in find(model, targets).items() if name not in inside}
        if not found:
            raise Unsupported(
                f"targets {targets!r}: all of it is the task's head, which is learnt whole; name other layers"
            )
        largest = {n: min(m.weight.shape) // variant.directions for n, m in found.items()}  # type: ignore[arg-type, union-attr]
        tightest = min(largest, key=lambda name: largest[name])
        if variant.rank_limited and settings.rank > largest[tightest]:
            raise Unsupported(
                f"rank {settings.rank} is larger than layer {tightest} allows: at most {largest[tightest]}"
            )
    return Adapters(model, variant, settings, found, inside, base_dropout)


class Adapters:
    """A model's adapted layers and the lanes on them. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        variant: Variant,
        settings: Settings,
        found: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module] | None = None,
        base_dropout: bool = False,
    ) -> None:
        self.model, self.variant, self.settings = model, variant, settings
        self._board = Board()
        self._board.dropout = settings.dropout
        self._members: dict[str, list[str]] = {}
        for name in found:
            if (group := variant.group(name)) is not None:
                self._members.setdefault(GROUP + group, []).append(name)
        self.groups = {name: LaneTensors(variant.moving, variant.unseen) for name in self._members}
        group_of = {name: self.groups[group] for group, names in self._members.items() for name in names}
        self.layers = {
            name: LaneLinear(name, base, variant, self._board, group_of.get(name))
            for name, base in found.items()
        }
        self.heads = {name: LaneHead(name, base, self._board) for name, base in (heads or {}).items()}  # type: ignore[arg-type]
        wrapper: dict[int, nn.Module] = {id(layer.base): layer for layer in self.layers.values()}
        wrapper |= {id(head.base): head for head in self.heads.values()}
        self._attention: list[nn.Module] = []
        if base_dropout:
            wrapper |= {
                id(module): LaneDropout(name, module.p, self._board, isinstance(module, TableDropout))
                for name, module in model.named_modules()
                if isinstance(module, nn.Dropout) and module.p > 0
            }
            for name, module in list(model.named_modules()):
                if hasattr(module, "is_causal"):  # an attention module of transformers
                    module.lane_dropout = LaneDropout(f"{name}.probabilities", 0.0, self._board)
                    module.training = True  # else it passes dropout 0 to its attention function
                    self._attention.append(module)
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
        self.whole = None
        if variant.adapts is Adapts.MODEL:
            self.whole = Whole(model, {id(head) for head in self.heads.values()})
        self._owned: dict[str, LaneTensors] = {name: layer.own for name, layer in self.layers.items()}
        self._owned |= self.groups
        self._owned |= {name: head.own for name, head in self.heads.items()}
        self._owned |= self.whole.tensors if self.whole is not None else {}

    @property
    def lanes(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._board.settings)

    @property
    def most_lanes(self) -> int:
        """How many lanes can be here at once."""
        return 1 if self.variant.kind is Kind.ALONE else sys.maxsize

    def settings_of(self, lane: str) -> Settings:
        return self._board.settings[self._known(lane)]

    def seed_of(self, lane: str) -> int:
        return self._board.seeds[self._known(lane)]

    def add(self, lane: str, settings: Settings, seed: int, evidence: Distilled | None = None) -> None:
        """Starts a lane. Its noise depends on the seed, the layer's and the parameter's name alone: every
        variant and every rate gets the same. `evidence` is what `calibrate` gave, for a variant that needs
        it. Raises Unsupported if `settings` do not have the pack's shape."""
        settings = self._fitting(lane, settings)
        if self.variant.evidence is not Evidence.NONE and evidence is None:
            raise Unsupported(f"{self.variant.name} starts from {self.variant.evidence}: calibrate first")
        layers = {
            name: replace(layer.layer, evidence=(evidence or {}).get(name, {}))
            for name, layer in self.layers.items()
        }

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(number(seed, name))

        with torch.no_grad():
            starts = self.variant.start_all(layers, settings, generator)
            for group, names in self._members.items():
                members = {name: layers[name] for name in names}
                starts[group] = self.variant.start_group(members, settings, generator(group))
            starts |= {name: Start(weights) for name, weights in self.head_start(seed).items()}
            if self.whole is not None:
                starts |= {place: Start(tensors) for place, tensors in self.whole.start().items()}
        for name, start in starts.items():
            self._owned[name].put(lane, start.trainable, start.frozen, self._device(name))
        self._enter(lane, settings, seed)

    def head_start(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """The first weights of the heads of a lane with this seed."""
        return {
            name: head.start(torch.Generator().manual_seed(number(seed, name)))
            for name, head in self.heads.items()
        }

    def load(
        self,
        lane: str,
        trainable: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        settings: Settings,
        seed: int = 0,
    ) -> None:
        """A lane as it was, bit for bit, from what `trainable` and `frozen` returned. `seed` is for
        dropout and the hooks' noise."""
        settings = self._fitting(lane, settings)
        parts = _by_place(trainable), _by_place(frozen)
        foreign = sorted((set(parts[0]) | set(parts[1])) - set(self._owned))
        missing = sorted(set(self._owned) - set(parts[0]) - set(parts[1]))
        if foreign or missing:
            problem = (
                f"layer {foreign[0]!r} is not adapted" if foreign else f"layer {missing[0]!r} is missing"
            )
            raise Unsupported(f"lane {lane}: its tensors do not fit the model: {problem}")
        for name, own in self._owned.items():
            own.put(lane, parts[0].get(name, {}), parts[1].get(name, {}), self._device(name))
        self._enter(lane, settings, seed)

    def remove(self, lane: str) -> None:
        del self._board.settings[self._known(lane)], self._board.seeds[lane]
        for own in self._owned.values():
            own.drop(lane)
        self._board.changed()

    def trainable(self, lane: str) -> dict[str, nn.Parameter]:
        """The lane's parameters by "<layer>.<parameter>" (a layer, a head, a group of layers, or a module of
        the model)."""
        self._known(lane)
        return {f"{n}.{p}": t for n, own in self._owned.items() for p, t in own.trainable[lane].items()}

    def frozen(self, lane: str) -> dict[str, Tensor]:
        """What is not learnt by gradients (PiSSA's A0, B0; AdaLoRA's mask), by "<layer>.<tensor>". Belongs
        into a checkpoint."""
        self._known(lane)
        return {f"{n}.{p}": t for n, own in self._owned.items() for p, t in own.frozen[lane].items()}

    def is_head(self, parameter: str) -> bool:
        """Whether a name that `trainable` gives belongs to the task's head."""
        return parameter.rpartition(".")[0] in self.heads

    def owner(self, parameter: str) -> nn.Module | None:
        """Return the module of the model that owns a parameter of a `full` lane.

        Args:
            parameter: A name that `trainable` gives.

        Returns:
            The module; None for parameters of adapters and heads.
        """
        place = parameter.rpartition(".")[0]
        return self.model.get_submodule(place.removeprefix(PREFIX)) if place.startswith(PREFIX) else None

    def ranks(self, lane: str) -> dict[str, int]:
        """Layer -> ranks in use."""
        settings = self.settings_of(lane)
        return {n: self.variant.rank_in_use(layer.one(lane), settings) for n, layer in self.layers.items()}

    def parameter_count(self, lane: str) -> int:
        """Trainable numbers of a lane, masked ranks left out."""
        total = sum(p.numel() for p in self.trainable(lane).values())
        settings = self.settings_of(lane)
        for name, rank in self.ranks(lane).items():
            own = self.layers[name]
            masked = sum(p.numel() for p in own.own.trainable[lane].values())
            out, inside = own.layer.weight.shape
            total += self.variant.parameter_count(out, inside, replace(settings, rank=rank)) - masked
        return total

    def before_step(
        self, lane: str, step: int, steps: int, moments: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        """The variant's hook before the optimizer's step; `step` of `steps` are taken."""
        self._hook(lane, step, steps, moments, self.variant.before_step)

    def after_step(
        self, lane: str, step: int, steps: int, moments: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        """The variant's hook after the optimizer's step number `step` of `steps`."""
        self._hook(lane, step, steps, moments, self.variant.after_step)

    def _hook(
        self,
        lane: str,
        step: int,
        steps: int,
        moments: Callable[[Tensor], Mapping[str, Tensor]],
        hook: Callable[[LaneView], None],
    ) -> None:
        kind = type(self.variant)
        if getattr(kind, hook.__name__) is getattr(Variant, hook.__name__):
            return  # it has none
        settings = self.settings_of(lane)
        views = {
            name: LayerView(layer.layer, layer.own.trainable[lane], layer.own.frozen[lane])
            for name, layer in self.layers.items()
        }
        with torch.no_grad():
            hook(LaneView(views, settings, self.seed_of(lane), step, steps, moments))

    @contextmanager
    def rows(
        self,
        lanes: Sequence[str],
        dropout_step: int | Sequence[int] | None,
        micro: int = 0,
        rows: int | None = None,
        part: tuple[int, int] | None = None,
        real: Tensor | None = None,
    ) -> Iterator[Rows]:
        """During it the model is called with K*R rows, lane-major: lane i has rows i*R to (i+1)*R - 1.

        dropout_step: the optimizer step, of all lanes or of each, from which dropout masks follow; None: no
        dropout (evaluation). micro: the micro-batch within the step. rows: R, if it is to be checked at every
        layer. part: (first, of) when the R rows of each lane are a worker's share, those from `first` on of
        `of` in all. real: (K*R, L), False at padding. Backward may run inside or after it (inside, for a
        variant that trains the whole model). What it yields holds the auxiliary loss afterwards. Raises
        BypassedLayer at the end if the model read an adapted layer's weight instead of calling it.
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
        now = Rows(tuple(lanes), steps, micro, rows, part, real)
        with self._during(now), self.whole.instead(lanes[0]) if self.whole is not None else nullcontext():
            yield now
            bypassed = sorted(now.read - now.called)
            if bypassed:
                raise BypassedLayer(
                    f"{bypassed[0]}: the model reads its weight and never calls it; target other layers"
                )
        now.prepared.clear()
        self._board.latest = now

    @contextmanager
    def off(
        self, heads: Mapping[str, Mapping[str, Tensor]] | None = None, real: Tensor | None = None
    ) -> Iterator[None]:
        """During it the model is the frozen base, for any rows; with these heads, or its own."""
        with self._during(Rows((), heads=heads or {}, real=real)):
            yield

    def merge(self, lane: str) -> None:
        """Adds the lane's update to the base weights (in float32 or float64, then cast), writes its head over
        the base's, and takes the adapters off.

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
        with torch.no_grad():
            scaling = self.variant.scaling(self.settings_of(lane)) if self.layers else 1.0
            for layer in self.layers.values():
                weight = layer.layer.weight
                delta = self.variant.delta(layer.one(lane), layer.layer, scaling)
                wide = torch.promote_types(weight.dtype, layer.layer.dtype)
                weight.copy_((weight.to(wide) + delta).to(weight.dtype))
            for head in self.heads.values():
                for name, learnt in head.own.trainable[lane].items():
                    getattr(head.base, name).copy_(learnt)
        if self.whole is not None:
            self.whole.write(lane)
        self.detach()

    def detach(self) -> None:
        """Gives the model back as it was, bit for bit; the lanes are gone."""
        for parent, key, child in self._places:
            parent._modules[key] = child
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        for module in self._attention:
            del module.lane_dropout
            module.training = False
        self._places, self._required, self._attention = [], [], []
        for lane in self.lanes:
            self.remove(lane)

    @contextmanager
    def _during(self, now: Rows) -> Iterator[None]:
        before, self._board.now = self._board.now, now
        try:
            yield
        finally:
            self._board.now = before

    def _device(self, place: str) -> torch.device:
        if place in self.layers:
            return self.layers[place].base.weight.device  # type: ignore[return-value]
        if place in self._members:
            return self._device(self._members[place][0])
        return next(self.model.parameters()).device

    def _known(self, lane: str) -> str:
        if lane not in self._board.settings:
            raise KeyError(f"no lane {lane!r}; there are: {', '.join(self.lanes) or 'none'}")
        return lane

    def _fitting(self, lane: str, settings: Settings) -> Settings:
        if lane in self._board.settings:
            raise ValueError(f"lane {lane!r} is there already")
        settings = self.variant.checked_settings(settings)
        if len(self.lanes) >= self.most_lanes:
            raise Unsupported(f"{self.variant.name} is alone in its pack: one lane at a time")
        for field in ("rank", "dropout", "extra"):
            mine, pack = getattr(settings, field), getattr(self.settings, field)
            if mine != pack:
                raise Unsupported(f"lane {lane}: {field} {mine!r} differs from the pack's {pack!r}")
        return settings

    def _enter(self, lane: str, settings: Settings, seed: int) -> None:
        self._board.settings[lane] = settings
        self._board.seeds[lane] = seed
        self._board.changed()


def _by_place(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, parameter = name.rsplit(".", 1)
        parts.setdefault(place, {})[parameter] = tensor
    return parts
