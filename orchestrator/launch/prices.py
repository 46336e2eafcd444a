"""What an hour of a GPU costs to rent: `prices.json`, a small dated table. No cloud is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class GpuPrice:
    """USD a GPU hour, of an AWS instance's hour divided by its GPUs."""

    gpu: str
    """As Ray names it."""
    names: tuple[str, ...]
    """As torch and the driver name it."""
    instance: str
    count: int
    """GPUs of the instance: it is paid whole."""
    spot: float
    """Typical."""
    on_demand: float
    date: str
    """The month of the on-demand price."""
    region: str


@lru_cache(maxsize=1)
def load_prices() -> tuple[GpuPrice, ...]:
    data = json.loads(Path(__file__).with_name("prices.json").read_text())
    return tuple(
        GpuPrice(**{**each, "names": tuple(each["names"]), "region": data["region"]}) for each in data["gpus"]
    )


def find_price(device: str) -> GpuPrice | None:
    """By torch's name or Ray's, exactly: an H100 of another make has another price."""
    return next((price for price in load_prices() if device in (price.gpu, *price.names)), None)
