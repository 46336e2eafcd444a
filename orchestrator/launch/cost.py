"""What a study would cost: tokens, FLOPs, and hours and price, measured or guessed, as lines of a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from orchestrator.execution.progress import format_duration
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.templates import has_layer_shapes
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.store import Store
from orchestrator.record.tables import PARQUET_FILE
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError, suggest_nearest
from variants import catalogue
from variants.source_cache import cached
from variants.traits import AdaptationScope

if TYPE_CHECKING:
    import pandas

CARDS = {
    "L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 989, "B200": 2250, "RTX 4090": 165,
}  # fmt: skip
"""GPU -> peak of dense bfloat16 products in TFLOP/s, from NVIDIA's data sheets; SXM where there are two."""
PEAK_SHARES = (0.4, 0.15)
"""The shares of a card's peak between which the training of a large and of a small model is guessed to be."""
STARTUP_SECONDS = 25.0
"""Time in which Ray and the first trainer start."""
FLOPS_PER_WEIGHT = {
    AdaptationScope.FULL_MODEL: 6,
    AdaptationScope.TARGET_LAYERS: 4,
    AdaptationScope.HEAD_ONLY: 2,
}
"""FLOPs per weight of the base model and token: 2 forward, 2 for the gradients of activations, and 2 for the
gradients of weights that are trained."""

Line = tuple[str, str]
"""Label and text of a printed line."""


def find_card(device: str) -> str | None:
    """Return the card of `CARDS` that a name of a GPU means; None for other cards and for MIG slices."""
    if "MIG" in device:
        return None
    return next((card for card in CARDS if re.search(rf"\b{card}\b", device, re.IGNORECASE)), None)


def require_card(name: str) -> str:
    """Return the card that --plan-gpu names.

    Raises:
        UsageError: `CARDS` has none of this name.
    """
    if (card := find_card(name)) is None:
        raise UsageError(f"--plan-gpu {name!r}: its speed is not known. {suggest_nearest(name, CARDS)}")
    return card


def cost_lines(
    to_train: Sequence[Configuration],
    store: Store,
    device: str,
    num_trainers: int,
    gpus_per_worker: float,
    options: StudyOptions,
) -> tuple[list[Line], bool]:
    """Describe the time and the price of training.

    Args:
        to_train: The configurations.
        store: The store, whose table of runs has the times of finished lanes.
        device: `cpu`, or the name of a GPU; empty if it is not known.
        num_trainers: Number of trainers; 0 if the cluster decides.
        gpus_per_worker: GPUs of each worker of a trainer.
        options: Options of the study.

    Returns:
        Pairs of a label and a text, and whether the time was measured.
    """
    tokens = sum(_examples(each) * each.batches.max_length for each in to_train)
    lines = [("Tokens", f"at most {tokens:,}")] if all(c.batches.max_length for c in to_train) else []
    fewer = "" if options.scheduler == "none" else ", less what early stopping saves"
    hours: tuple[float, float] | None = None
    measured = _measured_seconds(to_train, store, device)
    if measured is not None:
        seconds, where, source = measured
        divided = "" if num_trainers else " divided by the number of trainers"
        duration = format_duration(seconds / max(1, num_trainers) + (STARTUP_SECONDS if num_trainers else 0))
        lines.append(("Time", f"about {duration}{divided}, {source}{fewer}"))
        if where != "cpu":
            hours = (seconds * options.workers_per_trainer * gpus_per_worker / 3600,) * 2
            lines.append(("GPU hours", f"about {_span(*hours)} on {where}{fewer}"))
    else:
        lines.append(("Time", "unknown: no lane of this task and model has been trained on such a device"))
        card = find_card(device)
        flops = _count_flops(to_train, store, options.gradient_checkpointing) if card else None
        if card and flops:
            lines.append(("FLOPs", f"at most {flops:.2g}, without evaluations"))
            low, high = (flops / (share * CARDS[card] * 1e12) / 3600 for share in PEAK_SHARES)
            hours = low, high
            shares = " to ".join(f"{share:.0%}" for share in PEAK_SHARES)
            speed = f"{shares} of its peak of {CARDS[card]} TFLOP/s"
            lines.append(("GPU hours", f"a guess: {_span(low, high)} of one {card}, at {speed}{fewer}"))
        elif card:
            lines.append(("GPU hours", "unknown: the model's size is not known, or its inputs are images"))
    if hours and options.price_per_hour is not None:
        price = options.price_per_hour
        text = _span(hours[0] * price, hours[1] * price)
        lines.append(("Price", f"{text} USD, at {price:g} USD for an hour of one GPU"))
    return lines, measured is not None


def _examples(configuration: Configuration) -> int:
    """Return the number of training examples of all steps."""
    batches = configuration.batches
    return configuration.lr_schedule.steps * batches.batch_size * batches.accumulation


def _span(low: float, high: float) -> str:
    return " to ".join(dict.fromkeys(f"{float(f'{value:.2g}'):g}" for value in (low, high)))


def _count_flops(to_train: Sequence[Configuration], store: Store, checkpointing: bool) -> float | None:
    """Return the FLOPs of the training steps of all configurations, None if they cannot be counted."""
    sizes = {(c.model, c.task.name): _count_weights(c.model, c.task.name, store) for c in to_train}
    total = 0.0
    for each in to_train:
        weights = sizes[each.model, each.task.name]
        if not weights or not each.batches.max_length:
            return None
        scope = catalogue.traits(each.variant.name).adaptation_scope
        # With checkpointing the forward pass is computed twice.
        factor = FLOPS_PER_WEIGHT[scope] + (2 if checkpointing else 0)
        total += factor * weights * _examples(each) * each.batches.max_length
    return total


def _count_weights(model: ModelChoice, task: str, store: Store) -> float | None:
    """Return the number of weights of a base model; of one that is not here, the number in its name."""
    if not has_layer_shapes(model):
        found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([BM])(?![a-z])", model.name, re.IGNORECASE)
        return float(found[1]) * {"B": 1e9, "M": 1e6}[found[2].upper()] if found else None

    def count() -> int:
        built, _ = loading.build_meta_model(model, store.bases, tasks.get(task))
        return sum(parameter.numel() for parameter in built.parameters())

    name = re.sub(r"[^\w.-]", "_", model.name if model.content == UNPREPARED else model.content)
    weights: float = cached(f"weights-{name}", count)
    return weights


def _measured_seconds(
    to_train: Sequence[Configuration], store: Store, device: str
) -> tuple[float, str, str] | None:
    """Return the seconds of all configurations by the mean of finished lanes of the same variant.

    A lane's seconds are its share of its trainer's time. They are taken as proportional to the number of
    training examples.

    Returns:
        The seconds of one trainer, the device of the lanes, and a phrase about them; None if no lane of the
        same task and model has finished on such a device.
    """
    runs = _read_runs(store)
    if runs is None:
        return None
    wanted = {(c.task.name, c.model.name) for c in to_train}
    runs = runs[[pair in wanted for pair in zip(runs["task"], runs["model"], strict=True)]]
    card = find_card(device)
    fits = [name == device or (card is not None and find_card(name) == card) for name in runs["device"]]
    if device:
        runs = runs[fits]
    elif any(runs["device"] != "cpu"):
        runs = runs[runs["device"] != "cpu"]
    if runs.empty:
        return None
    where = runs["device"].mode()[0]
    runs = runs[runs["device"] == where]
    by_task = runs.groupby(["task", "model"])["seconds_per_example"].mean()
    by_variant = runs.groupby(["task", "model", "variant"])["seconds_per_example"].mean()
    total, others, left_out = 0.0, dict[str, None](), dict[str, None]()
    for each in to_train:
        key: tuple[Any, ...] = (each.task.name, each.model.name)
        if key not in by_task.index:
            left_out[each.task.name] = None
            continue
        own = (*key, each.variant.name)
        if own not in by_variant.index:
            others[each.variant.name] = None
        mean = by_variant[own] if own in by_variant.index else by_task[key]
        total += _examples(each) * float(mean)
    source = f"from {len(runs)} lanes measured on {where}"
    source += f", none of {', '.join(others)} (taken as the others)" if others else ""
    source += f", without {', '.join(left_out)} (not measured)" if left_out else ""
    return total, where, source


def _read_runs(store: Store) -> pandas.DataFrame | None:
    """Return the finished lanes of the table that every report writes; None if there is no readable one."""
    path = store.root / PARQUET_FILE
    if not path.exists():
        return None
    import pandas

    columns = ["task", "model", "variant", "device", "state"]
    columns += ["steps", "batch_size", "accumulation", "seconds"]
    with suppress(OSError, ValueError, KeyError):  # another process replaces it, or it is damaged
        runs = pandas.read_parquet(path, columns=columns)
        runs = runs[runs["state"] == "finished"]
        examples = runs["steps"] * runs["batch_size"] * runs["accumulation"]
        return runs.assign(seconds_per_example=runs["seconds"] / examples)
    return None
