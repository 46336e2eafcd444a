"""The interactive figures, and their compressed text in the page."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from synthetic import RATES, STUDY, record, study, summarize_curves

from orchestrator.analyze.interactive import plotly_bundle, plotly_costs, plotly_curves, plotly_style
from orchestrator.analyze.interactive.plotly_search import search_figures
from orchestrator.analyze.interactive.plotly_spread import spread_figures
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.record.schema import Cost
from orchestrator.record.study_file import AnalysisSettings, StudyFile


def decoded(text: str) -> str:
    return gzip.decompress(base64.b85decode(text.replace(",", "<"))).decode()


def only_curves(summary: Summary) -> dict[str, Any]:
    (figure,) = plotly_curves.curve_figures(summary)
    content: dict[str, Any] = json.loads(figure.to_json())
    return content


def test_the_page_holds_plotly_and_the_figures_without_an_end_of_its_script_element() -> None:
    text = plotly_bundle.encoded_bundle()
    assert "<" not in text
    assert decoded(text) == get_plotlyjs()
    figures = plotly_curves.curve_figures(summarize_curves(study()))
    encoded = plotly_bundle.encode_figures({"curves": figures})
    (found,) = json.loads(decoded(encoded))["curves"]
    assert found == json.loads(figures[0].to_json())


def test_every_run_can_be_hovered_over_with_variant_rate_seed_score_and_fingerprint() -> None:
    records = study()
    traces = only_curves(summarize_curves(records))["data"]
    points = {
        (fingerprint, text)
        for trace in traces
        if "customdata" in trace
        for fingerprint, text in zip(trace["customdata"], trace["text"], strict=True)
    }
    assert {fingerprint for fingerprint, _ in points} == {r.fingerprint[:16] for r in records}
    (run,) = (r for r in records if r.configuration.variant.name == "pissa" and r.score("validation") == 0.65)
    (text,) = (text for fingerprint, text in points if run.fingerprint.startswith(fingerprint))
    for part in ("pissa", "1e-2", "seed 0", "finished", "0.650", run.fingerprint[:12]):
        assert part in text


def test_collapsed_and_diverged_runs_have_marks_of_their_own_and_cliffs_are_dashed() -> None:
    traces = only_curves(summarize_curves(study()))["data"]
    symbols = {s for t in traces if "customdata" in t for s in t["marker"]["symbol"]}
    assert symbols == {"circle", "triangle-down-open", "x-thin-open"}
    dashed = [t for t in traces if t["mode"] == "lines" and t["line"].get("dash") == "dash"]
    assert {t["legendgroup"] for t in dashed} == set(STUDY)


def test_a_flat_curve_has_no_best_rate() -> None:
    records = [record("lora", rate, seed, 0.5) for rate in RATES for seed in range(2)]
    summary = summarize_curves(records)
    assert summary.panels[0].curves[0].bracketed == "both edges"
    traces = only_curves(summary)["data"]
    (means,) = (t for t in traces if t["mode"] == "markers" and "error_y" in t)
    assert set(means["marker"]["size"]) == {8}
    assert not any("its best rate" in text for text in means["text"])


def test_the_tops_repeat_the_whole_and_one_click_in_the_legend_hides_a_curve_in_both() -> None:
    content = only_curves(summarize_curves(study()))
    whole = [t for t in content["data"] if t.get("yaxis") != "y2"]
    tops = [t for t in content["data"] if t.get("yaxis") == "y2"]
    assert [t["y"] for t in whole] == [t["y"] for t in tops]
    assert [t["legendgroup"] for t in whole] == [t["legendgroup"] for t in tops]
    layout = content["layout"]
    assert layout["yaxis2"]["range"][0] > layout["yaxis"]["range"][0]
    narrow = layout["meta"]["narrow"]
    assert narrow["yaxis"]["domain"][0] > narrow["yaxis2"]["domain"][1]  # one below the other


def test_of_many_curves_the_best_and_lora_are_shown_at_first() -> None:
    records = [
        record(f"v{i:02}" if i else "lora", rate, 0, (0.3 + 0.04 * i) * share)
        for i in range(12)
        for rate, share in zip(RATES, (0.5, 1.0, 0.2), strict=False)
    ]
    traces = only_curves(summarize_curves(records))["data"]
    shown = {t["legendgroup"] for t in traces if t["visible"] is True}
    assert shown == {"lora", *(f"v{i:02}" for i in range(4, 12))}


def test_the_heat_map_has_the_mean_of_each_variant_and_rate() -> None:
    summary = summarize_curves(study())
    (figure,) = plotly_curves.heatmap_figures(summary)
    content = json.loads(figure.to_json())
    (cells,) = content["data"]
    row = cells["z"][cells["y"].index("hira")]
    assert [round(score, 3) for score in row] == [0, 0, 0, 0, 0.263, 0.953, 0]
    assert cells["text"][cells["y"].index("lora")][4] == "0.00 ▽3 /3"
    assert len(content["layout"]["shapes"]) == len(STUDY)  # a frame around each best rate


@pytest.mark.parametrize(("rates", "is_shown"), [(11, True), (13, False)])
def test_the_cells_of_a_heat_map_have_numbers_as_far_as_they_fit(rates: int, is_shown: bool) -> None:
    records = [record("lora", 1e-4 * 2**i, 0, 0.5 + 0.01 * i) for i in range(rates)]
    (figure,) = plotly_curves.heatmap_figures(summarize_curves(records))
    (cells,) = json.loads(figure.to_json())["data"]
    assert ("text" in cells) == ("texttemplate" in cells) == is_shown


def test_the_spread_joins_the_common_rate_and_the_own_one() -> None:
    (figure,) = spread_figures(summarize_curves(study()))
    dumbbells = [t for t in json.loads(figure.to_json())["data"] if t["mode"] == "lines+markers"]
    assert {t["y"][0] for t in dumbbells} == set(STUDY)
    (hira,) = (t for t in dumbbells if t["y"][0] == "hira")
    assert hira["x"][0] == 0
    assert hira["x"][1] > 0.9


def test_the_front_is_drawn_for_each_cost() -> None:
    rows = summarize_curves(study()).costs
    assert plotly_costs.cost_figures(rows)[0].data == ()  # the synthetic records have no cost


def test_each_cost_has_an_axis_with_room_for_the_names_at_its_right() -> None:
    records = [
        replace(record(variant, 1e-2, 0, score), cost=Cost(seconds, 0.5, 100, parameters, 10**9))
        for variant, score, seconds, parameters in (("lora", 0.9, 4.0, 1000), ("dora", 0.8, 8.0, 5000))
    ]
    (figure,) = plotly_costs.cost_figures(summarize_curves(records).costs)
    layout = json.loads(figure.to_json())["layout"]
    buttons = layout["updatemenus"][0]["buttons"]
    ranges = [button["args"][1]["xaxis.range"] for button in buttons]
    assert ranges[0] == layout["xaxis"]["range"]
    for (_, high), largest in zip(ranges, (8, 5000, 1), strict=True):
        assert high >= math.log10(largest) + 0.1


def test_the_script_knows_every_color_that_follows_the_page() -> None:
    script = resources.files("orchestrator.analyze").joinpath("templates/page.js.jinja").read_text()
    known = set(re.findall(r"#[0-9a-f]{6}", script))
    assert known == {plotly_style.INK, plotly_style.SOFT, plotly_style.LINE, plotly_style.PAPER}


def test_the_points_of_a_search_show_their_settings_and_state() -> None:
    records = [
        record("lora", 1e-3, 0, 0.9, rank=4),
        record("lora", 1e-2, 0, 0.3, rank=8, state="stopped"),
        record("lora", 1e-1, 0, None, rank=8),
    ]
    study_file = StudyFile("search", "", "run", settings=AnalysisSettings(kind="search"))
    (figure,) = search_figures(summarize(study_file, records).searches)
    points, best = json.loads(figure.to_json())["data"]
    assert set(points["customdata"]) == {r.fingerprint[:16] for r in records}
    by_text = dict(
        zip(points["text"], zip(points["y"], points["marker"]["symbol"], strict=True), strict=True)
    )
    found = {text.split("</b> ")[1].split("<br>")[0]: mark for text, mark in by_text.items()}
    assert found == {
        "1e-3, rank 4: finished": (0.9, "circle"),
        "1e-2, rank 8: stopped": (0.3, "circle-open"),
        "1e-1, rank 8: diverged": (0.0, "x-thin-open"),
    }
    assert best["y"][-1] == 0.9


def test_a_point_of_a_search_with_a_finished_seed_has_its_mean_and_no_cross() -> None:
    records = [record("lora", 1e-2, seed, score) for seed, score in ((0, 0.7), (1, None))]
    study_file = StudyFile("search", "", "run", settings=AnalysisSettings(kind="search"))
    (figure,) = search_figures(summarize(study_file, records).searches)
    points, _ = json.loads(figure.to_json())["data"]
    assert (points["y"], points["marker"]["symbol"]) == ([0.35], ["circle"]), "diverged counts as the floor"
