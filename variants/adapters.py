"""Adapters on a model: the choice of its layers, the lanes on them, and the rows that the lanes compute."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants import api
from variants.errors import BypassedLayerError
from variants.forward_context import AdapterState, ForwardContext, LaneDropout, TableDropout
from variants.full_parameters import MODEL_PREFIX, FullModelParameters, LaneHead
from variants.lane_linear import LaneLinear
from variants.lane_tensors import LaneTensors
from variants.nf4 import NF4Linear
from variants.targets import find_target_layers, view_layer

CalibrationTensors = Mapping[str, Mapping[str, Tensor]]
"""Layer -> the result of the variant's `reduce_calibration`."""


def attach(
    model: nn.Module,
    variant: api.Variant,
    settings: api.VariantSettings,
    targets: str = "blocks",
    heads: Sequence[str] = (),
    base_dropout: bool = False,
) -> Adapters:
    """Replace the model's target layers by layers that K lanes share, and freeze the model.

    The model must be on its device already.

    Args:
        model: The model, without adapters.
        variant: The rule by which the layers learn.
        settings: Settings that all lanes share; the alpha is checked and otherwise unused.
        targets: The layers to adapt, as `find_target_layers` takes them.
        heads: Names of the modules that belong to the task. Each lane trains its own copy of every linear
            layer in them.
        base_dropout: True to apply the model's own dropout in training, with separate masks for each lane.

    Raises:
        UnsupportedError: A target does not exist or cannot be adapted, the settings do not fit a layer, the
            model carries adapters already, or the variant cannot train this model.
    """
    if any(isinstance(module, (LaneLinear, LaneHead)) for module in model.modules()):
        raise api.UnsupportedError("the model carries adapters already; detach() them first")
    settings, scope = variant.validate_settings(settings), variant.adaptation_scope
    head_layers = {
        f"{head}.{name}" if name else head: module
        for head in heads
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear)
    }
    if scope is api.AdaptationScope.HEAD_ONLY and not head_layers:
        raise api.UnsupportedError(f"{variant.name} trains the task's head alone, and this task has none")
    for name, module in model.named_modules() if scope is api.AdaptationScope.FULL_MODEL else ():
        if isinstance(module, NF4Linear):
            raise api.UnsupportedError(
                f"{variant.name} trains every weight, and {name} has 4 bits per value (nf4); load the "
                "model in bfloat16 or float32, or take a variant with adapters"
            )
    target_layers: dict[str, nn.Module] = {}
    if scope is api.AdaptationScope.TARGET_LAYERS:
        found = find_target_layers(model, targets)
        target_layers = {name: module for name, module in found.items() if name not in head_layers}
        if not target_layers:
            raise api.UnsupportedError(
                f"targets {targets!r}: all of it is the task's head, which is trained in full; "
                "name other layers"
            )
    views = [view_layer(name, layer).with_settings(settings) for name, layer in target_layers.items()]
    limits = {view.name: limit for view in views if (limit := variant.largest_rank(view)) is not None}
    name = min(limits, key=limits.__getitem__, default="")
    if limits and settings.rank > limits[name]:
        raise api.UnsupportedError(
            f"rank {settings.rank} is larger than layer {name} allows: at most {limits[name]}"
        )
    for view in views:
        check_fit(variant, view)
    return Adapters(model, variant, settings, target_layers, head_layers, base_dropout)


def check_fit(variant: api.Variant, layer: api.FrozenLayer) -> None:
    """Check a layer, with its settings, against `Int.divides` and the variant's own rules (`check_layer`).

    Raises:
        UnsupportedError: The settings do not fit.
    """
    sides = dict(zip(("out", "in"), layer.shape, strict=True))
    for name, each in variant.hyperparameters.items():
        for side in each.divides if isinstance(each, api.Int) else ():
            if sides[side] % layer.settings[name]:
                raise api.UnsupportedError(
                    f"{layer.name} has {sides[side]} {side}puts: {name} {layer.settings[name]} does not "
                    "divide them"
                )
    variant.check_layer(layer)


def group_owner(variant: api.SharedTensors, layer_name: str) -> str:
    """Return the name of the tensors that a layer shares with its group, also in checkpoints."""
    return f"group:{variant.layer_group(layer_name)}"


def init_layers(variant: api.Variant, layers: api.Layers, seed: int) -> dict[str, api.InitialTensors]:
    """Return one lane's initial tensors of all layers and of the groups that share tensors, by owner.

    Args:
        variant: The variant.
        layers: The frozen layers by name, with the lane's settings.
        seed: The lane's seed.
    """

    def random_of(name: str) -> api.LayerRandom:
        return api.LayerRandom(layers[name], api.stable_seed(seed, name))

    if isinstance(variant, api.InitTogether):
        initial = variant.init_layers(layers, random_of)
    else:
        initial = {name: variant.init(layer, random_of(name)) for name, layer in layers.items()}
    groups: dict[str, dict[str, api.FrozenLayer]] = {}
    if isinstance(variant, api.SharedTensors):
        for name, layer in layers.items():
            groups.setdefault(group_owner(variant, name), {})[name] = layer
        for owner, members in groups.items():
            random = api.LayerRandom(next(iter(members.values())), api.stable_seed(seed, owner))
            initial[owner] = variant.init_layer_group(members, random)
    return initial


class Adapters:
    """A model whose layers hold the tensors of several lanes; made by `attach`.

    The tensors of a lane belong to owners: an adapted layer, a head, a layer group, or a module of a model
    that is trained in full. The constructor takes layers and heads by dotted path, and checks nothing.

    Attributes:
        model: The model, with its target layers and heads replaced.
        settings: Settings that all lanes share (rank, dropout, extra settings).
        layers: The adapted layers by dotted path.
        heads: The task's linear layers by dotted path.
        layer_groups: Tensors that several layers share, by owner.
        full_model: The lane's copies of all parameters outside the heads; empty without full fine-tuning.
        tensors_by_owner: The tensors of all lanes, by owner.
    """

    def __init__(
        self,
        model: nn.Module,
        variant: api.Variant,
        settings: api.VariantSettings,
        target_layers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        base_dropout: bool = False,
    ) -> None:
        self.model, self.variant, self.settings, self.state = model, variant, settings, AdapterState()
        self.layers: dict[str, LaneLinear] = {}
        self.layer_groups: dict[str, LaneTensors] = {}
        for name, base in target_layers.items():
            shared = None
            if isinstance(variant, api.SharedTensors):
                shared = self.layer_groups.setdefault(group_owner(variant, name), LaneTensors(variant))
            self.layers[name] = LaneLinear(name, base, variant, self.state, shared)
        self.heads = {
            name: LaneHead(name, base, self.state)  # type: ignore[arg-type]  # attach() admits only Linear
            for name, base in heads.items()
        }
        self._undo = ExitStack()
        self._replace_modules(base_dropout)
        for parameter in model.parameters():
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        is_full = variant.adaptation_scope is api.AdaptationScope.FULL_MODEL
        self.full_model = FullModelParameters(model if is_full else nn.Module(), self.heads.values())
        self.tensors_by_owner: dict[str, LaneTensors] = {
            **{name: layer.own_tensors for name, layer in self.layers.items()},
            **self.layer_groups,
            **{name: head.own_tensors for name, head in self.heads.items()},
            **self.full_model.tensors,
        }

    def _replace_modules(self, base_dropout: bool) -> None:
        wrappers = (*self.layers.values(), *self.heads.values())
        replacements: dict[int, nn.Module] = {id(wrapper.base_layer): wrapper for wrapper in wrappers}
        for name, module in list(self.model.named_modules()) if base_dropout else ():
            if isinstance(module, nn.Dropout) and module.p > 0:
                is_table = isinstance(module, TableDropout)
                replacements[id(module)] = LaneDropout(name, module.p, self.state, is_table)
            if hasattr(module, "is_causal"):  # an attention module of transformers
                module.lane_dropout = LaneDropout(f"{name}.probabilities", 0.0, self.state)
                module.training = True  # otherwise it passes dropout 0 to its attention function
                self._undo.callback(setattr, module, "training", False)
                self._undo.callback(delattr, module, "lane_dropout")
        # A module may have several parents (tied layers): it is replaced in all of them.
        for parent in list(self.model.modules()):
            for key, child in parent._modules.items():
                if child is not None and id(child) in replacements:
                    self._undo.callback(parent._modules.__setitem__, key, child)
                    parent._modules[key] = replacements[id(child)]

    def detach(self) -> None:
        """Restore the model bit for bit and remove all lanes; a second call has no effect."""
        self._undo.close()
        for lane in self.lanes:
            self.remove_lane(lane)

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes in the order in which they were added."""
        return tuple(self.state.settings)

    @property
    def max_lanes(self) -> int:
        """The largest permitted number of lanes."""
        return 1 if self.variant.batching is api.Batching.EXCLUSIVE else sys.maxsize

    def lane_settings(self, lane: str) -> api.VariantSettings:
        """Return a lane's settings, with all defaults filled in."""
        return self.state.settings[self._require_lane(lane)]

    def lane_seed(self, lane: str) -> int:
        """Return a lane's seed."""
        return self.state.seeds[self._require_lane(lane)]

    def add_lane(
        self,
        lane: str,
        settings: api.VariantSettings,
        seed: int,
        calibration: CalibrationTensors | None = None,
    ) -> None:
        """Add a lane at step 0.

        Of the settings only alpha may differ from those of other lanes. The seed is for initial tensors,
        dropout masks and hooks: the noise depends only on it and on the names of layer and parameter, so that
        every variant and learning rate gets the same noise. A variant that starts from data needs the result
        of `calibrate`.

        Raises:
            UnsupportedError: The settings differ from those of the lane group, there is no room for another
                lane, or the calibration is missing.
            ValueError: The lane exists already.
        """
        settings, calibration = self._check_new_lane(lane, settings), calibration or {}
        layers = {
            name: replace(layer.frozen_layer, calibration=calibration.get(name, {}), settings=settings)
            for name, layer in self.layers.items()
        }
        with torch.no_grad():
            initial = init_layers(self.variant, layers, seed)
            whole = {**self.init_heads(seed), **self.full_model.init()}
        initial |= {owner: api.InitialTensors(tensors) for owner, tensors in whole.items()}
        self._store_lane(lane, initial, settings, seed)

    def restore_lane(
        self,
        lane: str,
        trainable: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        settings: api.VariantSettings,
        seed: int = 0,
    ) -> None:
        """Add a saved lane, bit for bit: what `trainable` and `frozen` returned when it was saved.

        Raises:
            UnsupportedError: The model has no such owner, an owner of the model has no tensors, the settings
                differ from those of the lane group, or there is no room for another lane.
            ValueError: The lane exists already.
        """
        settings = self._check_new_lane(lane, settings)
        saved: defaultdict[str, api.InitialTensors] = defaultdict(lambda: api.InitialTensors({}))
        for kind, tensors in (("trainable", trainable), ("frozen", frozen)):
            for name, tensor in tensors.items():
                owner, _, key = name.rpartition(".")
                getattr(saved[owner], kind)[key] = tensor
        owners = self.tensors_by_owner.keys()
        grouped = {name for name, layer in self.layers.items() if layer.layer_group is not None}
        if not grouped & saved.keys():  # the groups may have all tensors of these layers (ShareLoRA)
            saved |= {name: api.InitialTensors({}) for name in grouped}
        problems = [f"layer {owner!r} is not adapted" for owner in sorted(saved.keys() - owners)]
        problems += [f"layer {owner!r} is missing" for owner in sorted(owners - saved.keys())]
        if problems:
            raise api.UnsupportedError(f"lane {lane}: its tensors do not fit the model: {problems[0]}")
        self._store_lane(lane, saved, settings, seed)

    def remove_lane(self, lane: str) -> None:
        """Remove a lane and its tensors."""
        del self.state.settings[self._require_lane(lane)], self.state.seeds[lane]
        for owner_tensors in self.tensors_by_owner.values():
            owner_tensors.remove_lane(lane)
        self.state.generation += 1

    def init_heads(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Return the initial weights of each head for a lane with this seed."""
        return {name: head.init(api.stable_seed(seed, name)) for name, head in self.heads.items()}

    def trainable(self, lane: str) -> dict[str, nn.Parameter]:
        """Return a lane's parameters by "<owner>.<parameter>".

        A backward pass sets their `grad`, but they are not in the autograd graph, which has stacks of the
        lanes' tensors. So `torch.autograd.grad`, hooks and `requires_grad_` on them have no effect.
        """
        self._require_lane(lane)
        owners = self.tensors_by_owner.items()
        return {f"{owner}.{name}": t for owner, own in owners for name, t in own.trainable[lane].items()}

    def frozen(self, lane: str) -> dict[str, Tensor]:
        """Return a lane's frozen tensors by "<owner>.<tensor>"; checkpoints store them.

        Examples are PiSSA's A0 and B0 and AdaLoRA's mask.
        """
        self._require_lane(lane)
        owners = self.tensors_by_owner.items()
        return {f"{owner}.{name}": t for owner, own in owners for name, t in own.frozen[lane].items()}

    def is_head(self, parameter: str) -> bool:
        """Return whether a key of `trainable` belongs to the task's head."""
        return parameter.rpartition(".")[0] in self.heads

    def owning_module(self, parameter: str) -> nn.Module | None:
        """Return the module whose parameter full fine-tuning trains under a key of `trainable`, or None."""
        owner = parameter.rpartition(".")[0]
        is_full = owner.startswith(MODEL_PREFIX)
        return self.model.get_submodule(owner.removeprefix(MODEL_PREFIX)) if is_full else None

    def ranks_in_use(self, lane: str) -> dict[str, int]:
        """Return the number of unmasked ranks of each layer."""
        settings, variant = self.lane_settings(lane), self.variant
        if not isinstance(variant, api.RankAllocation):
            return dict.fromkeys(self.layers, settings.rank)
        tensors = {name: layer.lane_tensors(lane) for name, layer in self.layers.items()}
        return {name: variant.rank_in_use(own, settings) for name, own in tensors.items()}

    def parameter_count(self, lane: str) -> int:
        """Return the number of trainable values of a lane, without masked ranks."""
        count, ranks = 0, self.ranks_in_use(lane)
        for owner, own in self.tensors_by_owner.items():
            size = sum(parameter.numel() for parameter in own.trainable[lane].values())
            mask = own.frozen[lane].get(api.RANK_MASK)
            # All tensors of a layer with a mask have one slice for each rank.
            count += size if mask is None else size // mask.numel() * ranks[owner]
        return count

    def before_step(self, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Run the variant's hook before an optimizer step of the lane's AdamW, after `step` earlier steps."""
        self._run_hook("before_step", lane, step, total_steps, optimizer)

    def after_step(self, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Mark the lane's parameters as written, and run the variant's hook after an optimizer step.

        Call this method after every step, also for a variant without the hook; `step` includes it.
        """
        for owner_tensors in self.tensors_by_owner.values():
            owner_tensors.after_write(lane)
        self._run_hook("after_step", lane, step, total_steps, optimizer)

    def _run_hook(
        self, hook: str, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer
    ) -> None:
        if not isinstance(self.variant, api.StepHooks):
            return
        views, settings, seed = {}, self.lane_settings(lane), self.lane_seed(lane)
        for name, layer in self.layers.items():
            own = layer.own_tensors
            views[name] = api.LayerView(layer.lane_layer(lane), own.trainable[lane], own.frozen[lane])
        view = api.LaneView(views, settings, seed, step, total_steps, optimizer)
        with torch.no_grad():
            getattr(self.variant, hook)(view)

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
        """Let calls of the model compute the rows of these lanes.

        Inside the context the model is called with K*R rows: lane i has rows i*R to (i+1)*R - 1. The backward
        pass may run inside the context or after it; for full fine-tuning it has to run inside.

        The arguments are the fields of the context, which is yielded. There are K lanes, each once.
        `dropout_step` is the step of all lanes or of each lane, and None for evaluation. The context has the
        auxiliary losses after the forward pass.

        Raises:
            BypassedLayerError: The model read the weight of an adapted layer without calling the layer.
            KeyError: A lane does not exist.
            ValueError: There is no lane, or a lane occurs twice.
        """
        for lane in lanes:
            self._require_lane(lane)
        if not lanes or len(set(lanes)) != len(lanes):
            raise ValueError(f"rows of lanes {list(lanes)}: must be at least one, each once")
        steps = [dropout_step] * len(lanes) if isinstance(dropout_step, int) else dropout_step
        context = ForwardContext(tuple(lanes), steps, micro_batch, rows_per_lane, shard, attention_mask)
        with self.state.activate(context), self.full_model.swap_in(lanes[0]):
            yield context
            if bypassed := sorted(context.weight_reads - context.called_layers):
                raise BypassedLayerError(
                    f"{bypassed[0]}: the model reads the layer's weight and never calls the layer; "
                    "target other layers"
                )
        context.prepared_params.clear()

    @contextmanager
    def disable_adapters(
        self,
        head_weights: Mapping[str, Mapping[str, Tensor]] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[None]:
        """Let calls of the model compute the frozen base model, with any number of rows.

        `head_weights`, head -> parameter -> value, take the place of the model's own head.
        """
        context = ForwardContext((), head_weights=head_weights or {}, attention_mask=attention_mask)
        with self.state.activate(context):
            yield

    def _require_lane(self, lane: str) -> str:
        if lane not in self.state.settings:
            raise KeyError(f"no lane {lane!r}; there are: {', '.join(self.lanes) or 'none'}")
        return lane

    def _check_new_lane(self, lane: str, settings: api.VariantSettings) -> api.VariantSettings:
        """Return the lane's settings with all defaults, if the lane fits into the group."""
        if lane in self.state.settings:
            raise ValueError(f"lane {lane!r} is there already")
        settings = self.variant.validate_settings(settings)
        if len(self.lanes) >= self.max_lanes:
            raise api.UnsupportedError(
                f"{self.variant.name} trains one lane at a time; lane {self.lanes[0]} is there already"
            )
        for field in ("rank", "dropout", "extra"):
            value, group_value = getattr(settings, field), getattr(self.settings, field)
            if value != group_value:
                raise api.UnsupportedError(
                    f"lane {lane}: {field} {value!r} differs from the lane group's {group_value!r}"
                )
        return settings

    def _store_lane(
        self, lane: str, tensors: Mapping[str, api.InitialTensors], settings: api.VariantSettings, seed: int
    ) -> None:
        device = next(self.model.parameters()).device
        for owner, own in tensors.items():
            self.tensors_by_owner[owner].add_lane(lane, own, device)
        self.state.settings[lane], self.state.seeds[lane] = settings, seed
        self.state.generation += 1
