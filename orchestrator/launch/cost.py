"""What is left of a study in GPU hours and in money: lines of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.launch import prices
from orchestrator.launch.estimate import Estimate
from orchestrator.launch.prices import Price
from orchestrator.study import price
from orchestrator.study.options import StudyOptions

CHECK = "check before you spend"


def lines(
    found: Sequence[Estimate], gpus: float | None, device: str, options: StudyOptions
) -> list[tuple[str, str]]:
    """`gpus` of a worker, and the GPU it runs on, as far as they are known. Nothing for a study without."""
    found = [each for each in found if each.device != "cpu"]
    if gpus == 0:
        return []
    if not found and gpus is None:
        return [("GPU hours", "say --gpus-per-seat 1 if that cluster has GPUs, now or on demand")]
    if not found:
        return [("GPU hours", "unknown"), ("Price", _rate(device, options)[1])]
    said = []
    for each in found:
        # A record does not say whether its seat had the GPU to itself: a share may cost less, or the same.
        low = each.low * options.workers_per_seat * (gpus or 1.0) / 3600
        high = each.high * options.workers_per_seat / 3600
        early = "" if options.scheduler == "none" else ", less what early stopping saves"
        said.append(("GPU hours", f"about {between(low, high)} on {each.device}{early}"))
        rates, text = _rate(each.device, options)
        if rates:
            text = f"about {between(low * rates[0], high * rates[1])} USD, at {text}"
        said.append(("Price", text))
    return said


def between(low: float, high: float) -> str:
    """Two digits: more would claim more than is known."""
    ends = dict.fromkeys(f"{float(f'{value:.2g}'):g}" for value in (low, high))
    return " to ".join(ends)


def _rate(device: str, options: StudyOptions) -> tuple[tuple[float, float] | None, str]:
    """USD a GPU hour, low and high, and in words; without a device the words are the whole table's range."""
    if options.price_per_gpu_hour is not None:
        given = price.parse(options.price_per_gpu_hour)
        return (
            given,
            f"{' to '.join(dict.fromkeys(f'{value:g}' for value in given))} USD a GPU hour, as given",
        )
    if not device:
        low = min(prices.table(), key=lambda each: each.spot)
        high = max(prices.table(), key=lambda each: each.on_demand)
        ends = f"{low.spot:.2f} ({low.gpu}, spot) to {high.on_demand:.2f} ({high.gpu}, on demand)"
        return None, f"{ends} USD a GPU hour, {_source(high)}"
    found = prices.of(device)
    if found is None:
        return None, f"unknown: the table has no {device}; say {price.OPTION} LOW:HIGH"
    whole = f" of {found.count} GPUs, paid whole" if found.count > 1 else ""
    ends = f"{found.spot:.2f} (spot) to {found.on_demand:.2f} (on demand)"
    return (found.spot, found.on_demand), f"{ends} USD a GPU hour, {found.instance}{whole}, {_source(found)}"


def _source(found: Price) -> str:
    return f"AWS {found.region} in {found.date}; {CHECK}"
