"""The sections of `gpu.py`. Each prints its measurements through `Setup.add`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from model_shapes import SHAPES, build_model
from paired_timing import synchronize
from synthetic_task import (
    FIRST_WORD,
    NumberTokenizer,
    StepSize,
    SyntheticTask,
    draw_rows,
    free_device_memory,
    make_lanes,
    take_step,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from orchestrator.finetune.data.batches import Row
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.evaluation.decoding import DecodingRules, decode_answers
from orchestrator.finetune.evaluation.evaluated_lanes import EvaluatedLanes
from orchestrator.finetune.evaluation.generate import generate_answers
from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.finetune.models import activation_checkpointing, liger_kernels
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP

MIB, GIB = 2**20, 2**30
MAX_LANES = 512
"""The most lanes that the section `oom` tries."""


@dataclass(frozen=True)
class Setup:
    """The options and the output that all sections share."""

    device: torch.device
    model: str
    """A key of `SHAPES`."""
    variants: tuple[str, ...]
    lanes: tuple[int, ...]
    steps: int
    liger: bool
    checkpointing: bool
    same_seed: bool
    add: Callable[..., None]
    """Called with the name of the section and the values of a measurement."""

    @property
    def is_tiny(self) -> bool:
        """Whether this is a rehearsal, with a tiny model and fewer measurements."""
        return self.model == "tiny"

    @property
    def longest(self) -> int:
        """The number of token ids of the longest row."""
        return 47 if self.is_tiny else 511

    def build(self) -> Any:
        """Return the model, with Liger's kernels and recomputation if they were asked for."""
        # bfloat16 is slow on CPUs, where this is a rehearsal.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = build_model(self.model, self.device, dtype)
        if self.liger:
            liger_kernels.apply_liger(model, self.model)
        if self.checkpointing:
            activation_checkpointing.enable_activation_checkpointing(model)
        return model

    def rows(self, count: int = 2048) -> list[Row]:
        """Return rows with lengths like those of MetaMathQA."""
        return draw_rows(SHAPES[self.model].vocab_size, 16 if self.is_tiny else count, self.longest)

    def step_size(self, accumulation: int = 1) -> StepSize:
        """Return the size of a step with 8 rows per micro-batch."""
        return StepSize(8, 1 if self.is_tiny else accumulation, self.longest + 1)

    @contextmanager
    def group(
        self, model: Any, rows: list[Row], variant: str, lanes: int, size: StepSize
    ) -> Iterator[tuple[LaneGroup, list[Lane]]]:
        """Attach lanes to a model inside the context.

        Args:
            model: The base model.
            rows: The training rows.
            variant: The name of the variant.
            lanes: The number of lanes.
            size: The size of a step.
        """
        group, members = make_lanes(model, rows, variant, lanes, size, self.same_seed)
        if self.liger:
            group.base_model = replace(group.base_model, kernels="liger")
        try:
            yield group, members
        finally:
            group.adapters.detach()
            del group, members
            free_device_memory(self.device)

    @contextmanager
    def lack_of_memory(self, section: str, **values: Any) -> Iterator[None]:
        """Report a lack of memory inside the context as a measurement, so that the next one follows.

        Args:
            section: The section.
            **values: The values that name the measurement.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            self.add(section, **values, fits=False)
        free_device_memory(self.device)

    def time(self, work: Callable[[], object], repeats: int = 8, warmups: int = 2) -> tuple[float, float]:
        """Return the median ms until the device has finished, and until `work` has returned.

        Args:
            work: The function to time.
            repeats: The number of calls that count.
            warmups: The number of calls before them.
        """
        ends, hosts = [], []
        for number in range(warmups + (2 if self.is_tiny else repeats)):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            host = time.perf_counter() - started
            synchronize(self.device)
            if number >= warmups:
                ends.append(1e3 * (time.perf_counter() - started))
                hosts.append(1e3 * host)
        return round(statistics.median(ends), 3), round(statistics.median(hosts), 3)

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """Fill the yielded dictionary with the peak of the allocator in GiB at the end of the context."""
        found: dict[str, float] = {}
        free_device_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if self.device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved(self.device) / GIB, 2)


def measure_ceilings(setup: Setup) -> None:
    """Measure the speed of a product, of a copy and of a launch."""
    cuda = setup.device.type == "cuda"
    side = 8192 if cuda else 256
    a, b = (torch.randn(side, side, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    product_ms, _ = setup.time(lambda: a @ b)
    source = torch.empty(GIB if cuda else MIB, device=setup.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms, _ = setup.time(lambda: target.copy_(source))
    small = torch.zeros(8, device=setup.device)
    _, host_ms = setup.time(lambda: [small.add_(1) for _ in range(1000)])
    setup.add(
        "ceilings",
        bf16_tflops=round(2 * side**3 / product_ms / 1e9, 1),
        copy_tb_per_s=round(2 * source.numel() / copy_ms / 1e9, 3),
        launch_us=host_ms,
    )


def measure_svd(setup: Setup) -> None:
    """Time the exact singular value decomposition of layers."""
    sizes = ((3072, 1024), (1024, 3072), (2048, 1024), (4096, 4096), (14336, 4096))
    for size in ((64, 32),) if setup.is_tiny else sizes:
        weight = torch.randn(*size, device=setup.device)
        ms, _ = setup.time(partial(torch.linalg.svd, weight, full_matrices=False), 1, int(size[0] < 4000))
        setup.add("svd", shape=size, ms=ms)


def measure_noise(setup: Setup) -> None:
    """Train one lane twice alone and once with other lanes, and compare its losses."""
    model, rows = setup.build(), setup.rows()
    curves = []
    for company in (1, 1, max(setup.lanes)):
        with setup.group(model, rows, setup.variants[0], company, setup.step_size(2)) as (group, lanes):
            curves.append(np.array([take_step(group, lanes)[0] for _ in range(setup.steps)]))
    first, again, together = curves
    differences = {"again": abs(first - again).max(), "in_company": abs(first - together).max()}
    setup.add("noise", steps=setup.steps, last_loss=float(first[-1]), **differences)


def measure_micro_batches(setup: Setup) -> None:
    """Time the forward and backward pass of a micro-batch of 8 rows per lane, in milliseconds.

    The rows have at most 384 tokens, then at most `setup.longest`, and always more than half of that.
    """
    model = setup.build()
    for length in (setup.longest,) if setup.is_tiny else (384, setup.longest):
        rows = [row for row in setup.rows(8192) if length / 2 < len(row.ids) <= length]
        size = StepSize(8, 1, length + 1)
        for variant in setup.variants:
            for count in setup.lanes:
                with (
                    setup.lack_of_memory("train", variant=variant, lanes=count, length=length),
                    setup.group(model, rows, variant, count, size) as (group, lanes),
                ):
                    _measure_micro_batch(setup, group, lanes, variant, length)


def _measure_micro_batch(
    setup: Setup, group: LaneGroup, lanes: list[Lane], variant: str, length: int
) -> None:
    def work() -> None:
        group.backward(lanes)

    with setup.memory() as memory:
        ms, host_ms = setup.time(work)
    setup.add(
        "train",
        variant=variant,
        lanes=len(lanes),
        length=length,
        liger=setup.liger,
        checkpointing=setup.checkpointing,
        ms=ms,
        host_ms=host_ms,
        **memory,
        **_profile_kernels(setup, work),
    )


def _profile_kernels(setup: Setup, work: Callable[[], object]) -> dict[str, Any]:
    """Return the number of kernels, the share of the time that the device computes, and the slowest ones."""
    if setup.device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        work()
        synchronize(setup.device)
        wall = time.perf_counter() - started
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    slowest = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:8]
    times = {event.key[:48]: round(event.self_device_time_total / 1e3, 2) for event in slowest}
    return {"kernels": len(on_device), "busy": round(busy / wall, 2), "slowest_ms": times}


def measure_steps(setup: Setup) -> None:
    """Time whole optimizer steps of the real lane group, and their forward and backward passes alone."""
    model, rows = setup.build(), setup.rows()
    for variant in setup.variants:
        for count in setup.lanes:
            with (
                setup.lack_of_memory("step", variant=variant, lanes=count),
                setup.group(model, rows, variant, count, setup.step_size(8)) as (group, lanes),
            ):
                with setup.memory() as memory:
                    ms, _ = setup.time(partial(take_step, group, lanes), setup.steps)
                backward_ms, _ = setup.time(partial(group.backward, lanes), setup.steps, 0)
                size = lanes[0].configuration.batches
                count_rows = size.micro_batch_size * size.accumulation_steps * len(lanes)
                tokens = count_rows * sum(len(row.ids) for row in rows) / len(rows)
                setup.add(
                    "step",
                    variant=variant,
                    lanes=len(lanes),
                    liger=setup.liger,
                    ms=ms,
                    backward_ms=backward_ms,
                    real_tokens_per_s=round(tokens / ms * 1e3),
                    lane_steps_per_s=round(len(lanes) / ms * 1e3, 2),
                    **memory,
                )


def measure_decoding(setup: Setup) -> None:
    """Time a decode step of the project's decoder by number of rows, without adapters and with lanes."""
    model, rows = setup.build(), setup.rows(128)
    for variant, count in ((None, 1), *((v, n) for v in setup.variants for n in setup.lanes)):
        attached: AbstractContextManager[tuple[LaneGroup | None, list[Lane]]] = nullcontext((None, []))
        if variant is not None:
            attached = setup.group(model, rows, variant, count, setup.step_size())
        with attached as (group, lanes):
            names = [lane.fingerprint for lane in lanes]
            for each in (4,) if setup.is_tiny else (32, 128, 340):
                row_count = each * max(1, len(names))
                if row_count <= 1024:
                    active = group.adapters.activate_lanes(names, None) if group else nullcontext()
                    with setup.lack_of_memory("generate", variant=variant, lanes=len(names), rows=row_count):
                        _measure_generation(setup, model, row_count, active, variant, len(names))


def _measure_generation(
    setup: Setup, model: Any, row_count: int, active: Any, variant: str | None, lanes: int
) -> None:
    prompt_length, new_tokens = (8, 4) if setup.is_tiny else (256, 512)
    largest, shape = SHAPES[setup.model].vocab_size, (row_count, prompt_length)
    ids = torch.randint(FIRST_WORD, largest, shape, device=setup.device)
    base_model = BaseModel(model, NumberTokenizer(), setup.device)

    def generate(count: int) -> None:
        decode_answers(base_model, DecodingRules(count), ids, torch.ones_like(ids), max(1, lanes))

    with active, setup.memory() as memory:
        all_ms, first_ms = (setup.time(partial(generate, count), 1)[0] for count in (new_tokens, 1))
    step_ms = (all_ms - first_ms) / (new_tokens - 1)
    setup.add(
        "generate",
        variant=variant,
        lanes=lanes,
        rows=row_count,
        ms_per_token=round(step_ms, 3),
        prompt_ms=first_ms,
        tokens_per_s=round(row_count / step_ms * 1e3),
        **memory,
    )


def measure_scoring(setup: Setup) -> None:
    """Time the project's own evaluation: losses of 64 items, and answers to 64 prompts."""
    model, rows = setup.build(), setup.rows(256)
    new_tokens = 4 if setup.is_tiny else 64
    with setup.group(model, rows, setup.variants[0], max(setup.lanes), setup.step_size()) as (group, lanes):
        with setup.memory() as memory:
            ms, _ = setup.time(partial(group.evaluate, lanes, "validation"), 3, 1)
        setup.add("scoring", what=f"loss of {min(64, len(rows))} items", lanes=len(lanes), ms=ms, **memory)
        base_model = BaseModel(model, NumberTokenizer(), setup.device)
        names = [lane.fingerprint for lane in lanes]
        prompts = [(number, row.prompt) for number, row in enumerate(rows[: 8 if setup.is_tiny else 64])]
        answer = partial(
            generate_answers,
            base_model,
            SyntheticTask(new_tokens),
            prompts,
            setup.longest,
            EvaluatedLanes.of(group.adapters, names, [0] * len(lanes)),
            SINGLE_PROCESS_GROUP,
        )
        with setup.memory() as memory:
            ms, _ = setup.time(answer, 1, 1)
        what = f"{len(prompts)} answers of at most {new_tokens} tokens"
        setup.add("scoring", what=what, lanes=len(lanes), ms=ms, **memory)


def measure_out_of_memory(setup: Setup) -> None:
    """Double the lanes until memory runs out (on a GPU only), and measure what stays allocated.

    Raises:
        RuntimeError: A step failed for another reason than a lack of memory.
    """
    model, rows, count = setup.build(), setup.rows(), max(setup.lanes)
    fault: Fault | None = None
    while fault is None and count <= (max(setup.lanes) if setup.device.type == "cpu" else MAX_LANES):
        before = _allocated(setup.device)
        fault = _find_fault(setup, model, rows, count)
        free_device_memory(setup.device)
        kept_mib = round((_allocated(setup.device) - before) / MIB, 1)
        setup.add("oom", lanes=count, fault=str(fault), kept_mib=kept_mib)
        count *= 2
    if fault not in (None, Fault.MEMORY):
        raise RuntimeError(f"a lack of memory was classified as {fault}; failures.py must say MEMORY")


def _find_fault(setup: Setup, model: Any, rows: list[Row], count: int) -> Fault | None:
    """Compute gradients of some lanes. Returns the kind of the error, if there is one.

    All tensors of the lanes are freed when this function returns.
    """
    try:
        with setup.group(model, rows, setup.variants[0], count, setup.step_size()) as (group, lanes):
            group.backward(lanes)
            synchronize(setup.device)
    except Exception as error:
        return classify_error(error)
    return None


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


SECTIONS: dict[str, Callable[[Setup], None]] = {
    "ceilings": measure_ceilings,
    "svd": measure_svd,
    "noise": measure_noise,
    "train": measure_micro_batches,
    "step": measure_steps,
    "generate": measure_decoding,
    "scoring": measure_scoring,
    "oom": measure_out_of_memory,
}
