"""Puts adapters on a model, lets lanes come and go, merges a lane, gives the model back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants.base import (
    AdaptationScope,
    Batching,
    CalibrationStatistic,
    InitialTensors,
    LaneView,
    LayerView,
    MergeError,
    UnsupportedError,
    Variant,
    VariantSettings,
    stable_seed,
)
from variants.base_dropout import LaneDropout, TableDropout
from variants.forward_context import AdapterState, ForwardContext, UnassignedRowsError
from variants.full_finetune import MODEL_PREFIX, FullModelParameters
from variants.heads import LaneHead
from variants.lane_linear import BypassedLayerError, LaneLinear
from variants.lane_tensors import LaneTensors
from variants.targets import find_target_layers

__all__ = ["Adapters", "BypassedLayerError", "LaneLinear", "UnassignedRowsError", "attach"]

LAYER_GROUP_PREFIX = "group:"
CalibrationTensors = Mapping[str, Mapping[str, Tensor]]
"""Layer -> what the variant's `distill` made of its evidence."""


def attach(
    model: nn.Module,
    variant: Variant,
    settings: VariantSettings,
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
        raise UnsupportedError("the model carries adapters already; detach() them first")
    settings = variant.validate_settings(settings)
    head_modules = {name: model.get_submodule(name) for name in heads}
    head_layers = {
        f"{head}.{name}" if name else head: module
        for head, top in head_modules.items()
        for name, module in top.named_modules()
        if isinstance(module, nn.Linear)
    }
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and not head_layers:
        raise UnsupportedError(f"{variant.name} trains the task's head alone, and this task has none")
    target_layers: Mapping[str, nn.Module] = {}
    if variant.adaptation_scope is AdaptationScope.TARGET_LAYERS:
        target_layers = {
            name: module
            for name, module in find_target_layers(model, targets).items()
            if name not in head_layers
        }
        if not target_layers:
            raise UnsupportedError(
                f"targets {targets!r}: all of it is the task's head, which is learnt whole; name other layers"
            )
        largest = {
            name: min(layer.weight.shape) // variant.singular_vectors_per_rank  # type: ignore[arg-type, union-attr]
            for name, layer in target_layers.items()
        }
        tightest = min(largest, key=lambda name: largest[name])
        if variant.is_rank_limited_by_layer and settings.rank > largest[tightest]:
            raise UnsupportedError(
                f"rank {settings.rank} is larger than layer {tightest} allows: at most {largest[tightest]}"
            )
    return Adapters(model, variant, settings, target_layers, head_layers, base_dropout)


class Adapters:
    """A model's adapted layers and the lanes on them. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        variant: Variant,
        settings: VariantSettings,
        target_layers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module] | None = None,
        base_dropout: bool = False,
    ) -> None:
        self.model, self.variant, self.settings = model, variant, settings
        self._state = AdapterState()
        self._state.dropout = settings.dropout
        self._layers_by_group: dict[str, list[str]] = {}
        for name in target_layers:
            if (group := variant.layer_group(name)) is not None:
                self._layers_by_group.setdefault(LAYER_GROUP_PREFIX + group, []).append(name)
        self.layer_groups = {
            name: LaneTensors(variant.mutable_buffers, variant.hook_only_buffers)
            for name in self._layers_by_group
        }
        group_of = {
            name: self.layer_groups[group] for group, names in self._layers_by_group.items() for name in names
        }
        self.layers = {
            name: LaneLinear(name, base, variant, self._state, group_of.get(name))
            for name, base in target_layers.items()
        }
        self.heads = {name: LaneHead(name, base, self._state) for name, base in (heads or {}).items()}  # type: ignore[arg-type]
        wrapper: dict[int, nn.Module] = {id(layer.base_layer): layer for layer in self.layers.values()}
        wrapper |= {id(head.base_layer): head for head in self.heads.values()}
        self._attention_modules: list[nn.Module] = []
        if base_dropout:
            wrapper |= {
                id(module): LaneDropout(name, module.p, self._state, isinstance(module, TableDropout))
                for name, module in model.named_modules()
                if isinstance(module, nn.Dropout) and module.p > 0
            }
            for name, module in list(model.named_modules()):
                if hasattr(module, "is_causal"):  # an attention module of transformers
                    module.lane_dropout = LaneDropout(f"{name}.probabilities", 0.0, self._state)
                    module.training = True  # else it passes dropout 0 to its attention function
                    self._attention_modules.append(module)
        # A layer may hang in several places of the model: all of them are replaced.
        self._replaced_modules = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in wrapper
        ]
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = wrapper[id(child)]
        self._original_requires_grad = [
            (parameter, parameter.requires_grad) for parameter in model.parameters()
        ]
        for parameter, _ in self._original_requires_grad:
            parameter.requires_grad_(False)
        self.full_model = None
        if variant.adaptation_scope is AdaptationScope.FULL_MODEL:
            self.full_model = FullModelParameters(model, {id(head) for head in self.heads.values()})
        self._tensors_by_owner: dict[str, LaneTensors] = {
            name: layer.own_tensors for name, layer in self.layers.items()
        }
        self._tensors_by_owner |= self.layer_groups
        self._tensors_by_owner |= {name: head.own_tensors for name, head in self.heads.items()}
        self._tensors_by_owner |= self.full_model.tensors if self.full_model is not None else {}

    @property
    def lanes(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._state.settings)

    @property
    def max_lanes(self) -> int:
        """How many lanes can be here at once."""
        return 1 if self.variant.batching is Batching.EXCLUSIVE else sys.maxsize

    def lane_settings(self, lane: str) -> VariantSettings:
        return self._state.settings[self._require_lane(lane)]

    def lane_seed(self, lane: str) -> int:
        return self._state.seeds[self._require_lane(lane)]

    def add_lane(
        self, lane: str, settings: VariantSettings, seed: int, calibration: CalibrationTensors | None = None
    ) -> None:
        """Starts a lane. Its noise depends on the seed, the layer's and the parameter's name alone: every
        variant and every rate gets the same. `evidence` is what `calibrate` gave, for a variant that needs
        it. Raises Unsupported if `settings` do not have the pack's shape."""
        settings = self._validate_new_lane(lane, settings)
        if self.variant.calibration_statistic is not CalibrationStatistic.NONE and calibration is None:
            raise UnsupportedError(
                f"{self.variant.name} starts from {self.variant.calibration_statistic}: calibrate first"
            )
        layers = {
            name: replace(layer.frozen_layer, calibration=(calibration or {}).get(name, {}))
            for name, layer in self.layers.items()
        }

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(stable_seed(seed, name))

        with torch.no_grad():
            initial = self.variant.init_layers(layers, settings, generator)
            for group, names in self._layers_by_group.items():
                members = {name: layers[name] for name in names}
                initial[group] = self.variant.init_layer_group(members, settings, generator(group))
            initial |= {name: InitialTensors(weights) for name, weights in self.init_heads(seed).items()}
            if self.full_model is not None:
                initial |= {
                    place: InitialTensors(tensors) for place, tensors in self.full_model.init().items()
                }
        for name, owner_initial in initial.items():
            self._tensors_by_owner[name].add_lane(
                lane, owner_initial.trainable, owner_initial.frozen, self._device(name)
            )
        self._register_lane(lane, settings, seed)

    def init_heads(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """The first weights of the heads of a lane with this seed."""
        return {
            name: head.init(torch.Generator().manual_seed(stable_seed(seed, name)))
            for name, head in self.heads.items()
        }

    def restore_lane(
        self,
        lane: str,
        trainable: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        settings: VariantSettings,
        seed: int = 0,
    ) -> None:
        """A lane as it was, bit for bit, from what `trainable` and `frozen` returned. `seed` is for
        dropout and the hooks' noise."""
        settings = self._validate_new_lane(lane, settings)
        parts = _group_by_owner(trainable), _group_by_owner(frozen)
        foreign = sorted((set(parts[0]) | set(parts[1])) - set(self._tensors_by_owner))
        missing = sorted(set(self._tensors_by_owner) - set(parts[0]) - set(parts[1]))
        if foreign or missing:
            problem = (
                f"layer {foreign[0]!r} is not adapted" if foreign else f"layer {missing[0]!r} is missing"
            )
            raise UnsupportedError(f"lane {lane}: its tensors do not fit the model: {problem}")
        for name, owner_tensors in self._tensors_by_owner.items():
            owner_tensors.add_lane(lane, parts[0].get(name, {}), parts[1].get(name, {}), self._device(name))
        self._register_lane(lane, settings, seed)

    def remove_lane(self, lane: str) -> None:
        del self._state.settings[self._require_lane(lane)], self._state.seeds[lane]
        for owner_tensors in self._tensors_by_owner.values():
            owner_tensors.remove_lane(lane)
        self._state.invalidate()

    def trainable(self, lane: str) -> dict[str, nn.Parameter]:
        """The lane's parameters by "<layer>.<parameter>" (a layer, a head, a group of layers, or a module of
        the model)."""
        self._require_lane(lane)
        return {
            f"{n}.{p}": t for n, own in self._tensors_by_owner.items() for p, t in own.trainable[lane].items()
        }

    def frozen(self, lane: str) -> dict[str, Tensor]:
        """What is not learnt by gradients (PiSSA's A0, B0; AdaLoRA's mask), by "<layer>.<tensor>". Belongs
        into a checkpoint."""
        self._require_lane(lane)
        return {
            f"{n}.{p}": t for n, own in self._tensors_by_owner.items() for p, t in own.frozen[lane].items()
        }

    def is_head(self, parameter: str) -> bool:
        """Whether a name that `trainable` gives belongs to the task's head."""
        return parameter.rpartition(".")[0] in self.heads

    def owning_module(self, parameter: str) -> nn.Module | None:
        """Return the module of the model that owns a parameter of a `full` lane.

        Args:
            parameter: A name that `trainable` gives.

        Returns:
            The module; None for parameters of adapters and heads.
        """
        owner = parameter.rpartition(".")[0]
        return (
            self.model.get_submodule(owner.removeprefix(MODEL_PREFIX))
            if owner.startswith(MODEL_PREFIX)
            else None
        )

    def ranks_in_use(self, lane: str) -> dict[str, int]:
        """Layer -> ranks in use."""
        settings = self.lane_settings(lane)
        return {
            n: self.variant.rank_in_use(layer.lane_tensors(lane), settings)
            for n, layer in self.layers.items()
        }

    def parameter_count(self, lane: str) -> int:
        """Trainable numbers of a lane, masked ranks left out."""
        total = sum(p.numel() for p in self.trainable(lane).values())
        settings = self.lane_settings(lane)
        for name, rank in self.ranks_in_use(lane).items():
            layer = self.layers[name]
            allocated = sum(p.numel() for p in layer.own_tensors.trainable[lane].values())
            out_features, in_features = layer.frozen_layer.weight.shape
            total += (
                self.variant.parameter_count(out_features, in_features, replace(settings, rank=rank))
                - allocated
            )
        return total

    def before_step(
        self, lane: str, step: int, total_steps: int, moments: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        """The variant's hook before the optimizer's step; `step` of `steps` are taken."""
        self._run_hook(lane, step, total_steps, moments, self.variant.before_step)

    def after_step(
        self, lane: str, step: int, total_steps: int, moments: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        """The variant's hook after the optimizer's step number `step` of `steps`."""
        self._run_hook(lane, step, total_steps, moments, self.variant.after_step)

    def _run_hook(
        self,
        lane: str,
        step: int,
        total_steps: int,
        moments: Callable[[Tensor], Mapping[str, Tensor]],
        hook: Callable[[LaneView], None],
    ) -> None:
        kind = type(self.variant)
        if getattr(kind, hook.__name__) is getattr(Variant, hook.__name__):
            return  # it has none
        settings = self.lane_settings(lane)
        views = {
            name: LayerView(
                layer.frozen_layer, layer.own_tensors.trainable[lane], layer.own_tensors.frozen[lane]
            )
            for name, layer in self.layers.items()
        }
        with torch.no_grad():
            hook(LaneView(views, settings, self.lane_seed(lane), step, total_steps, moments))

    @contextmanager
    def activate_lanes(
        self,
        lanes: Sequence[str],
        dropout_step: int | Sequence[int] | None,
        micro_batch: int = 0,
        rows_per_lane: int | None = None,
        shard: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[ForwardContext]:
        """During it the model is called with K*R rows, lane-major: lane i has rows i*R to (i+1)*R - 1.

        dropout_step: the optimizer step, of all lanes or of each, from which dropout masks follow; None: no
        dropout (evaluation). micro: the micro-batch within the step. rows: R, if it is to be checked at every
        layer. part: (first, of) when the R rows of each lane are a worker's share, those from `first` on of
        `of` in all. real: (K*R, L), False at padding. Backward may run inside or after it (inside, for a
        variant that trains the whole model). What it yields holds the auxiliary loss afterwards. Raises
        BypassedLayer at the end if the model read an adapted layer's weight instead of calling it.
        """
        for lane in lanes:
            self._require_lane(lane)
        if not lanes or len(set(lanes)) != len(lanes):
            raise ValueError(f"rows of lanes {list(lanes)}: must be at least one, each once")
        dropout_steps: tuple[int, ...] | None = None
        if dropout_step is not None:
            lane_steps = [dropout_step] * len(lanes) if isinstance(dropout_step, int) else dropout_step
            dropout_steps = tuple(int(step) for step in lane_steps)
            if len(dropout_steps) != len(lanes):
                raise ValueError(f"{len(dropout_steps)} dropout steps for {len(lanes)} lanes")
        context = ForwardContext(
            tuple(lanes), dropout_steps, micro_batch, rows_per_lane, shard, attention_mask
        )
        with (
            self._activate(context),
            self.full_model.swap_in(lanes[0]) if self.full_model is not None else nullcontext(),
        ):
            yield context
            bypassed = sorted(context.weight_reads - context.called_layers)
            if bypassed:
                raise BypassedLayerError(
                    f"{bypassed[0]}: the model reads its weight and never calls it; target other layers"
                )
        context.prepared_params.clear()
        self._state.last_context = context

    @contextmanager
    def disable_adapters(
        self,
        head_weights: Mapping[str, Mapping[str, Tensor]] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[None]:
        """During it the model is the frozen base, for any rows; with these heads, or its own."""
        with self._activate(
            ForwardContext((), head_weights=head_weights or {}, attention_mask=attention_mask)
        ):
            yield

    def merge_and_detach(self, lane: str) -> None:
        """Adds the lane's update to the base weights (in float32 or float64, then cast), writes its head over
        the base's, and takes the adapters off.

        Raises MergeRefused, with nothing changed, if the variant has no such update, if other lanes still
        train over this base, or if a weight is tied to a module that would change with it.
        """
        others = [other for other in self.lanes if other != self._require_lane(lane)]
        if others:
            raise MergeError(
                f"lane {lane} cannot be merged while {others[0]} uses the same base; remove it first"
            )
        bases = {id(layer.base_layer): name for name, layer in self.layers.items()}
        weights = {id(layer.base_layer.weight): name for name, layer in self.layers.items()}
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if id(parameter) in weights and bases.get(id(module)) != weights[id(parameter)]:
                    raise MergeError(
                        f"{weights[id(parameter)]} shares its weight with {path}: it cannot be merged"
                    )
        with torch.no_grad():
            scaling = self.variant.scaling(self.lane_settings(lane)) if self.layers else 1.0
            for layer in self.layers.values():
                weight = layer.frozen_layer.weight
                delta = self.variant.delta_weight(layer.lane_tensors(lane), layer.frozen_layer, scaling)
                wide = torch.promote_types(weight.dtype, layer.frozen_layer.dtype)
                weight.copy_((weight.to(wide) + delta).to(weight.dtype))
            for head in self.heads.values():
                for name, learnt in head.own_tensors.trainable[lane].items():
                    getattr(head.base_layer, name).copy_(learnt)
        if self.full_model is not None:
            self.full_model.copy_to_model(lane)
        self.detach()

    def detach(self) -> None:
        """Gives the model back as it was, bit for bit; the lanes are gone."""
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = child
        for parameter, required in self._original_requires_grad:
            parameter.requires_grad_(required)
        for module in self._attention_modules:
            del module.lane_dropout
            module.training = False
        self._replaced_modules, self._original_requires_grad, self._attention_modules = [], [], []
        for lane in self.lanes:
            self.remove_lane(lane)

    @contextmanager
    def _activate(self, context: ForwardContext) -> Iterator[None]:
        before, self._state.current_context = self._state.current_context, context
        try:
            yield
        finally:
            self._state.current_context = before

    def _device(self, owner: str) -> torch.device:
        if owner in self.layers:
            return self.layers[owner].base_layer.weight.device  # type: ignore[return-value]
        if owner in self._layers_by_group:
            return self._device(self._layers_by_group[owner][0])
        return next(self.model.parameters()).device

    def _require_lane(self, lane: str) -> str:
        if lane not in self._state.settings:
            raise KeyError(f"no lane {lane!r}; there are: {', '.join(self.lanes) or 'none'}")
        return lane

    def _validate_new_lane(self, lane: str, settings: VariantSettings) -> VariantSettings:
        if lane in self._state.settings:
            raise ValueError(f"lane {lane!r} is there already")
        settings = self.variant.validate_settings(settings)
        if len(self.lanes) >= self.max_lanes:
            raise UnsupportedError(f"{self.variant.name} is alone in its pack: one lane at a time")
        for field in ("rank", "dropout", "extra"):
            value, group_value = getattr(settings, field), getattr(self.settings, field)
            if value != group_value:
                raise UnsupportedError(
                    f"lane {lane}: {field} {value!r} differs from the pack's {group_value!r}"
                )
        return settings

    def _register_lane(self, lane: str, settings: VariantSettings, seed: int) -> None:
        self._state.settings[lane] = settings
        self._state.seeds[lane] = seed
        self._state.invalidate()


def _group_by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, parameter = name.rsplit(".", 1)
        parts.setdefault(owner, {})[parameter] = tensor
    return parts
