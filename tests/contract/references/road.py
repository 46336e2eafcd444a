"""PEFT's RoAd: the form with the most angles, and the other two forms."""

from __future__ import annotations

from parity import Reference
from peft import RoadConfig


def _reference(form: str, group_size: int) -> Reference:
    return Reference(
        lambda targets: RoadConfig(variant=form, group_size=group_size, target_modules=targets),
        {"road_theta": "theta", "road_alpha": "scale"},
        extra={"form": form, "group_size": group_size},
        models=("llama",),
    )


REFERENCE = _reference("road_4", 8)
OTHER_SETTINGS = {form: _reference(form, size) for form, size in (("road_1", 2), ("road_2", 8))}
