"""The static pictures."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from matplotlib import rcParams
from matplotlib.text import Annotation, Text
from PIL import Image
from synthetic import STUDY, record, several_tasks, study, summarize_curves

from orchestrator.analyze.costs import CostRow
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.plots import cost_scatter, curves, heatmap, spread, style
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


def test_lora_is_black_and_no_two_of_eight_variants_look_alike() -> None:
    records = [record(v) for v in ("adalora", "dora", "hira", "lora", "miss", "olora", "pissa", "rslora")]
    styles = style.curve_styles(summarize_curves(records))
    assert styles["lora"].color == "#000000"
    assert (
        len({each.color for each in styles.values()}) == len({each.marker for each in styles.values()}) == 8
    )


def test_no_two_of_twenty_variants_look_alike_and_only_lora_is_black() -> None:
    styles = style.styles_by_label(["lora", *(f"v{i:02}" for i in range(19))])
    assert len(set(styles.values())) == 20
    assert [label for label, look in styles.items() if look.color == "#000000"] == ["lora"]


def test_rates_that_look_the_same_are_written_once() -> None:
    assert style.rates_text((3e-4, 5e-4)) == "3e-4 to 5e-4"
    assert style.rates_text((1e-3, 1.0001e-3)) == "1e-3"


@pytest.mark.parametrize("ratio", [1, 1.1, 6, 19, 1000])
def test_no_name_and_no_tick_label_of_the_costs_covers_another(ratio: float) -> None:
    """The scores lie close together, and the largest cost is `ratio` times the smallest."""
    names = ("adalora", "dora", "hira", "lora", "miss", "olora", "pissa", "rslora")
    rows = [
        CostRow(
            *("letters", "base", name, "letters on base", name),
            runs=3,
            train_seconds=1.5 * ratio ** (i / 7),
            evaluate_seconds=0.1,
            peak_memory=round(650_000_000 * ratio ** (i / 7)),
            trainable_parameters=round(39_200 * ratio ** (i / 7)),
            study_seconds=9.0,
            score=Estimate(3, 0.9 + 0.001 * i),
        )
        for i, name in enumerate(names)
    ]
    figure = cost_scatter.draw_costs(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(each) for each in axes.texts if isinstance(each, Annotation)]
        assert len(boxes) == len(names)
        low, high = axes.get_xlim()
        ticks = [
            label.get_window_extent()
            for value, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if low <= value <= high
        ]
        assert len(ticks) >= 2
        for texts in (boxes, ticks):
            assert not any(box.count_overlaps(texts[:i]) for i, box in enumerate(texts))
