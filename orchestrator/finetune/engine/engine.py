"""What stays between lanes: the loaded base, the adapters of the present shape, the data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.finetune.engine.calibration import evidence
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.lane import Lane, settings_of
from orchestrator.finetune.engine.lane_group import Data, Pack
from orchestrator.finetune.models import own_dropout
from orchestrator.finetune.models.activation_checkpointing import RECOMPUTES
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import ALONE, Team
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration, ModelChoice
from variants import catalogue as variants
from variants.attach import Adapters, attach
from variants.base import Kind, Unsupported, Variant
from variants.storage import save_lane, save_peft


class Workshop:
    """Keeps the base loaded while the model stays the same, the adapters attached while the shape does."""

    def __init__(
        self,
        load_bench: Callable[[ModelChoice, Task], Bench],
        evidence: Path,
        data: Path,
        team: Team = ALONE,
    ) -> None:
        """`evidence`: the folder where starts that are computed from data keep what they found; `data`: that
        of examples and token ids."""
        self._load_bench, self._evidence, self._folder, self.team = load_bench, evidence, data, team
        self._bench: tuple[tuple[ModelChoice, str], Bench] | None = None
        self._data: dict[tuple[object, ...], Data] = {}
        self._shape = ""
        self._dropping: Any = None
        """The model whose own dropout is on."""
        self._pack: Pack | None = None
        self.variant: Variant

    @property
    def is_open(self) -> bool:
        return self._pack is not None

    @property
    def current(self) -> Pack:
        assert self._pack is not None, "no lane has been opened"
        return self._pack

    @property
    def most_lanes(self) -> int:
        """How many lanes the present pack can have."""
        return self._pack.adapters.most_lanes if self._pack is not None else sys.maxsize

    @property
    def device(self) -> str:
        """For people: the GPU's name, or "cpu"."""
        if self._bench is None:
            return "none"
        device = self._bench[1].device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

    @property
    def place(self) -> str:
        """What decides how many lanes of a shape have memory, in words: the device, its memory, the seat's
        share of it, and how it is used."""
        words = [self.device]
        if self._bench is not None:
            bench = self._bench[1]
            words.append(f"{round(_memory(bench.device) / 2**30)} GiB")
            words += [f"share {bench.share:g}"] if bench.share < 1 else []
            words += ["gradient checkpointing"] if getattr(bench.model, RECOMPUTES, False) else []
        words += [f"{self.team.size} workers"] if self.team.size > 1 else []
        return ", ".join(words)

    def pack(self, configuration: Configuration) -> Pack:
        """The pack for this configuration's shape. Raises what loading, attaching or the task does."""
        same = configuration.shape == self._shape and self._pack is not None
        if same and self.variant.kind is not Kind.ALONE:
            return self.current
        self.close()
        choice = configuration.variant
        variant, task = variants.get(choice.name), tasks.get(configuration.task.name)
        for what, here, wanted in (
            ("variant", variant.numerics, choice.numerics),
            ("task", task.numerics, configuration.task.numerics),
        ):
            if here != wanted:
                raise RuntimeError(
                    f"the configuration is for numerics {wanted} of its {what}, this worker has {here}; "
                    "install the same version on every machine"
                )
        bench = self._load(configuration.model, task)
        drops = configuration.base_dropout == "on"
        if drops:
            own_dropout.check(bench.model, configuration.model.name)
        adapters = attach(
            bench.model, variant, settings_of(configuration), choice.targets, bench.heads, drops
        )
        key = (configuration.model, configuration.task, configuration.batches.max_length)
        try:
            if drops:
                self._dropping = bench.model
                own_dropout.turn_on(bench.model)
            if key not in self._data:
                self._data[key] = Data.of(configuration, task, bench, adapters, self.team, self._folder)
        except BaseException:
            self._take_off(adapters)
            raise
        self._pack, self._shape, self.variant = (
            Pack(bench, adapters, self._data[key], self.team),
            configuration.shape,
            variant,
        )
        return self._pack

    def open(self, lane: Lane, saved: Checkpoint | None) -> None:
        """Puts the lane on the model of its shape, at its start or where `saved` left it."""
        pack, configuration = self.pack(lane.configuration), lane.configuration
        found = None if saved else evidence(pack, configuration, self._evidence, self.team)
        untrained = pack.data.untrained["validation"]["loss"]
        self.team.attempt(lambda: lane.open(pack.adapters, untrained, saved, found))
        if saved is None and self.team.size > 1:
            with torch.no_grad():  # one start: another kind of GPU may find singular vectors of other signs
                for tensor in (*lane.parameters.values(), *pack.adapters.frozen(lane.name).values()):
                    self.team.broadcast_(tensor)

    def _load(self, choice: ModelChoice, task: Task) -> Bench:
        key = (choice, task.name if task.has_head else "")  # tasks with a head have a model of their own
        if self._bench is None or self._bench[0] != key:
            self._bench = None  # frees the old base before the new one comes
            self._bench = (key, self._load_bench(choice, task))
        return self._bench[1]

    def remove(self, lane: str) -> None:
        if self._pack is not None and lane in self._pack.adapters.lanes:
            self._pack.adapters.remove(lane)

    def save_adapter(self, lane: str, folder: Path, base_name: str) -> None:
        """In PEFT's format where PEFT has the method, else in ours."""
        try:
            save_peft(self.current.adapters, lane, folder, base_name)
        except Unsupported:
            folder.mkdir(parents=True, exist_ok=True)
            save_lane(self.current.adapters, lane, folder / "lane.safetensors")

    def close(self) -> None:
        """Takes the adapters off; the base stays loaded."""
        if self._pack is not None:
            self._take_off(self._pack.adapters)
            self._pack = None

    def _take_off(self, adapters: Adapters) -> None:
        """Detach the adapters, and turn the base's own dropout off."""
        if self._dropping is not None:
            own_dropout.turn_off(self._dropping)
            self._dropping = None
        adapters.detach()


def _memory(device: torch.device) -> int:
    """Bytes that it has in all: a GPU's, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
