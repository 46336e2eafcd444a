"""The variants of the published study (arXiv 2601.22708): their names there and here, and their settings.

The data are in `orchestrator/published/variants.toml`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PUBLISHED_FOLDER = Path(__file__).parents[1] / "published"
"""The folder with the published scores, the variants and the presets."""


@dataclass(frozen=True)
class PublishedVariant:
    """One of the twenty variants of the published study."""

    title: str
    """Its published name, for example LoRA+."""
    name: str
    """Its name in this project, for example lora_plus. The variant may not exist here yet."""
    set: tuple[str, ...]
    """Its settings as published, as words of --set without the variant's name; empty if it has none."""
    published: str
    """Its settings as the paper states them."""
    differs: tuple[str, ...]
    """Sentences that say how the variant here differs from the published one."""


@cache
def read_variants() -> tuple[PublishedVariant, ...]:
    """Return the variants of the published study."""
    data = tomllib.loads((PUBLISHED_FOLDER / "variants.toml").read_text())
    return tuple(
        PublishedVariant(
            title,
            own["name"],
            tuple(own.get("set", ())),
            own["published"],
            tuple(own.get("differs", ())),
        )
        for title, own in data.items()
    )
