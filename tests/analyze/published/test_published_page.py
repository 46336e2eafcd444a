"""The page of the published scores: printed text, files, and the curves of a user's study over them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from orchestrator.experiments.published import Published
from synthetic import record

from orchestrator.analyze.published.published_overlay import make_overlays
from orchestrator.analyze.published.published_page import show_published
from orchestrator.analyze.published.published_scores import TASKS, read_table
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import UsageError


def own_records(task: str = "metamathqa") -> list[Record]:
    curve = {1e-4: (0.2, 0.3), 1e-3: (0.4, 0.5)}
    return [
        record(variant, rate, seed, 0.5, test, task=task, model="small-base")
        for variant in ("lora", "lora_plus", "rslora", "vera")
        for rate, tests in curve.items()
        for seed, test in enumerate(tests)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the page, with a user's study on GSM8K over the published curves."""
    output = tmp_path_factory.mktemp("published")
    store, records = Store(output / "store"), own_records()
    for each in records:
        store.put(each)
    StudyFile("mine", "?", "command", tuple(r.fingerprint for r in records)).write(output / "mine")
    show_published(list(TASKS), (), output, output / "store", "mine")
    return output / "published"


class _Addresses(HTMLParser):
    """A parser that collects the text and all addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"src", "srcset", "data", "poster"} | ({"href"} if tag != "a" else set())
        self.loaded += [str(value) for name, value in attrs if name.split(":")[-1] in names]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_shows_every_score(page: Path) -> None:
    parser, text = _Addresses(), (page / "report.html").read_text()
    parser.feed(text)
    assert [address[:40] for address in parser.loaded if not address.startswith("data:image/png;")] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text, "the browser refuses everything that is not in the file"
    table = read_table("gsm8k")
    assert all(f"{score:.2f}" in parser.text for score in table.scores.ravel())
    assert all(variant in parser.text for variant in table.variants)


def test_summary_and_pictures_are_beside_the_page(page: Path) -> None:
    summary = json.loads((page / "summary.json").read_text())
    assert [task["task"] for task in summary["tasks"]] == ["gsm8k"], "the task of the user's study alone"
    gsm8k = summary["tasks"][0]
    assert gsm8k["scores"]["LoRA"][6] == 75.51
    assert [each["reference_ranks"] for each in gsm8k["noise"]] == [[1, 6], [1, 10]]
    assert summary["overlays"][0]["curves"][0]["variant"] == "LoRA"
    for stem in ("curves_gsm8k", "heat_map_gsm8k"):
        assert (page / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (page / f"{stem}.svg").read_text()


def test_an_own_study_is_drawn_by_published_name_in_points() -> None:
    (overlay,) = make_overlays("mine", own_records())
    assert overlay.task == "gsm8k"
    assert [curve.variant for curve in overlay.curves] == ["LoRA", "RsLoRA", "LoRA+"]
    assert overlay.curves[0].rates == (1e-4, 1e-3)
    assert overlay.curves[0].scores == pytest.approx((25.0, 45.0))
    assert overlay.unpublished == ("vera",)


def test_runs_that_diverged_count_as_the_floor_and_failed_ones_not_at_all() -> None:
    records = [
        record("lora", 1e-3, 0, 0.5, 0.4, floor=0.02, task="dtd"),
        record("lora", 1e-3, 1, None, None, state="diverged", floor=0.02, task="dtd"),
        record("lora", 1e-3, 2, None, None, state="failed", floor=0.02, task="dtd"),
    ]
    (overlay,) = make_overlays("mine", records)
    assert overlay.task == "images"
    assert overlay.curves[0].scores == pytest.approx((21.0,))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "it has no results yet"),
        ([record()], "its tasks are letters; take a study of metamathqa"),
        (
            [record(task="metamathqa"), record(task="metamathqa", rank=4)],
            "2 configurations of lora on metamathqa that differ in more than rate and seed",
        ),
        ([record("vera", task="metamathqa")], "no variant of the published study"),
    ],
)
def test_a_study_that_cannot_be_drawn_is_refused_in_one_line(records: list[Record], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_overlays("mine", records)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan")])
def test_a_noise_that_is_none_is_refused(noise: float) -> None:
    with pytest.raises(UsageError, match="--noise"):
        Published(noise=(1.0, noise))
