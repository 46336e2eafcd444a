"""plotly.js as it is embedded in a report, and the figures, as text that a browser inflates.

The file beside this module is plotly.js 4.1.1 in its `cartesian` bundle (scatter, bar, heat map), MIT
license, as the npm package plotly.js-cartesian-dist-min has it. The Python package has only the bundle of all
traces, with which each report would be 2.0 MB large instead of 0.7 MB. For a newer version: `npm pack
plotly.js-cartesian-dist-min`, then `gzip -9n` of the .min.js in it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_BUNDLE = "plotly-cartesian.min.js.gz"


def encoded_bundle() -> str:
    """Return plotly.js, compressed with gzip, in base64."""
    return base64.b64encode(resources.files(__package__).joinpath(_BUNDLE).read_bytes()).decode()


def encode_figures(figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return figures as JSON, compressed with gzip, in base64.

    Args:
        figures: Name of a picture -> the figures that replace it.
    """
    data = {name: [json.loads(figure.to_json()) for figure in own] for name, own in figures.items()}
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
