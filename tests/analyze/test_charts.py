from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert

from orchestrator.analyze import chart_style, charts, formatting
from orchestrator.analyze.chart_style import PHONE, WIDE, Chart, specification, theme

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = 3
LABELS = {"usable": "finished", **{name: name for name in ("collapsed", "diverged", "stopped", "failed")}}
PANEL = {
    "panel": "letters on tiny-llama (steps=120)",
    "reference": "lora",
    "axis": "validation score",
    "untrained_validation": 0.01,
    "common_rate": 1e-2,
    "common_label": "LoRA's best rate",
    "floor": 0.0,
}
PEAKS = {"lora": 1e-2, "rslora": 5e-3, "hira": 8e-2, "pissa": 3e-3}
MANY = {**PEAKS, **{f"variant_{i} ratio={i}": 10 ** (-3 + i / 6) for i in range(10)}}
FINGERPRINT = "{:04d}b1c2d3e4f5a6b7c8d9e0"


def make_runs(peaks: dict[str, float]) -> pd.DataFrame:
    """Return the runs of three seeds at each learning rate of each curve.

    The score has a peak at the rate that `peaks` gives. More than 0.6 decades above this rate the runs
    collapse, and more than 1.3 decades above it they diverge.
    """
    generator, rows = np.random.default_rng(0), []
    for curve, peak in peaks.items():
        for rate in RATES:
            for seed in range(SEEDS):
                away = math.log10(rate / peak)
                score = (0.97 - 0.02 * (len(curve) % 3)) * math.exp(-2.2 * away**2)
                score = min(1.0, max(0.0, score + 0.03 * generator.standard_normal()))
                label = "diverged" if away > 1.3 else "collapsed" if away > 0.6 else "finished"
                score = {"diverged": math.nan, "collapsed": 0.0}.get(label, score)
                drawn = 0.0 if label == "diverged" else score
                fingerprint = FINGERPRINT.format(len(rows))
                rows.append((curve, rate, seed, label, score, score - 0.01, drawn, fingerprint))
    columns = ["curve", "learning_rate", "seed", "label", "validation_score", "test_score", "drawn_score"]
    return pd.DataFrame(rows, columns=[*columns, "fingerprint"])


def make_points(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (curve, rate), own in runs.groupby(["curve", "learning_rate"]):
        counts = {name: int((own["label"] == LABELS[name]).sum()) for name in LABELS}
        mean, half = own["drawn_score"].mean(), 2.5 * own["drawn_score"].std()
        low, high = (max(0, mean - half), min(1, mean + half)) if half else (math.nan, math.nan)
        scores = {"validation_score": mean, "validation_score_low": low, "validation_score_high": high}
        tests = {name.replace("validation", "test"): value - 0.01 for name, value in scores.items()}
        rows.append({"curve": curve, "learning_rate": rate, "eligible": True, **counts, **scores, **tests})
    return pd.DataFrame(rows)


def make_best(points: pd.DataFrame) -> pd.DataFrame:
    best = points.loc[points.groupby("curve")["validation_score"].idxmax()]
    common = points[points["learning_rate"] == PANEL["common_rate"]].set_index("curve")["test_score"]
    best = best.assign(
        variant=best["curve"], test_at_common_rate=best["curve"].map(common), usable=3, ended=4
    )
    return best.sort_values("validation_score", ascending=False).reset_index(drop=True)


RUNS = make_runs(PEAKS)
POINTS = make_points(RUNS)
BEST = make_best(POINTS)
MANY_RUNS = make_runs(MANY)
MANY_POINTS = make_points(MANY_RUNS)
MANY_BEST = make_best(MANY_POINTS)


def make_comparison() -> pd.DataFrame:
    rows = [
        ("lora", "baseline", 0.0, math.nan, math.nan, ""),
        ("pissa", "variant", 0.031, 0.012, 0.050, "better"),
        ("rslora", "variant", 0.002, -0.006, 0.009, "equivalent"),
        ("dora", "variant", 0.006, -0.004, 0.016, "not inferior"),
        ("hira magnitude=rows", "variant", -0.020, -0.055, 0.015, "undecided"),
        ("full", "control", -0.040, -0.062, -0.018, "worse"),
        ("broken", "variant", -0.930, -0.990, -0.870, "worse"),
    ]
    columns = ["variant", "role", "difference", "difference_low", "difference_high", "outcome"]
    table = pd.DataFrame(rows, columns=columns)
    scores = 0.9 + table["difference"]
    return table.assign(
        test_score=scores, test_score_low=scores - 0.01, test_score_high=scores + 0.01, pairs=5
    )


def make_pooled() -> tuple[pd.DataFrame, pd.DataFrame]:
    generator = np.random.default_rng(1)
    pooled, chosen = [], []
    for variant, peak in PEAKS.items():
        for rate in (10 ** (-4 + i / 4) for i in range(13)):
            score = 0.95 * math.exp(-0.9 * math.log10(rate / peak) ** 2) + 0.01 * generator.standard_normal()
            pooled.append((variant, rate, score, 5))
        for replicate in range(5):
            chosen.append((variant, replicate, peak * 10 ** (0.15 * generator.standard_normal())))
    names = ["variant", "learning_rate", "validation_score", "runs"]
    return pd.DataFrame(pooled, columns=names), pd.DataFrame(
        chosen, columns=["variant", "replicate", "learning_rate"]
    )


def make_factors() -> pd.DataFrame:
    generator, rows = np.random.default_rng(2), []
    for variant in ("lora", "dora", "lora_plus"):
        for title, loss in (("learning rate", 0.3), ("alpha", 0.2), ("rank", 0.03), ("warmup", 0.005)):
            a, b = loss * (1 + 0.2 * generator.standard_normal()), 0.1 * loss
            row = {"panel": PANEL["panel"], "variant": variant, "title": title, "alias": title == "alpha"}
            row |= {"misset": a, "misset_low": a - 0.02, "misset_high": a + 0.02, "usable": 20, "ended": 22}
            b = math.nan if title == "learning rate" else b
            rows.append({**row, "retuned": b, "retuned_low": b - 0.01, "retuned_high": b + 0.01})
    return pd.DataFrame(rows)


def make_search() -> tuple[pd.DataFrame, pd.DataFrame]:
    generator, rows = np.random.default_rng(3), []
    for curve in ("lora", "dora", "pissa"):
        for order in range(1, 25):
            rate = 10 ** generator.uniform(-4, -0.5)
            kind = "diverged" if rate > 0.1 else "stopped" if order % 5 == 0 else "finished"
            score = 0.9 * math.exp(-1.2 * (math.log10(rate) + 2.2) ** 2) + 0.03 * generator.standard_normal()
            score = math.nan if kind == "diverged" else max(0.0, score)
            counts = {name: int(label == kind) for name, label in LABELS.items()}
            text = f"learning_rate={rate:.2e}, rank={2 ** generator.integers(1, 6)}"
            row = {"curve": curve, "learning_rate": rate, "order": order, "settings": text, **counts}
            rows.append({**row, "validation_score": score, "eligible": kind == "finished"})
    points = pd.DataFrame(rows)
    eligible = points[points["eligible"]]
    best = eligible.loc[eligible.groupby("curve")["validation_score"].idxmax()]
    return points, best


def make_costs(names: tuple[str, ...]) -> pd.DataFrame:
    generator = np.random.default_rng(4)
    seconds = 50 * (1 + generator.random(len(names)))
    rows = {
        "curve": names,
        "train_seconds": seconds,
        "trainable_parameters": 2 ** np.arange(len(names)) * 10_000,
    }
    score = 0.9 + 0.05 * generator.random(len(names))
    table = pd.DataFrame({"panel": PANEL["panel"], **rows, "peak_memory": 0, "test_score": score})
    return table.assign(peak_memory=4e9 + 1e7 * seconds)


def make_losses(curves: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for curve in curves:
        for role, rate in (("best", 1e-2), ("lower", 3e-3), ("higher", 3e-2)):
            for step in range(1, 121, 3):
                loss = (
                    2.5 * math.exp(-step * rate * 3) + 0.2 + (30.0 if role == "higher" and step > 90 else 0)
                )
                rows.append((PANEL["panel"], curve, role, rate, step, loss))
    names = ["panel", "curve", "role", "learning_rate", "step", "loss"]
    return pd.DataFrame(rows, columns=names)


def make_published() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [
        {"curve": curve, "learning_rate": rate, "validation_score": 100 * score, "source": source}
        for source, factor in (("survey", 1.0), ("here", 0.97))
        for curve, peak in (("lora", 1e-4), ("pissa", 3e-5), ("dora", 2e-4))
        for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
        if (score := factor * (0.8 - 0.1 * math.log10(rate / peak) ** 2))
    ]
    points = pd.DataFrame(rows)
    best = points.loc[points.groupby("curve")["validation_score"].idxmax()]
    return points, best.sort_values("validation_score", ascending=False)


def make_transfer(is_number: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames `transfer` and `transfer_levels` of three curves, one with a published slope."""
    curves, levels = [], []
    for i, curve in enumerate(("lora", "lora, alpha/rank constant", "rslora")):
        slope, known = (-0.5 * i, -0.5 if i == 1 else math.nan) if is_number else (math.nan, math.nan)
        row = {"curve": curve, "title": "rank", "slope": slope, "known_slope": known, "log10_rate_at_1": -2.0}
        curves.append(row)
        for rank in (2, 4, 8):
            best = 1e-2 * rank ** (-0.5 * i)
            ends = {"best_rate_low": best / 2, "best_rate_high": math.nan if i else best * 2}
            shape = {"rates": [1e-3, 1e-2, 1e-1], "quality": [0.2, 0.9, 0.1]}
            left_out = "best at the lowest rate" if (i, rank) == (2, 8) else ""
            place = {"curve": curve, "level": str(rank), "position": rank if is_number else math.nan}
            levels.append({**place, "best_rate": best, **ends, **shape, "left_out": left_out})
    return pd.DataFrame(curves), pd.DataFrame(levels)


PUBLISHED_PANEL = {**PANEL, "axis": "score in points", "untrained_validation": math.nan}
NO_RUNS = RUNS.iloc[:0]
ALL: dict[str, Callable[[], Chart]] = {
    "score-curves": lambda: charts.score_curves(PANEL, POINTS, BEST, RUNS),
    "score-curves-many": lambda: charts.score_curves(PANEL, MANY_POINTS, MANY_BEST, MANY_RUNS),
    "published": lambda: charts.score_curves(PUBLISHED_PANEL, *make_published(), NO_RUNS),
    "published-map": lambda: charts.heat_map(PUBLISHED_PANEL, *make_published()),
    "heat-map": lambda: charts.heat_map(PANEL, POINTS, BEST),
    "heat-map-many": lambda: charts.heat_map(PANEL, MANY_POINTS, MANY_BEST),
    "spread": lambda: charts.spread(PANEL, BEST),
    "spread-many": lambda: charts.spread(PANEL, MANY_BEST),
    "forest": lambda: charts.forest(PANEL, make_comparison(), 0.01),
    "tuned-curves": lambda: charts.tuned_curves(PANEL, *make_pooled()),
    "factor-bars": lambda: charts.factor_bars(make_factors()),
    "transfer": lambda: charts.transfer(PANEL, *make_transfer()),
    "transfer-words": lambda: charts.transfer(PANEL, *make_transfer(is_number=False)),
    "search-points": lambda: charts.search_points(PANEL, *make_search()),
    "cost-scatter": lambda: charts.cost_scatter(make_costs(tuple(PEAKS))),
    "cost-scatter-many": lambda: charts.cost_scatter(make_costs(tuple(MANY))),
    "losses": lambda: charts.losses(make_losses(tuple(PEAKS))),
    "losses-many": lambda: charts.losses(make_losses(tuple(MANY))),
}
SPECIFICATIONS: dict[tuple[str, int], dict[str, Any]] = {}


def build(name: str, width: int = WIDE) -> dict[str, Any]:
    if (name, width) not in SPECIFICATIONS:
        SPECIFICATIONS[name, width] = specification(ALL[name](), width)
    return SPECIFICATIONS[name, width]


def find_views(node: Any) -> list[dict[str, Any]]:
    """Return all parts of a specification that draw a mark, each with its own data or those of its plot."""
    found = []

    def visit(part: Any, data: Any) -> None:
        if isinstance(part, list):
            for each in part:
                visit(each, data)
        elif isinstance(part, dict):
            data = part.get("data", data)
            if "mark" in part:
                found.append({**part, "data": data})
            for key in ("layer", "hconcat", "vconcat", "concat", "spec"):
                visit(part.get(key, []), data)

    visit(node, None)
    return found


def find_layers(spec: dict[str, Any], mark: str, where: str = "", **look: Any) -> list[dict[str, Any]]:
    """Return the layers of a type of mark that have `where` in the filter and the mark properties `look`."""
    return [
        view
        for view in find_views(spec)
        if view["mark"]["type"] == mark
        and where in str(view.get("transform", ""))
        and look.items() <= view["mark"].items()
    ]


def rows_of(spec: dict[str, Any], view: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    rows = spec["datasets"][view["data"]["name"]]
    return [row for row in rows if values.items() <= row.items()]


def fields(view: dict[str, Any]) -> list[str]:
    return [tip["field"] for tip in view["encoding"]["tooltip"]]


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", ALL)
def test_chart_compiles_without_warnings_and_fits_the_page(
    name: str, width: int, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = build(name, width)
    for dark in (False, True):
        svg = vl_convert.vegalite_to_svg({**spec, "config": theme(dark)}, show_warnings=True)
        assert chart_style.DARK["soft"] in svg if dark else chart_style.LIGHT["soft"] in svg
        right = float(svg.split('width="', 1)[1].split('"')[0])
        assert 0.9 * width < right <= width
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ALL)
def test_specification_follows_the_schema(name: str) -> None:
    spec = json.loads(json.dumps(build(name, PHONE)))
    assert alt.Chart.from_dict(spec).to_dict()["datasets"]
    names = [view["data"]["name"] for view in find_views(spec)]
    assert set(names) == set(spec["datasets"])
    assert ALL[name]().alt


def test_numbers_have_six_significant_digits() -> None:
    frame = pd.DataFrame({"a": [1 / 3, math.nan], "b": ["x", "y"], "c": [[1e-7 / 3, 2], [3]], "n": [1, 2]})
    assert chart_style.inline(frame).values == (
        {"a": 0.333333, "b": "x", "c": [3.33333e-08, 2], "n": 1},
        {"b": "y", "c": [3], "n": 2},
    )


def test_means_have_their_intervals_and_the_best_rate_a_ring() -> None:
    spec = build("score-curves")
    (ring, _) = find_layers(spec, "point", "is_best")
    ringed = {row["curve"]: row["rate"] for row in rows_of(spec, ring, kind="point", is_best=True)}
    best = zip(BEST["curve"], BEST["learning_rate"], strict=True)
    assert ringed == {curve: formatting.rate(rate) for curve, rate in best}
    (span, _) = find_layers(spec, "rule", "datum.kind == 'point'")
    assert (span["encoding"]["y"]["field"], span["encoding"]["y2"]["field"]) == ("low", "high")
    (drawn,) = rows_of(spec, span, kind="point", curve="lora", rate="1e-2")
    (point,) = POINTS[(POINTS["curve"] == "lora") & (POINTS["learning_rate"] == 1e-2)].to_dict("records")
    assert drawn["low"] == pytest.approx(point["validation_score_low"], rel=1e-5)
    assert drawn["high"] == pytest.approx(point["validation_score_high"], rel=1e-5)
    assert drawn["validation"].startswith(f"{point['validation_score']:.4g} [")
    assert fields(ring) == ["curve", "rate", "validation", "test", "usable"]
    assert drawn["usable"] == "3 of 3"


@pytest.mark.parametrize(
    ("label", "shape"), [("collapsed", "triangle-down"), ("diverged", chart_style.CROSS)]
)
def test_broken_runs_have_a_mark_at_their_drawn_score(label: str, shape: str) -> None:
    spec = build("score-curves")
    layer = find_layers(spec, "point", f"'{label}'")[0]
    assert layer["mark"]["shape"] == shape
    drawn = rows_of(spec, layer, kind="run", label=label)
    runs = RUNS[RUNS["label"] == label]
    assert {row["fingerprint"] for row in drawn} == {text[:12] for text in runs["fingerprint"]}
    assert {row["score"] for row in drawn} == set(runs["drawn_score"])
    assert {"seed", "fingerprint"} <= set(fields(layer))


def test_line_is_dashed_across_a_cliff_only() -> None:
    spec = build("score-curves")
    line = find_layers(spec, "line")[0]
    cliffs = rows_of(spec, line, kind="line", curve="lora", dash="cliff")
    usable, broken = cliffs
    assert usable["score"] > 0.3
    assert broken["score"] == 0
    assert usable["piece"] == broken["piece"]
    assert not rows_of(spec, line, kind="line", curve="hira", dash="cliff")


def test_line_is_interrupted_at_a_rate_that_may_not_be_chosen() -> None:
    stopped = (POINTS["curve"] == "lora") & (POINTS["learning_rate"] == 3e-3)
    points = POINTS.assign(eligible=~stopped)
    spec = specification(charts.score_curves(PANEL, points, BEST, RUNS), WIDE)
    line, whole = find_layers(spec, "line")[0], find_layers(build("score-curves"), "line")[0]
    count = len(rows_of(spec, line, kind="line", curve="lora"))
    assert count == len(rows_of(build("score-curves"), whole, kind="line", curve="lora")) - 4


def test_enlarged_plot_has_no_interval_of_a_point_outside() -> None:
    spec = build("score-curves")
    whole, enlarged = find_layers(spec, "rule", "datum.kind == 'point'")
    low, high = enlarged["encoding"]["y"]["scale"]["domain"]
    best = BEST["validation_score"]
    assert low < best.min() < best.max() < high
    assert f"datum.score >= {low:.6g}" in str(enlarged["transform"])
    assert enlarged["mark"]["clip"]
    assert not whole["mark"]["clip"]


def test_scores_that_differ_by_rounding_have_no_enlarged_plot() -> None:
    scores = {name: 0.9 for name in POINTS.columns if name.startswith("validation_score")}
    points = POINTS.assign(**scores)
    points.loc[points.index[0], "validation_score"] += 1e-16
    spec = specification(charts.score_curves(PANEL, points, BEST.assign(**scores), RUNS[:0]), WIDE)
    assert "the same, enlarged" not in str(spec)


def test_untrained_base_is_named_in_the_right_margin() -> None:
    (label,) = [
        view for view in find_layers(build("score-curves"), "text") if "value" in view["encoding"]["x"]
    ]
    (plot,) = [
        view
        for view in build("score-curves")["vconcat"][1]["hconcat"]
        if view["title"]["text"] == "validation score"
    ]
    assert label["encoding"]["x"]["value"] == plot["width"]
    assert label["encoding"]["text"]["value"] == ["untrained", "base"]


def test_labels_cover_neither_points_nor_each_other() -> None:
    view = charts._View(400, 300, (1e-4, 1e-1), (0.0, 1.0))
    spots = pd.DataFrame({"x": [1e-2, 1e-2, 1e-3], "score": [0.5, 0.5, 0.9], "text": ["a" * 9, "b" * 9, "c"]})
    found = view.labels(spots, [(1e-2, 0.5), (1e-3, 0.9)])
    places = [view.pixel(x, y) for x, y in zip(found["x"], found["score"], strict=True)]
    assert len(places) == 3
    assert abs(places[0][1] - places[1][1]) >= 12 or abs(places[0][0] - places[1][0]) >= 100
    crowd = [(10 ** (-4 + i / 50), j / 50) for i in range(150) for j in range(51)]
    assert view.labels(spots, crowd).empty


def test_many_curves_have_a_plot_each_over_the_reference() -> None:
    for width, columns in ((WIDE, 5), (PHONE, 2)):
        spec = build("score-curves-many", width)
        (facet,) = [view for view in spec["vconcat"] if "facet" in view]
        assert facet["columns"] == columns
        assert facet["facet"]["sort"][0] == f"{MANY_BEST['curve'][0]}: 1e-3"
        (grey,) = find_layers(spec, "line", style="pale")
        assert {row["curve"] for row in rows_of(spec, grey)} == {"lora"}


def test_published_scores_have_dashes_for_the_second_source_and_no_runs() -> None:
    spec = build("published")
    line = find_layers(spec, "line")[0]
    dashed = rows_of(spec, line, kind="line", dash="second source")
    assert len(dashed) == len(rows_of(spec, line, kind="line", dash="solid")) > 0
    assert max(row["score"] for row in dashed) == pytest.approx(0.97 * 80, abs=0.1)
    assert not rows_of(spec, line, kind="run")
    low, high = line["encoding"]["y"]["scale"]["domain"]
    assert 40 < low < high < 90


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("name", ["heat-map", "heat-map-many", "published-map"])
def test_digits_of_the_heat_map_have_contrast_to_their_cells(name: str) -> None:
    spec = build(name)
    (digits,) = find_layers(spec, "text")
    (cell, _) = find_layers(spec, "rect")[:2]
    scale = cell["encoding"]["fill"]["scale"]
    low, high = scale["domain"][0], scale["domain"][-1]
    assert scale["range"] == list(charts.RAMP)
    rows = rows_of(spec, digits, broken=False)
    for row in rows:
        share = (row["score"] - low) / (high - low)
        color = chart_style.luminance(chart_style.blend(charts.RAMP, share))
        assert contrast(color, 1.0 if row["ink"] == "#ffffff" else 0.0) >= 4.5
    assert len(rows) > 10


def test_blend_gives_the_stops_of_the_ramp_and_their_middle() -> None:
    stops = ("#000000", "#102030", "#ffffff")
    assert [chart_style.blend(stops, share) for share in (0.0, 0.25, 0.5, 1.0)] == [
        (0, 0, 0),
        (8, 16, 24),
        (16, 32, 48),
        (255, 255, 255),
    ]


def test_broken_cells_of_the_heat_map_have_a_symbol_only() -> None:
    spec = build("heat-map")
    (digits,), (glyph,) = find_layers(spec, "text"), find_layers(spec, "point")
    assert digits["transform"] == [{"filter": "!datum.broken"}]
    assert glyph["transform"] == [{"filter": "datum.broken"}]
    assert glyph["encoding"]["shape"]["scale"] == {
        "domain": ["collapsed", "diverged"],
        "range": ["triangle-down", chart_style.CROSS],
    }
    failures = {row["rate"]: row["failure"] for row in rows_of(spec, glyph, broken=True, curve="lora")}
    assert failures == {"1e-1": "collapsed", "3e-1": "diverged"}
    assert not find_layers(build("heat-map", PHONE), "text")


def test_heat_map_has_a_box_around_each_best_rate() -> None:
    spec = build("heat-map")
    (box,) = find_layers(spec, "rect", "is_best", style="ink")
    boxed = {row["curve"]: row["rate"] for row in rows_of(spec, box, is_best=True)}
    assert boxed == {row.curve: formatting.rate(row.learning_rate) for row in BEST.itertuples()}
    assert box["encoding"]["y"]["scale"]["domain"] == BEST["curve"].tolist()


def test_spread_joins_the_score_at_the_common_rate_and_at_the_own_best() -> None:
    spec = build("spread")
    hollow, filled = find_layers(spec, "point", "datum.own")
    assert (hollow["encoding"]["x"]["field"], filled["encoding"]["x"]["field"]) == ("common", "own")
    assert not hollow["mark"]["filled"]
    for row, best in zip(rows_of(spec, filled), BEST.itertuples(), strict=True):
        assert row["own"] == pytest.approx(best.test_score, rel=1e-5)
        assert row["common"] == pytest.approx(best.test_at_common_rate, rel=1e-5)
    order = filled["encoding"]["y"]["scale"]["domain"]
    assert order == BEST.sort_values("test_score", ascending=False)["curve"].tolist()


def test_spread_shows_a_curve_without_a_score() -> None:
    best = pd.concat([BEST, BEST.iloc[:1].assign(curve="new", learning_rate=math.nan, test_score=math.nan)])
    spec = specification(charts.spread(PANEL, best), WIDE)
    (text,) = find_layers(spec, "text", dx=12)
    assert rows_of(spec, text)[-1]["rate"] == "no score yet"


def test_forest_has_the_margin_outcomes_and_arrows_for_outliers() -> None:
    spec = build("forest")
    (band,) = find_layers(spec, "rect")
    assert {abs(rows_of(spec, band)[0][end]) for end in ("at", "to")} == {1.0}
    (mark,) = [view for view in find_layers(spec, "point") if "shape" in view["encoding"]]
    rows = {row["row"]: row for row in rows_of(spec, mark)}
    assert list(rows) == ["pissa", "dora", "rslora", "hira magnitude=rows", "full (control)", "broken"]
    assert (rows["pissa"]["at"], rows["pissa"]["low"], rows["pissa"]["high"]) == (3.1, 1.2, 5.0)
    assert rows["pissa"]["text"] == "+3.1 [+1.2, +5.0]"
    low, _ = mark["encoding"]["x"]["scale"]["domain"]
    assert rows["broken"]["at"] == pytest.approx(low, rel=1e-5)
    assert rows["broken"]["text"] == "-93.0 [-99.0, -87.0]"
    (arrow,) = find_layers(spec, "point", shape="triangle-left")
    limit = float(arrow["transform"][0]["filter"].split("<=")[1])
    assert [row["row"] for row in rows_of(spec, arrow) if row["low"] <= limit] == ["broken"]
    shapes = mark["encoding"]["shape"]["scale"]
    assert len(set(shapes["range"])) == len(shapes["domain"]) == 5


def test_tuned_curves_have_a_tick_for_each_chosen_rate() -> None:
    spec = build("tuned-curves")
    (tick,) = find_layers(spec, "tick")
    _, chosen = make_pooled()
    rows = rows_of(spec, tick)
    assert [row["x"] for row in rows] == pytest.approx(chosen["learning_rate"].tolist(), rel=1e-5)
    assert len(rows) == 5 * len(PEAKS)
    ringed = rows_of(spec, find_layers(spec, "point", "is_best")[0], kind="point", is_best=True)
    pooled, _ = make_pooled()
    assert sorted(row["score"] for row in ringed) == pytest.approx(
        sorted(pooled.groupby("variant")["validation_score"].max()), rel=1e-5
    )


def test_factors_have_two_marks_with_their_intervals() -> None:
    spec, factors = build("factor-bars"), make_factors()
    first, second = find_layers(spec, "point", "datum.hue ==")
    (facet,) = [view for view in spec["vconcat"] if "facet" in view]
    assert facet["facet"]["sort"] == ["lora", "dora", "lora_plus"]
    rows = rows_of(spec, first, variant="lora", row="rank")
    (factor,) = factors[(factors["variant"] == "lora") & (factors["title"] == "rank")].to_dict("records")
    for row, name in zip(rows, ("misset", "retuned"), strict=True):
        expected = [100 * factor[name], 100 * factor[f"{name}_low"], 100 * factor[f"{name}_high"]]
        assert [row["lost"], row["low"], row["high"]] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["hue"] in str(first["transform"])
    assert rows[1]["hue"] in str(second["transform"])
    assert len(rows_of(spec, first, row="learning rate")) == 3  # the rate has no loss B
    assert len(rows_of(spec, first, row="alpha*")) == 6


def test_search_has_the_best_so_far_without_points_that_may_not_win() -> None:
    spec, (points, _) = build("search-points"), make_search()
    (steps,) = find_layers(spec, "line", interpolate="step-after")
    for curve, own in points.groupby("curve"):
        rows = {row["order"]: row["so_far"] for row in rows_of(spec, steps, curve=curve)}
        eligible = own[own["eligible"]]
        for order, best in rows.items():
            tried = eligible[eligible["order"] <= order]["validation_score"]
            assert best == pytest.approx(tried.max(), rel=1e-5)
        assert max(rows) == 24
    cross = find_layers(spec, "point", "'diverged'")[0]
    crosses = rows_of(spec, cross, kind="run", label="diverged")
    assert len(crosses) == points["diverged"].sum() > 0
    assert {row["score"] for row in crosses} == {PANEL["floor"]}


def test_costs_have_known_axes_and_a_pareto_front() -> None:
    costs = pd.DataFrame({"panel": "p", "curve": list("abcd"), "test_score": [0.8, 0.9, 0.85, math.nan]})
    costs = costs.assign(
        train_seconds=[1.0, 2.0, 3.0, 4.0], trainable_parameters=[5, 50, 5, 5], peak_memory=0
    )
    spec = specification(charts.cost_scatter(costs), WIDE)
    fronts = find_layers(spec, "line", interpolate="step-after")
    axes = [view["encoding"]["x"]["title"] for view in fronts]
    assert axes == ["training seconds of a run", "trainable parameters"]  # memory is unknown
    assert [(row["x"], row["score"]) for row in rows_of(spec, fronts[0])] == [(1, 0.8), (2, 0.9)]
    assert [(row["x"], row["score"]) for row in rows_of(spec, fronts[1])] == [(5, 0.85), (50, 0.9)]
    assert [view["encoding"]["x"]["scale"].get("type") for view in fronts] == [None, "log"]


def test_losses_far_above_the_first_are_cut_off() -> None:
    spec, frame = build("losses"), make_losses(tuple(PEAKS))
    (line,) = find_layers(spec, "line")
    low, high = line["encoding"]["y"]["scale"]["domain"]
    first = frame[frame["step"] == 1]["loss"].max()
    assert low < frame["loss"].min() < first < high < 1.5 * first < frame["loss"].max()
    assert line["mark"]["clip"]
    (row,) = rows_of(spec, line, curve="lora", role="best")
    own = frame[(frame["curve"] == "lora") & (frame["role"] == "best")]
    assert row["loss"] == pytest.approx(own["loss"].tolist(), rel=1e-5)
    dashes = line["encoding"]["strokeDash"]["scale"]
    assert dashes["range"][dashes["domain"].index(row["hue"])] == [1, 0]


def test_frames_with_little_in_them_are_drawn() -> None:
    one = (POINTS["curve"] == "hira") & (POINTS["learning_rate"] == 1e-3)
    runs = RUNS[(RUNS["curve"] == "hira") & (RUNS["learning_rate"] == 1e-3)]
    best = BEST[BEST["curve"] == "hira"].assign(learning_rate=1e-3)
    nothing = {name: math.nan for name in POINTS.columns if "score" in name}
    unknown = best.assign(**{name: math.nan for name in BEST.columns if "score" in name or "rate" in name})
    failed = POINTS[one].assign(usable=0, failed=3, **nothing)
    bare = {**PANEL, "reference": "", "untrained_validation": math.nan, "common_rate": math.nan}
    charts_of_little = [
        charts.score_curves(bare, POINTS[one], best, runs),
        charts.score_curves(bare, failed, unknown, runs.assign(drawn_score=math.nan)),
        charts.heat_map(bare, failed, unknown),
        charts.spread(bare, unknown),
        charts.forest(bare, make_comparison().iloc[:1], 0.01),
        charts.cost_scatter(make_costs(("lora",))),
    ]
    for chart in charts_of_little:
        for width in (WIDE, PHONE):
            assert "<svg" in vl_convert.vegalite_to_svg(specification(chart, width))


def test_rate_axis_has_the_rates_or_decades() -> None:
    rates = [10 ** (-4 + i / 8) for i in range(25)]
    assert chart_style.rate_ticks(RATES, (1e-4, 1.0), 500) == list(RATES)
    assert chart_style.rate_ticks(rates, (5e-5, 0.2), 500) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert len(chart_style.rate_ticks(rates, (5e-5, 0.2), 250)) <= 5
    assert [formatting.rate(rate) for rate in (1e-4, 3e-4, 10**-2.5)] == ["1e-4", "3e-4", "3.16e-3"]


def test_colors_of_both_themes_have_contrast_to_the_page() -> None:
    for dark, shades in ((False, chart_style.LIGHT), (True, chart_style.DARK)):
        config = theme(dark)
        paper = chart_style.luminance(chart_style.blend([shades["paper"]] * 2, 0))
        for color in config["range"]["category"]:
            assert contrast(chart_style.luminance(chart_style.blend([color] * 2, 0)), paper) >= 3
        for name in ("ink", "soft"):
            assert contrast(chart_style.luminance(chart_style.blend([shades[name]] * 2, 0)), paper) >= 4.5
        assert config["background"] == "transparent"


def test_images_are_opaque_and_two_pixels_a_unit() -> None:
    chart = ALL["heat-map"]()
    png = chart_style.to_png(chart)
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == pytest.approx(2 * WIDE, rel=0.05)
    assert 'fill="#ffffff"' in chart_style.to_svg(chart)


def test_the_javascript_is_made_once_for_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = chart_style.vega_bundle()
    assert all(f"window.{name}=" in script for name in ("vega", "vegaLite", "vegaEmbed"))
    assert "</script" not in script.lower()
    (file,) = (tmp_path / "lora-orchestrator").iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"value": "from the file"}))
    assert chart_style.vega_bundle() == "from the file"
