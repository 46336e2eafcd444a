"""Rental prices and peak speeds of GPUs, from `prices.json`, a small dated table. No network is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from orchestrator.util.errors import UsageError, suggest_nearest

DEFAULT_GPU = "H100"
"""The GPU of a prediction if neither --plan-gpu nor the machine names one."""


@dataclass(frozen=True)
class GpuPrice:
    """The peak speeds of a GPU, and its price per hour in USD: an AWS instance's, divided by its GPUs."""

    gpu: str
    """Ray's name of the GPU."""
    names: tuple[str, ...]
    """The names that torch and the driver use."""
    instance: str
    """AWS's name of the instance type."""
    count: int
    """The GPUs of the instance, which can only be rented as a whole."""
    spot: float
    """A typical spot price."""
    on_demand: float
    """The on-demand price."""
    date: str
    """The month of the on-demand price, YYYY-MM."""
    bf16_tflops: float | None
    """The peak of dense bfloat16 products in 1e12 operations per second; None if the GPU has no bfloat16."""
    tb_per_s: float
    """The peak of the memory in 1e12 bytes per second."""
    memory_gib: float
    """The memory that a program can use, in GiB."""
    region: str
    """The AWS region of both prices."""


@lru_cache(maxsize=1)
def load_prices() -> tuple[GpuPrice, ...]:
    """Return all rows of the table."""
    data = json.loads(Path(__file__).with_name("prices.json").read_text())
    return tuple(
        GpuPrice(**{**each, "names": tuple(each["names"]), "region": data["region"]}) for each in data["gpus"]
    )


def find_price(device: str) -> GpuPrice | None:
    """Return the row of the GPU with this name (torch's or Ray's, ignoring case); None if there is none.

    Similar names do not count: an H100 of another make has another price.
    """
    name = device.casefold()
    return next(
        (price for price in load_prices() if name in map(str.casefold, (price.gpu, *price.names))), None
    )


def require_price(option: str, gpu: str) -> GpuPrice:
    """Return the row of the price table for the GPU that the value of an option names.

    Args:
        option: The option, for the error message, such as `--plan-gpu`.
        gpu: Its value: the name of a GPU; see `find_price`.

    Raises:
        UsageError: The table has no such GPU.
    """
    if (found := find_price(gpu)) is None:
        known = suggest_nearest(gpu, [each.gpu for each in load_prices()])
        raise UsageError(f"{option} {gpu!r} is not in the table of GPUs. {known}")
    return found
