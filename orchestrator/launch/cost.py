"""What is left of a study in GPU hours and in money: lines of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.launch import prices
from orchestrator.launch.estimate import TimeEstimate
from orchestrator.launch.prices import GpuPrice
from orchestrator.study import price
from orchestrator.study.options import StudyOptions

PRICE_DISCLAIMER = "check before you spend"


def cost_lines(
    estimates: Sequence[TimeEstimate], gpus_per_worker: float | None, device: str, options: StudyOptions
) -> list[tuple[str, str]]:
    """`gpus` of a worker, and the GPU it runs on, as far as they are known. Nothing for a study without."""
    estimates = [each for each in estimates if each.device != "cpu"]
    if gpus_per_worker == 0:
        return []
    if not estimates and gpus_per_worker is None:
        return [("GPU hours", "say --gpus-per-seat 1 if that cluster has GPUs, now or on demand")]
    if not estimates:
        return [("GPU hours", "unknown"), ("Price", _price_per_gpu_hour(device, options)[1])]
    lines = []
    for each in estimates:
        # A record does not say whether its seat had the GPU to itself: a share may cost less, or the same.
        low = each.low_seconds * options.workers_per_trainer * (gpus_per_worker or 1.0) / 3600
        high = each.high_seconds * options.workers_per_trainer / 3600
        early = "" if options.scheduler == "none" else ", less what early stopping saves"
        lines.append(("GPU hours", f"about {format_range(low, high)} on {each.device}{early}"))
        rates, text = _price_per_gpu_hour(each.device, options)
        if rates:
            text = f"about {format_range(low * rates[0], high * rates[1])} USD, at {text}"
        lines.append(("Price", text))
    return lines


def format_range(low: float, high: float) -> str:
    """Two digits: more would claim more than is known."""
    ends = dict.fromkeys(f"{float(f'{value:.2g}'):g}" for value in (low, high))
    return " to ".join(ends)


def _price_per_gpu_hour(device: str, options: StudyOptions) -> tuple[tuple[float, float] | None, str]:
    """USD a GPU hour, low and high, and in words; without a device the words are the whole table's range."""
    if options.price_per_gpu_hour is not None:
        given = price.parse_price(options.price_per_gpu_hour)
        return (
            given,
            f"{' to '.join(dict.fromkeys(f'{value:g}' for value in given))} USD a GPU hour, as given",
        )
    if not device:
        low = min(prices.load_prices(), key=lambda each: each.spot)
        high = max(prices.load_prices(), key=lambda each: each.on_demand)
        ends = f"{low.spot:.2f} ({low.gpu}, spot) to {high.on_demand:.2f} ({high.gpu}, on demand)"
        return None, f"{ends} USD a GPU hour, {_price_source(high)}"
    gpu_price = prices.find_price(device)
    if gpu_price is None:
        return None, f"unknown: the table has no {device}; say {price.OPTION} LOW:HIGH"
    whole = f" of {gpu_price.count} GPUs, paid whole" if gpu_price.count > 1 else ""
    ends = f"{gpu_price.spot:.2f} (spot) to {gpu_price.on_demand:.2f} (on demand)"
    return (
        gpu_price.spot,
        gpu_price.on_demand,
    ), f"{ends} USD a GPU hour, {gpu_price.instance}{whole}, {_price_source(gpu_price)}"


def _price_source(gpu_price: GpuPrice) -> str:
    return f"AWS {gpu_price.region} in {gpu_price.date}; {PRICE_DISCLAIMER}"
