"""PEFT's RoAd in the form with the most angles."""

from __future__ import annotations

from parity import Reference
from peft import RoadConfig

REFERENCE = Reference(
    lambda targets: RoadConfig(variant="road_4", group_size=8, target_modules=targets),
    {"road_theta": "theta", "road_alpha": "scale"},
    extra={"form": "road_4", "group_size": 8},
    models=("llama",),
)
