"""The GPU hours and the price of the remaining training, as lines of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.launch import prices
from orchestrator.launch.decoder_shape import PredictionError
from orchestrator.launch.estimate import TimeEstimate
from orchestrator.launch.prediction import Prediction, predict
from orchestrator.launch.prices import GpuPrice
from orchestrator.study import price
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

PRICE_DISCLAIMER = "check before you spend"


def cost_lines(
    estimates: Sequence[TimeEstimate], gpus_per_worker: float | None, device: str, options: StudyOptions
) -> list[tuple[str, str]]:
    """Describe the GPU hours and the price of a study.

    Args:
        estimates: The estimated time on each kind of device.
        gpus_per_worker: GPUs of a trainer's worker; None if the cluster decides.
        device: The name of the GPU; empty if it is not known.
        options: The options of the study.

    Returns:
        Pairs of a label and a text; none for a study without GPUs.
    """
    if gpus_per_worker == 0:
        return []
    estimates = [each for each in estimates if each.device != "cpu"]
    if not estimates and gpus_per_worker is None:
        return [("GPU hours", "say --gpus-per-worker 1 if that cluster has GPUs, now or on demand")]
    if not estimates:
        return [("GPU hours", "unknown"), ("Price", _price_per_gpu_hour(device, options)[1])]
    lines = []
    for estimate in estimates:
        # A record does not say whether its trainer had the GPU to itself. A trainer that shares one may cost
        # that share, or as much as with a GPU of its own.
        low = estimate.low_seconds * options.workers_per_trainer * (gpus_per_worker or 1.0) / 3600
        high = estimate.high_seconds * options.workers_per_trainer / 3600
        text = f"about {format_range(low, high)} on {estimate.device}{_early_stopping(options)}"
        lines.append(("GPU hours", text))
        ends, text = _price_per_gpu_hour(estimate.device, options)
        if ends:
            text = f"about {format_range(low * ends[0], high * ends[1])} USD, at {text}"
        lines.append(("Price", text))
    return lines


def predict_lines(
    pending: Sequence[Configuration], bases: Path, device: str, lanes: int, options: StudyOptions
) -> list[tuple[str, str]]:
    """Describe the predicted GPU hours and price of a study for which nothing has been measured.

    Args:
        pending: The configurations to train.
        bases: The store's folder of base models.
        device: The name of the GPU; empty if it is not known.
        lanes: The number of lanes per trainer.
        options: The options of the study.

    Returns:
        Pairs of a label and a text.

    Raises:
        PredictionError: Nothing can be predicted.
    """
    gpu = prices.find_price(device or prices.DEFAULT_GPU)
    if gpu is None:
        raise PredictionError(f"the table of GPUs has no {device}")
    found, fused = (
        predict(pending, bases, gpu, lanes, kernels, options.gradient_checkpointing)
        for kernels in (options.kernels, "liger")
    )
    text = f"predicted: {_format_hours(found)} on one {gpu.gpu}"
    if options.kernels != "liger":
        text += f", {_format_hours(fused)} with --kernels liger"
    part = ""
    if found.excluded:
        without = ", ".join(found.excluded)
        part = f" for {found.num_included} of {len(pending)} configurations, without {without}"
    text += part + _early_stopping(options)
    source = (
        f"calculated from counts of kernels and bytes and the {gpu.gpu}'s peak speeds, for rows of "
        f"{float(f'{found.row_tokens:.2g}'):g} tokens on average; nothing was measured (docs/performance.md)"
    )
    if found.excluded:
        own = "its" if len(found.excluded) == 1 else "their"
        source += f"; does not include {', '.join(found.excluded)}: {own} kernels have not been counted"
    if not device:
        source += "; --plan-gpu names another GPU"
    lines = [("GPU hours", text), ("Prediction", source)]
    ends, price_text = _price_per_gpu_hour(gpu.gpu, options)
    if ends:
        low, high = (seconds / 3600 * each for seconds, each in zip(found.range_seconds, ends, strict=True))
        lines.append(("Price", f"predicted: {format_range(low, high)} USD{part}, at {price_text}"))
    return lines


def _early_stopping(options: StudyOptions) -> str:
    return "" if options.scheduler == "none" else ", less what early stopping saves"


def _format_hours(prediction: Prediction) -> str:
    low, high = prediction.range_seconds
    return format_range(low / 3600, high / 3600)


def format_range(low: float, high: float) -> str:
    """Format a range with two significant digits, which is all that an estimate is worth."""
    ends = dict.fromkeys(f"{float(f'{value:.2g}'):g}" for value in (low, high))
    return " to ".join(ends)


def _price_per_gpu_hour(device: str, options: StudyOptions) -> tuple[tuple[float, float] | None, str]:
    """Return the lowest and the highest price of a GPU hour in USD, if known, and both in words.

    Without a device the words give the range of the whole table.
    """
    if options.price_per_gpu_hour is not None:
        given = price.parse_price(options.price_per_gpu_hour)
        text = " to ".join(dict.fromkeys(f"{value:g}" for value in given))
        return given, f"{text} USD a GPU hour, as given"
    if not device:
        low = min(prices.load_prices(), key=lambda each: each.spot)
        high = max(prices.load_prices(), key=lambda each: each.on_demand)
        text = f"{low.spot:.2f} ({low.gpu}, spot) to {high.on_demand:.2f} ({high.gpu}, on demand)"
        return None, f"{text} USD a GPU hour, {_price_source(high)}"
    found = prices.find_price(device)
    if found is None:
        return None, f"unknown: the table has no {device}; say {price.OPTION} LOW:HIGH"
    whole = f" of {found.count} GPUs, paid whole" if found.count > 1 else ""
    text = f"{found.spot:.2f} (spot) to {found.on_demand:.2f} (on demand) USD a GPU hour"
    return (found.spot, found.on_demand), f"{text}, {found.instance}{whole}, {_price_source(found)}"


def _price_source(gpu_price: GpuPrice) -> str:
    return f"AWS {gpu_price.region} in {gpu_price.date}; {PRICE_DISCLAIMER}"
