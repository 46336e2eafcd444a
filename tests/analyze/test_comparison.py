"""The second stage of a comparison: its verdict, plots and report."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from synthetic import record, study
from test_report import DATABASE, STUDY_FILE, Page

from orchestrator.analyze import selection, verdict
from orchestrator.analyze.comparison import ChosenPoint, TunedChoice, TunedComparison, compare_tuned
from orchestrator.analyze.plots.forest import plot_forest, x_limits
from orchestrator.analyze.plots.search_curves import plot_search, running_best
from orchestrator.analyze.report import write_report
from orchestrator.analyze.sensitivity import summarize
from orchestrator.analyze.table import render_summary
from orchestrator.analyze.tuning import summarize_tuning
from orchestrator.cli.commands import Report
from orchestrator.record.schema import ItemResults, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

CHOSEN = {
    t.variant: found for t in summarize_tuning(study()) if (found := ChosenPoint.from_tuning(t)) is not None
}
SHIFTS = {"lora": 0.0, "rslora": -0.1, "pissa": 0.03, "hira": 0.0, "lora-plus": -0.2}


def fresh(seeds: int = 10, diverged: int = 4, **more: Any) -> list[Record]:
    """Build the records of fresh seeds, of which the first `diverged` seeds of LoRA+ have diverged."""
    found = []
    for variant, chosen in CHOSEN.items():
        for s in range(seeds):
            noise = ((7 * s + 3 * len(variant)) % 5 - 2) / 500
            score = 0.9 + SHIFTS[variant] + noise
            has_diverged = variant == "lora-plus" and s < diverged
            rate, alpha = chosen.configuration.optimizer.learning_rate, chosen.configuration.variant.alpha
            found.append(
                record(variant, rate, 1000 + s, None if has_diverged else score, alpha=alpha, **more)
            )
    return found


def only(records: list[Record], **more: Any) -> TunedComparison:
    found = compare_tuned(records, "lora", 0.01, CHOSEN, **more)
    assert found is not None
    return found


def test_the_verdict_names_task_model_variants_seeds_budget_and_margin() -> None:
    said = verdict.verdict_text(only(fresh()))
    assert said.startswith(
        "letters on letters-base, 60 steps, each variant tuned with 7 points x 3 seeds, confirmed with 10 "
        "fresh seeds, margin 0.01: pissa (+0.030) is better than lora; rslora (-0.100) is worse than lora; "
    )
    assert "hira (+0.000) is equivalent to lora; lora-plus (" in said
    assert said.endswith("is not inferior to 2 to 3 of 4, 95% interval).")
    assert "matches or beats most variants: undecided" in said


def test_the_chosen_point_counts_if_a_study_holds_others_as_well() -> None:
    records = fresh() + [record("pissa", 5e-3, 2000 + s, 0.1) for s in range(20)]
    found = only(records)
    assert found.configurations["pissa"].optimizer.learning_rate == 3e-3
    assert found.seeds == tuple(range(1000, 1010))
    assert compare_tuned([r for r in records if r.configuration.variant.name != "lora"], "lora", 0.01) is None


def test_a_failed_seed_is_missing_and_reported() -> None:
    records = fresh()
    broken = next(i for i, r in enumerate(records) if r.configuration.variant.name == "hira")
    seed = records[broken].configuration.seed
    records[broken] = replace(records[broken], state="failed")
    summary = summarize(records, baseline="lora", margin=0.01, tuning_choices=CHOSEN)
    (found,) = summary.comparisons
    assert found.failed == 1
    pair = next(p for p in found.comparison.pairs if p.label == "hira")
    assert pair.dropped == (seed,)
    assert any(f"hira: left out, one of the two has no score: seeds {seed}" in w for w in summary.warnings)


def test_the_item_error_is_that_of_the_difference() -> None:
    lora, other = (1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 1.0, 1.0)
    records = [
        replace(record(v, 1e-2, s, 0.5), items={"test": ItemResults(correct)})
        for v, correct in (("lora", lora), ("dora", other))
        for s in (0, 1)
    ]
    found = compare_tuned(records, "lora", 0.01)
    assert found is not None
    # The differences of the four items are 0, -1, 1 and 1, and their variance is .9166...
    assert found.item_errors == {"dora": pytest.approx((2.75 / 3 / 4) ** 0.5)}


def test_a_choice_at_the_edge_is_shown() -> None:
    edge = {**CHOSEN, "pissa": replace(CHOSEN["pissa"], edges=("learning_rate (high edge)",))}
    summary = summarize(fresh(), baseline="lora", margin=0.01, tuning_choices=edge)
    assert any("not bracketed" in w and "pissa learning_rate (high edge)" in w for w in summary.warnings)
    assert "pissa (+0.030, not bracketed) is better than lora" in verdict.verdict_text(summary.comparisons[0])
    lora = {**CHOSEN, "lora": replace(CHOSEN["lora"], edges=("learning_rate (low edge)",))}
    (found,) = summarize(fresh(), baseline="lora", margin=0.01, tuning_choices=lora).comparisons
    assert "Tuned LoRA (not bracketed) matches or beats" in verdict.verdict_text(found)
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(render_summary(summary))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= 80
    assert "(edge)" in printed
    assert "4 of 10" in printed


@pytest.mark.parametrize("seeds", [1, 2, 10])
def test_the_page_has_the_picture_the_verdict_and_what_tuning_took(tmp_path: Path, seeds: int) -> None:
    tune, folder = tmp_path / "tune", tmp_path / "confirm"
    tune.mkdir()
    selection.load_or_make_choice(tune, TunedChoice, lambda: TunedChoice((), None, CHOSEN))
    compared = replace(STUDY_FILE, baseline="lora", margin=0.01, tuning=tune.name)
    summary = write_report(compared, fresh(seeds), folder, DATABASE)
    assert sorted(p.name for p in folder.iterdir()) == ["forest.png", "report.html", "summary.json"]
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    assert len(page.links) == 1
    said = verdict.verdict_text(summary.comparisons[0])
    text = " ".join(page.text.split())
    assert said in text
    for part in ("What tuning took and chose", "other seeds would have chosen", "7 points x 3 seeds", "1260"):
        assert part in text
    numbers = json.loads((folder / "summary.json").read_text())
    assert numbers["comparisons"][0]["verdict"] == said
    compared_json = numbers["comparisons"][0]["comparison"]
    assert {"spread", "baseline_holds", "unknown"} <= compared_json.keys(), "JSON names do not change"
    assert {"detectable", "seeds_to_decide"} <= compared_json["pairs"][0].keys()
    assert {"most_steps", "otherwise"} <= numbers["comparisons"][0]["chosen"]["lora"].keys()
    assert "NaN" not in json.dumps(numbers)
    image = Image.open(folder / "forest.png")
    assert image.width == 1200
    assert (folder / "forest.png").stat().st_size < 150_000


def test_the_report_command_writes_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, store = fresh(3), Store(tmp_path / "store")
    for r in records:
        store.put(r)
    names = tuple(r.fingerprint for r in records)
    folder = tmp_path / "c-confirm"
    StudyFile("c-confirm", "?", "x", names, baseline="lora", margin=0.02, tuning="c-tune").write(folder)
    (tmp_path / "c-tune").mkdir()
    selection.load_or_make_choice(tmp_path / "c-tune", TunedChoice, lambda: TunedChoice((), None, CHOSEN))
    assert Report(study="c-confirm", output=tmp_path).run() == 0
    assert "report.html: 15 of 15 configurations" in capsys.readouterr().out
    (found,) = json.loads((folder / "summary.json").read_text())["comparisons"]
    assert "tuned with 7 points x 3 seeds, confirmed with 3 fresh seeds, margin 0.02" in found["verdict"]


def test_variants_without_a_point_or_a_fresh_seed_count_as_unknown() -> None:
    tuning = {**CHOSEN, "dora": None, "full": None}
    without = [r for r in fresh() if r.configuration.variant.name != "hira"]
    summary = summarize(without, baseline="lora", margin=0.01, tuning_choices=tuning)
    (found,) = summary.comparisons
    assert found.untuned == ("dora", "full")
    assert found.comparison.counted == 5, "rslora, pissa, lora-plus; hira and dora; full is a control"
    assert verdict.claim_text(found).endswith("is not inferior to 1 to 4 of 5, 95% interval).")
    assert any("no score at any point of the tuning" in w and "dora, full" in w for w in summary.warnings)
    assert any("without a fresh seed" in w and w.endswith(" hira.") for w in summary.warnings)
    assert "dora" not in {p.label for p in found.comparison.pairs}
    render_summary(summary)
    plot_forest([found])


def test_one_diverged_seed_removes_the_interval_and_adds_the_share_and_the_mean_of_the_rest() -> None:
    summary = summarize(fresh(diverged=1), baseline="lora", margin=0.01, tuning_choices=CHOSEN)
    (found,) = summary.comparisons
    (pair,) = [p for p in found.comparison.pairs if p.label == "lora-plus"]
    assert (pair.outcome, pair.interval, pair.p_differs) == ("undecided", None, None)
    assert verdict.undecided_text(pair) == "1 of 10 seeds diverged"
    (warning,) = [w for w in summary.warnings if "lora-plus: 1 of 10" in w]
    assert "share 0.02 to 0.40" in warning
    assert "mean of the rest 0.7" in warning
    assert "up to 28% still may" in verdict.scope_text(found.comparison)


def test_a_second_look_is_a_caveat() -> None:
    def told(*looks: int) -> list[str]:
        found = summarize(fresh(), baseline="lora", margin=0.01, tuning_choices=CHOSEN, looks=looks)
        return [w for w in found.warnings if "look" in w]

    assert told() == told(10) == told(10, 20) == []
    assert "look 2 at 10 seeds, after a verdict at 5" in told(5, 10)[0]
    assert "look 3 at 10 seeds, after a verdict at 3, 5" in told(3, 5)[0]
    study_file = StudyFile("s", "", "")
    assert study_file.with_look(5).with_look(10).with_look(10).with_look(7).looks == (5, 10)


def test_a_comparison_without_its_first_stage_has_a_caveat(tmp_path: Path) -> None:
    compared = replace(STUDY_FILE, baseline="lora", margin=0.01, tuning="gone")
    summary = write_report(compared, fresh(), tmp_path, DATABASE)
    assert summary.comparisons[0].chosen == {}
    assert any("the choice of the first stage is not available" in w for w in summary.warnings)


def test_an_outlier_does_not_squeeze_the_other_variants_together() -> None:
    near = only([r for r in fresh() if r.configuration.variant.name != "lora-plus"])
    far = only(fresh())
    pairs = far.comparison.pairs
    lowest = min(p.difference for p in pairs if p.difference is not None)
    left, right = x_limits(pairs, 0.01)
    assert lowest < left, "the far one is not in the picture, an arrow points at it"
    for pair in near.comparison.pairs:
        assert pair.difference is not None
        assert left < pair.difference < right
    assert right - left < 2 * (
        x_limits(near.comparison.pairs, 0.01)[1] - x_limits(near.comparison.pairs, 0.01)[0]
    )
    picture = Image.open(io.BytesIO(plot_forest([far, near])))
    assert picture.width == 1200


def test_the_page_of_a_search_shows_every_point(tmp_path: Path) -> None:
    records = [
        record(v, rate, 0, score, rank=rank)
        for v in ("lora", "hira")
        for rate, rank, score in (
            (1.34e-3, 4, 0.2),
            (2.47e-2, 8, 0.7),
            (3.11e-2, 8, 0.6),
            (4.12e-1, 16, None),
        )
    ]
    records.append(record("lora", 5.55e-4, 0, 0.1, rank=4, state="stopped"))
    summary = write_report(replace(STUDY_FILE, searched=True), records, tmp_path, DATABASE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "search.png", "summary.json"]
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    text = " ".join(page.text.split())
    assert "2.47e-2, rank 8" in text
    for r in records:
        assert r.fingerprint[:12] in text
    assert re.search(r"variants have different numbers of points \((lora 5, hira 4|hira 4, lora 5)\)", text)
    assert Image.open(io.BytesIO(plot_search(summary.searches))).width == 1200


def test_the_best_score_so_far_never_falls_and_ignores_stopped_points() -> None:
    scores = (0.3, None, 0.2, 0.6, 0.5)
    rates = (1.11e-3, 2.22e-3, 3.33e-3, 4.44e-3, 5.55e-3)
    records = [
        replace(
            record(rate=r, validation=v, state="stopped" if i == 0 else None),
            provenance=replace(record().provenance, started=i + 1.0),
        )
        for i, (r, v) in enumerate(zip(rates, scores, strict=True))
    ]
    (found,) = summarize_tuning(records)
    best = running_best(found)
    assert str(best[0]) == "nan"
    assert best[1:] == [0.0, 0.2, 0.6, 0.6]
