"""plotly.js as it is embedded in a report, and the figures, as text that a browser inflates.

plotly.js is that of the installed Python package. Compressed it takes 2 MB of a report, uncompressed 5 MB.
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
    """Return plotly.js, compressed with gzip, in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def encode_figures(figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return figures as JSON, compressed with gzip, in base64.

    Args:
        figures: Name of a picture -> the figures that replace it.
    """
    data = {name: [json.loads(figure.to_json()) for figure in own] for name, own in figures.items()}
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
