"""Lanes that train on an adapted model."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from variants.adapted_model import AdaptedModel, CalibrationTensors
from variants.api import (
    RANK_MASK,
    Batching,
    InitialTensors,
    LaneView,
    LayerView,
    UnsupportedError,
    VariantSettings,
)
from variants.errors import BypassedLayerError
from variants.forward_context import ForwardContext
from variants.full_finetune import MODEL_PREFIX
from variants.hooks import RankAllocation, StepHooks, statistic_of


class Adapters(AdaptedModel):
    """An adapted model and the lanes on it; made by `attach`."""

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes in the order in which they were added."""
        return tuple(self.state.settings)

    @property
    def max_lanes(self) -> int:
        """The largest permitted number of lanes."""
        return 1 if self.variant.batching is Batching.EXCLUSIVE else sys.maxsize

    def lane_settings(self, lane: str) -> VariantSettings:
        """Return a lane's settings, with all defaults filled in."""
        return self.state.settings[self._require_lane(lane)]

    def lane_seed(self, lane: str) -> int:
        """Return a lane's seed."""
        return self.state.seeds[self._require_lane(lane)]

    def add_lane(
        self, lane: str, settings: VariantSettings, seed: int, calibration: CalibrationTensors | None = None
    ) -> None:
        """Add a lane at step 0.

        The noise depends only on the seed and the names of layer and parameter, so that every variant and
        learning rate gets the same noise.

        Args:
            lane: The new lane's name.
            settings: The lane's settings, of which only alpha may differ from those of other lanes.
            seed: The seed of the lane's initial tensors, dropout masks and hooks.
            calibration: The result of `calibrate`; None for a variant that needs no data.

        Raises:
            UnsupportedError: The settings differ from those of the lane group, there is no room for another
                lane, or the calibration is missing.
            ValueError: The lane exists already.
        """
        settings = self._validate_new_lane(lane, settings)
        statistic = statistic_of(self.variant)
        if statistic.needs_data and calibration is None:
            raise UnsupportedError(f"{self.variant.name} starts from {statistic}: calibrate first")
        self._store_lane(lane, self.initial_tensors(settings, seed, calibration or {}), settings, seed)

    def restore_lane(
        self,
        lane: str,
        trainable: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        settings: VariantSettings,
        seed: int = 0,
    ) -> None:
        """Add a saved lane, bit for bit.

        Args:
            lane: The lane's name.
            trainable: The result of `trainable` when the lane was saved.
            frozen: The result of `frozen` when the lane was saved.
            settings: The lane's settings.
            seed: The seed of the lane's dropout masks and hooks.

        Raises:
            UnsupportedError: The model has no such owner, an owner of the model has no tensors, the settings
                differ from those of the lane group, or there is no room for another lane.
            ValueError: The lane exists already.
        """
        settings = self._validate_new_lane(lane, settings)
        saved: defaultdict[str, InitialTensors] = defaultdict(lambda: InitialTensors({}))
        for name, tensor in trainable.items():
            owner, _, key = name.rpartition(".")
            saved[owner].trainable[key] = tensor
        for name, tensor in frozen.items():
            owner, _, key = name.rpartition(".")
            saved[owner].frozen[key] = tensor
        owners = self.tensors_by_owner.keys()
        grouped = {name for name, layer in self.layers.items() if layer.layer_group is not None}
        if not grouped & saved.keys():  # the groups may have all tensors of these layers (ShareLoRA)
            saved |= {name: InitialTensors({}) for name in grouped}
        problems = [f"layer {owner!r} is not adapted" for owner in sorted(saved.keys() - owners)]
        problems += [f"layer {owner!r} is missing" for owner in sorted(owners - saved.keys())]
        if problems:
            raise UnsupportedError(f"lane {lane}: its tensors do not fit the model: {problems[0]}")
        self._store_lane(lane, saved, settings, seed)

    def remove_lane(self, lane: str) -> None:
        """Remove a lane and its tensors."""
        del self.state.settings[self._require_lane(lane)], self.state.seeds[lane]
        for owner_tensors in self.tensors_by_owner.values():
            owner_tensors.remove_lane(lane)
        self.state.invalidate()

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
        """Return the module of the model that owns a parameter trained by full fine-tuning.

        Args:
            parameter: A key of `trainable`.

        Returns:
            None for parameters of adapters and heads.
        """
        owner = parameter.rpartition(".")[0]
        if not owner.startswith(MODEL_PREFIX):
            return None
        return self.model.get_submodule(owner.removeprefix(MODEL_PREFIX))

    def ranks_in_use(self, lane: str) -> dict[str, int]:
        """Return the number of unmasked ranks of each layer."""
        settings, variant = self.lane_settings(lane), self.variant
        if not isinstance(variant, RankAllocation):
            return dict.fromkeys(self.layers, settings.rank)
        tensors = {name: layer.lane_tensors(lane) for name, layer in self.layers.items()}
        return {name: variant.rank_in_use(own, settings) for name, own in tensors.items()}

    def parameter_count(self, lane: str) -> int:
        """Return the number of trainable values of a lane, without masked ranks."""
        self._require_lane(lane)
        count = 0
        for owner, own in self.tensors_by_owner.items():
            size = sum(parameter.numel() for parameter in own.trainable[lane].values())
            mask = own.frozen[lane].get(RANK_MASK)
            if mask is not None:  # all tensors of such a layer have one slice for each rank
                size = size // mask.numel() * self.ranks_in_use(lane)[owner]
            count += size
        return count

    def before_step(self, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Run the variant's hook before an optimizer step.

        Args:
            lane: The lane that takes the step.
            step: The number of steps taken so far.
            total_steps: The number of steps that the lane takes in all.
            optimizer: The lane's AdamW.
        """
        self._run_hook("before_step", lane, step, total_steps, optimizer)

    def after_step(self, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Mark the lane's parameters as written, and run the variant's hook after an optimizer step.

        Call this method after every step, also for a variant without the hook.

        Args:
            lane: The lane that took the step.
            step: The number of steps taken so far, this one included.
            total_steps: The number of steps that the lane takes in all.
            optimizer: The lane's AdamW.
        """
        for owner_tensors in self.tensors_by_owner.values():
            owner_tensors.after_write(lane)
        self._run_hook("after_step", lane, step, total_steps, optimizer)

    def _run_hook(
        self, hook: str, lane: str, step: int, total_steps: int, optimizer: torch.optim.Optimizer
    ) -> None:
        if not isinstance(self.variant, StepHooks):
            return
        settings = self.lane_settings(lane)
        views = {}
        for name, layer in self.layers.items():
            own = layer.own_tensors
            views[name] = LayerView(layer.lane_layer(lane), own.trainable[lane], own.frozen[lane])
        view = LaneView(views, settings, self.lane_seed(lane), step, total_steps, optimizer)
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

        Args:
            lanes: K lanes, each once.
            dropout_step: The optimizer step of all lanes or of each lane, which determines the dropout masks;
                None for evaluation, which has neither dropout nor auxiliary losses.
            micro_batch: The number of the micro-batch within the step.
            rows_per_lane: R; if None, layers check only that their number of rows is a multiple of K.
            shard: (first, total) if a worker computes only the rows from `first` on of the `total` rows that
                each lane has on all workers together.
            attention_mask: (K*R, L), False at padding.

        Yields:
            The context, which holds the auxiliary losses after the forward pass.

        Raises:
            BypassedLayerError: The model read the weight of an adapted layer without calling the layer.
            KeyError: A lane does not exist.
            ValueError: There is no lane, a lane occurs twice, or the number of dropout steps is wrong.
        """
        for lane in lanes:
            self._require_lane(lane)
        if not lanes or len(set(lanes)) != len(lanes):
            raise ValueError(f"rows of lanes {list(lanes)}: must be at least one, each once")
        steps = [dropout_step] * len(lanes) if isinstance(dropout_step, int) else dropout_step
        if steps is not None and len(steps) != len(lanes):
            raise ValueError(f"{len(steps)} dropout steps for {len(lanes)} lanes")
        context = ForwardContext(tuple(lanes), steps, micro_batch, rows_per_lane, shard, attention_mask)
        full_model = self.full_model.swap_in(lanes[0]) if self.full_model is not None else nullcontext()
        with self._activate(context), full_model:
            yield context
            bypassed = sorted(context.weight_reads - context.called_layers)
            if bypassed:
                raise BypassedLayerError(
                    f"{bypassed[0]}: the model reads the layer's weight and never calls the layer; "
                    "target other layers"
                )
        context.prepared_params.clear()
        self.state.last_context = context

    @contextmanager
    def disable_adapters(
        self,
        head_weights: Mapping[str, Mapping[str, Tensor]] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[None]:
        """Let calls of the model compute the frozen base model, with any number of rows.

        Args:
            head_weights: Head -> parameter -> value, in place of the model's own head.
            attention_mask: (rows, L), False at padding.
        """
        context = ForwardContext((), head_weights=head_weights or {}, attention_mask=attention_mask)
        with self._activate(context):
            yield

    def detach(self) -> None:
        """Restore the model bit for bit and remove all lanes."""
        super().detach()
        for lane in self.lanes:
            self.remove_lane(lane)

    @contextmanager
    def _activate(self, context: ForwardContext) -> Iterator[None]:
        before, self.state.current_context = self.state.current_context, context
        try:
            yield
        finally:
            self.state.current_context = before

    def _require_lane(self, lane: str) -> str:
        if lane not in self.state.settings:
            raise KeyError(f"no lane {lane!r}; there are: {', '.join(self.lanes) or 'none'}")
        return lane

    def _validate_new_lane(self, lane: str, settings: VariantSettings) -> VariantSettings:
        if lane in self.state.settings:
            raise ValueError(f"lane {lane!r} is there already")
        settings = self.variant.validate_settings(settings)
        if len(self.lanes) >= self.max_lanes:
            raise UnsupportedError(
                f"{self.variant.name} trains one lane at a time; lane {self.lanes[0]} is there already"
            )
        for field in ("rank", "dropout", "extra"):
            value, group_value = getattr(settings, field), getattr(self.settings, field)
            if value != group_value:
                raise UnsupportedError(
                    f"lane {lane}: {field} {value!r} differs from the lane group's {group_value!r}"
                )
        return settings

    def _store_lane(
        self, lane: str, tensors: Mapping[str, InitialTensors], settings: VariantSettings, seed: int
    ) -> None:
        device = next(self.model.parameters()).device
        for owner, own in tensors.items():
            self.tensors_by_owner[owner].add_lane(lane, own.trainable, own.frozen, device)
        self.state.settings[lane], self.state.seeds[lane] = settings, seed
        self.state.invalidate()
