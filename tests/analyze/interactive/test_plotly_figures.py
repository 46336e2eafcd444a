"""The interactive figures, and their compressed text in the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs
from synthetic import record, study, summarize_curves

from orchestrator.analyze.interactive import plotly_curves, plotly_style
from orchestrator.analyze.interactive.plotly_search import search_figures
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.record.study_file import AnalysisSettings, StudyFile


def decoded(text: str) -> str:
    return gzip.decompress(base64.b64decode(text)).decode()


def only_curves(summary: Summary) -> dict[str, Any]:
    (figure,) = plotly_curves.curve_figures(summary)
    content: dict[str, Any] = json.loads(figure.to_json())
    return content


def test_the_page_holds_plotly_and_the_figures_without_an_end_of_its_script_element() -> None:
    text = plotly_style.encoded_bundle()
    assert "<" not in text
    assert decoded(text) == get_plotlyjs()
    figures = plotly_curves.curve_figures(summarize_curves(study()))
    encoded = plotly_style.encode_figures({"curves": figures})
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
