"""The taxonomy of LoRA variants and other PEFT methods, from `taxonomy.toml`.

The taxonomy has every method that section II of the survey (He et al. 2026, arXiv 2601.22708) names, every
method of the survey's own code, and every method of the PEFT library. This module does not import torch.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TAXONOMY_FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Method:
    """A published method, with its entry in the catalogue or the reason why there is none."""

    title: str
    axis: str
    """The axis of the survey's taxonomy, and the folder of the entry if there is one."""
    leaf: str
    """The part of the axis; "other" if section II of the survey does not place the method."""
    paper: str
    """arXiv number, OpenReview id, DOI or venue; empty if the method has no paper."""
    variant: str = ""
    """The name of the entry in the catalogue; empty if there is none."""
    reason: str = ""
    """Why there is no entry; empty if there is one."""
    also: tuple[str, ...] = ()
    """Other places where the survey names the method, each as "axis.leaf"."""
    survey_code: bool = False
    """Whether the survey's own code has the method."""
    evaluated: bool = False
    """Whether the method is one of the twenty that the survey trained."""
    peft: str = ""
    """The method's `PeftType` in the PEFT library; empty if PEFT does not have it."""


@cache
def read_methods() -> tuple[Method, ...]:
    """Return all methods in the order of the file, which is sorted by axis and leaf."""
    axes = tomllib.loads(TAXONOMY_FILE.read_text())
    return tuple(
        Method(title, axis, leaf, **{**fields, "also": tuple(fields.get("also", ()))})
        for axis, leaves in axes.items()
        for leaf, methods in leaves.items()
        for title, fields in methods.items()
    )
