"""Compressed text encoding of plotly.js and of the interactive figures, for a page that loads nothing.

plotly.js comes from the installed Python package. It has 5 MB, and 1.8 MB in this encoding.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@cache
def encoded_bundle() -> str:
    """Return plotly.js, encoded by `encode`."""
    from plotly.offline import get_plotlyjs

    return encode(get_plotlyjs())


def encode_figures(figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return figures as a JSON object, encoded by `encode`.

    Args:
        figures: Name of a picture -> the interactive figures that replace it in the page.
    """
    data = {name: [json.loads(figure.to_json()) for figure in own] for name, own in figures.items()}
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    return encode(text)


def encode(text: str) -> str:
    """Compress a text with gzip and encode it in base 85, whose output is 6 % smaller than that of base 64.

    A comma replaces "<", because "</script" or "<!--" would change where the script element with the result
    ends. `templates/page.js.jinja` decodes the result.
    """
    return base64.b85encode(gzip.compress(text.encode(), mtime=0)).decode().replace("<", ",")
