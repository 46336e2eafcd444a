"""The table, the plots and the report of a study."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib import rcParams
from PIL import Image
from rich.console import Console
from synthetic import RATES, STUDY, record, study

from orchestrator.analyze import caveats, curve_text, formatting
from orchestrator.analyze.plots import curves, heatmap, spread, style
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.table import render_summary
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

STUDY_FILE = StudyFile(
    name="lr-sensitivity",
    question="How far apart are the best rates?",
    command="python experiments/lr_sensitivity.py --dry-run --variants lora pissa "
    "--learning-rates=1e-3:1e-1:2 --seeds 3",
)
DATABASE = "sqlite:///results/mlflow.db"


def summary_of(records: list[Record]) -> Summary:
    return summarize(STUDY_FILE, records)


def printed(records: list[Record]) -> str:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(render_summary(summary_of(records)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def several_tasks() -> list[Record]:
    return study() + study({k: STUDY[k] for k in ("lora", "pissa")}, task="digits", model="vit", floor=0.1)


# --- the table


def test_the_table_fits_80_columns_with_every_number_whole() -> None:
    text = printed(study())
    assert max(len(line) for line in text.splitlines()) <= 80
    row = next(line for line in text.splitlines() if line.startswith(" lora "))
    assert row.split() == ["lora", "1e-2", "inside", "0.967", "[0.91,", "1.00]", "0.957", "12/21", "0.00"]


def test_long_names_and_edges_still_fit() -> None:
    records = [
        record("a-variant-with-a-very-long-name", r, s, v)
        for r, v in ((1e-3, 0.9), (1e-2, 0.2))
        for s in (0, 1)
    ]
    text = printed(records)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "low edge" in text


def test_one_seed_shows_no_plus_minus_and_an_empty_study_prints() -> None:
    row = next(line for line in printed([record()]).splitlines() if line.startswith(" lora "))
    assert "0.500" in row
    assert "±" not in row
    assert printed([]).strip() == ""


def test_the_answer_follows_from_the_numbers() -> None:
    answer = curve_text.answer(summary_of(study()).panels[0])
    assert "best rates of 5 variants lie 2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in answer
    assert "At LoRA's best rate (1e-2) their test scores span 0.96 (hira 0.00 to lora 0.96)" in answer
    assert "each at its own best rate, 0.29" in answer
    edge = [
        record(v, r, 0, s) for v, s1 in (("lora", 0.9), ("hira", 0.1)) for r, s in ((1e-3, s1), (1e-2, 0.5))
    ]
    assert "at least 1.0 decades apart" in curve_text.answer(summary_of(edge).panels[0])


def test_a_spread_over_few_variants_says_so() -> None:
    found = [record(v, r, 0, s) for v in ("lora", "dora", "hira") for r, s in ((1e-3, 0.5), (1e-2, 0.9))]
    stopped = replace(found[-1], state="stopped")
    assert "the test scores of 2 of 3 variants span" in curve_text.answer(
        summary_of([*found[:-1], stopped]).panels[0]
    )


def test_a_variant_that_scores_the_same_at_both_ends_has_no_best_rate() -> None:
    flat = [record("head_only", r, seed, 0.4) for r in RATES for seed in range(2)]
    panel = summary_of([*study(), *flat]).panels[0]
    assert "best rates of 5 variants lie 2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in curve_text.answer(
        panel
    )
    assert {c.label: curve_text.best_rate_text(c) for c in panel.curves}["head_only"] == "flat"
    panel_caveats = " ".join(caveats.panel_caveats(panel))
    assert "no best rate, the score is the same at both ends of the grid: head_only" in panel_caveats
    assert "No variant of letters" in curve_text.answer(summary_of(flat).panels[0])


# --- numbers and commands


def test_rates_are_short_and_exact_rates_read_back_as_the_same_number() -> None:
    assert [formatting.rate(r) for r in (3e-4, 0.01, 1.1247e-5, 1.0)] == ["3e-4", "1e-2", "1.12e-5", "1e0"]
    assert formatting.exact_rate(3e-4) == "3e-4"
    assert float(formatting.exact_rate(1.1247e-5)) == 1.1247e-5
    assert formatting.number(-1e-9) == "0.000"


def test_the_command_is_narrowed_and_other_options_stay() -> None:
    narrowed = formatting.narrow_command(
        STUDY_FILE.command, "hira", [1e-1], {"rank": 16, "steps_horizon": 80, "floor": 0.0}
    )
    expected = "--dry-run --seeds 3 --variants hira --learning-rates 1e-1 --rank 16 --steps 80"
    assert narrowed == f"python experiments/lr_sensitivity.py {expected}"


def test_the_command_for_a_part_of_a_study_with_replicates_is_that_of_the_plain_script() -> None:
    command = "python experiments/tuned_comparison.py --dry-run --replicates 5 --margin 0.02"
    narrowed = formatting.narrow_command(command, "hira", [1e-1], {})
    options = "--dry-run --variants hira --learning-rates 1e-1"
    assert narrowed == f"python experiments/lr_sensitivity.py {options}"


# --- the plots


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
    summary = summary_of(records)
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
    styles = style.curve_styles(summary_of(records))
    assert styles["lora"].color == "#000000"
    assert (
        len({each.color for each in styles.values()}) == len({each.marker for each in styles.values()}) == 8
    )


# --- the report


class Page(HTMLParser):
    """A parsed page, with its links, tags, open elements and text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text += data


def written(
    folder: Path, records: list[Record], uri: str = DATABASE, notes: tuple[str, ...] = (), **more: Any
) -> tuple[Summary, Page, dict[str, Any]]:
    """Write a report of STUDY_FILE with the fields `more`. Return the summary, the page and summary.json."""
    summary = write_report(replace(STUDY_FILE, **more), records, folder, uri, notes)
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    return summary, page, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def of_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Write the report of the synthetic study. Return its folder, which no test may change, and the page."""
    folder = tmp_path_factory.mktemp("report") / "new" / "study"
    return folder, written(folder, study())[1]


def test_a_report_is_four_whole_files_and_nothing_else(of_study: tuple[Path, Page]) -> None:
    folder, _ = of_study
    summary, page, numbers = written(folder, study())  # This replaces the first report.
    pictures = {f"{name}.{kind}" for name in ("curves", "heatmap", "spread") for kind in ("png", "svg")}
    assert {p.name for p in folder.iterdir()} == {"report.html", "summary.json", *pictures}
    assert curve_text.answer(summary.panels[0]) in page.text
    assert [v["answer"] for v in numbers["verdicts"]] == [v.answer for v in summary.verdicts]
    assert STUDY_FILE.question in page.text
    assert numbers["schema_version"] == 2
    assert numbers["states"] == {"finished": 63, "collapsed": 13, "diverged": 29, "stopped": 0, "failed": 0}
    shown = {c["label"]: c for c in numbers["panels"][0]["curves"]}
    assert shown["lora"]["best_validation"]["mean"] == pytest.approx(2.9 / 3)
    assert shown["lora"]["width"]["interval"]["low"] > 0
    assert len(shown["hira"]["points"]) == 7
    assert "NaN" not in json.dumps(numbers)


def test_renamed_fields_keep_their_names_in_the_summary(of_study: tuple[Path, Page]) -> None:
    (panel,) = json.loads((of_study[0] / "summary.json").read_text())["panels"]
    curve = panel["curves"][0]
    point = curve["points"][0]
    assert "common_name" in panel
    assert {"best_rates_leaving_one_out", "gain"} <= curve.keys()
    assert "at_least" in curve["width"]
    assert {"survivors", "chosen_from"} <= point.keys()
    assert "last_seen" in point["runs"][0]


def test_the_page_asks_no_other_host(of_study: tuple[Path, Page]) -> None:
    folder, page = of_study
    elsewhere = [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert sorted(elsewhere) == sorted(p.name for p in folder.glob("*.*g"))
    text = (folder / "report.html").read_text()
    assert "default-src 'none'" in text  # The browser itself refuses every request.
    assert not re.search(r"url\(|@import|<link|<script [^>]*src", text)


def test_the_pictures_are_equal_each_time(of_study: tuple[Path, Page]) -> None:
    png, svg = style.render(lambda: curves.draw_curves(summary_of(study())))
    assert (of_study[0] / "curves.png").read_bytes() == png
    assert (of_study[0] / "curves.svg").read_bytes() == svg


def test_every_row_has_its_command(of_study: tuple[Path, Page]) -> None:
    _, page = of_study
    base = "python experiments/lr_sensitivity.py --dry-run --seeds 3"
    for variant in STUDY:
        for rate in ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1"):
            assert f"{base} --variants {variant} --learning-rates {rate}" in page.text


def test_unfinished_runs_are_listed_with_reason_and_fingerprint_and_no_text_becomes_markup(
    tmp_path: Path,
) -> None:
    markup = "<script>alert(1)</script>"
    failed = record(seed=8, validation=None, state="failed", reason=f"out of memory {markup}")
    stopped = record(seed=9, validation=0.1, state="stopped", reason="ASHA at step 30")
    records = [*study(), failed, stopped]
    missing = tuple(f"{i:064x}" for i in range(12))
    about: dict[str, Any] = {"name": markup, "question": "a & b < c", "configurations": missing}
    _, page, numbers = written(tmp_path, records, notes=(markup,), **about)
    assert "alert(1)" not in " ".join(page.scripts)
    assert "a & b < c" in page.text
    for text in (f"out of memory {markup}", "ASHA at step 30", "smoothed training loss", "12 pending"):
        assert text in page.text
    for ended in (failed, stopped):
        assert ended.fingerprint[:12] in page.text
    assert numbers["pending"] == 12


def test_a_server_is_linked_without_its_password(tmp_path: Path) -> None:
    uri = "https://me:secret@mlflow.example:5000/x"
    _, page, _ = written(tmp_path, [record()], uri, command=f"run --tracking-uri {uri}")
    assert "https://mlflow.example:5000/x" in page.links
    for file in ("report.html", "summary.json"):
        assert "secret" not in (tmp_path / file).read_text()


def test_a_tracking_uri_that_is_no_web_address_is_no_link(tmp_path: Path) -> None:
    _, page, _ = written(tmp_path, [record()], "javascript:alert(1)")
    assert not any(link.startswith("javascript") for link in page.links)


def test_an_empty_study_and_several_tasks_are_reports_too(tmp_path: Path) -> None:
    _, page, numbers = written(tmp_path, [])
    assert numbers["panels"] == []
    assert "No run has a record yet" in page.text
    summary, page, _ = written(tmp_path, several_tasks())
    assert [curve_text.panel_title(p) for p in summary.panels] == ["digits on vit", "letters on letters-base"]
    assert all(curve_text.panel_title(p) in page.text for p in summary.panels)


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_report(STUDY_FILE, [record()], tmp_path / "file" / "study", DATABASE)
