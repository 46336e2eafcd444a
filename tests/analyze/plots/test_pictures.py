"""The static pictures."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from matplotlib import rcParams
from PIL import Image
from synthetic import STUDY, record, several_tasks, study, summarize_curves

from orchestrator.analyze.plots import curves, heatmap, spread, style
from orchestrator.record.schema import Record


@pytest.mark.parametrize(
    "records",
    [
        [record(validation=None, state="failed")],
        [record()],
        study(),
        several_tasks(),
        study({f"{k}{i}": v for k, v in STUDY.items() for i in ("", "-b")}),
    ],
    ids=["only failed", "one run", "study", "two tasks", "ten variants"],
)
def test_pictures_are_1200_wide_and_not_empty(records: list[Record]) -> None:
    before = dict(rcParams)
    summary = summarize_curves(records)
    for draw in (curves.draw_curves, heatmap.draw_heatmap, spread.draw_spread):
        png, svg = style.render(lambda draw=draw: draw(summary))  # type: ignore[misc]
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.width == 1200
        assert image.height >= 200
        assert len(image.getcolors(1 << 24) or []) > 1
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert dict(rcParams) == before
