"""The variants of the published study (arXiv 2601.22708) with their settings, from `variants.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PUBLISHED_FOLDER = Path(__file__).parents[1] / "published"
"""Folder of the published scores, `variants.toml` and the presets."""


@dataclass(frozen=True)
class PublishedVariant:
    """One of the twenty variants of the published study."""

    title: str
    """The published name, for example LoRA+."""
    name: str
    """The name in this project, for example lora_plus. The variant may not exist in this project yet."""
    set: tuple[str, ...]
    """The published settings as NAME=VALUE words, without the name of the variant; may be empty."""
    published: str
    """The published settings in the paper's words."""
    differs: tuple[str, ...]
    """Differences of this project's variant from the published one, one sentence each."""


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
