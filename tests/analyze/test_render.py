"""Tests of the three renderings of sections (terminal, Markdown, HTML page) and of the page in Chromium."""

from __future__ import annotations

import base64
import fcntl
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import pytest
from rich.cells import cell_len
from rich.console import Console

from orchestrator.analyze import chart_style, render
from orchestrator.analyze.chart_style import Chart
from orchestrator.analyze.render import Column, Section, Table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FINGERPRINT = "0a1b2c3d4e5f"


def chart(name: str) -> Chart:
    rows = [{"x": i, "y": i * i, "curve": f"<b>{i}", "fingerprint": FINGERPRINT} for i in (1, 2, 3)]

    def build(width: int) -> alt.Chart:
        drawn = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=300)
        encoded = drawn.encode(x="x:Q", y="y:Q", color="curve:N", tooltip=["curve:N"])
        sized: alt.Chart = encoded.properties(width=width - 150, height=120)
        return sized

    return Chart(f"A picture of {name}", build)


SCORES = Table(
    (
        Column("variant", "text"),
        Column("best rate"),
        Column("test score"),
        Column("95 % interval"),
        Column("lost at LoRA's best rate"),
        Column("validation score", more=True),
    ),
    (
        ("<b>lora</b>", "3e-3", "0.967", "[0.915, 1.000]", "0.00", "0.970 [0.920, 1.000]"),
        ("a|b", "5e-4 = 1e-3", "0.961", "[0.905, 0.998]", "0.02", "0.970 [0.920, 1.000]"),
        ("hira magnitude_of_the_update=rows_and_columns", "1e-1 (edge)", "0.012", "", "0.95", ""),
    ),
    dim=frozenset({2}),
)
RUNS = Table(
    (Column("variant", "text"), Column("fingerprint", "code"), Column("command", "command")),
    (("lora", FINGERPRINT, f"lora-orchestrator show {FINGERPRINT} --output '/a b|c'"),),
)
LONG = "python experiments/lr_sensitivity.py --variants lora hira pissa --output " + "/very/long/folder" * 9
SECTIONS = [
    Section("glance", "letters on <tiny>", "They differ.\n\nNot by much.", SCORES, None, "Rates.", "", LONG),
    Section("verdict", "Do they differ?", "Yes.", None, None, "By seeds.", "More:", "ls 'a b'", "supported"),
    Section("verdict-2", "How wide is it?", "One decade.", outcome="descriptive"),
    Section("limits", "2 limitations", "Three seeds.\n\nOne run diverged.", level="warning"),
    Section("faults", "The data", "Every test example is a train example.", level="alarm"),
    Section("curves", "Scores: letters", chart=chart("curves"), note="One point a rate."),
    Section("curves-2", "Losses: letters", chart=chart("curves-2")),
    Section("costs", "Costs: letters", "", RUNS, chart("costs"), note="Seconds.", folded=True),
    Section("definitions", "What these numbers mean", "Best rate: the best.", folded=True),
    Section("provenance", "Commands", "", RUNS, None, "", "The whole study:", "mlflow ui", in_terminal=False),
]  # fmt: skip


def terminal(sections: list[Section]) -> list[str]:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(render.to_terminal(sections))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


# -- terminal


def test_the_terminal_has_lines_of_at_most_80_columns_and_what_is_not_folded() -> None:
    lines = terminal(SECTIONS)
    assert max(map(cell_len, lines)) <= 80
    text = "\n".join(lines)
    for shown in (
        "SUPPORTED  Do they differ?",
        "DESCRIPTIVE  How wide",
        "! One run diverged.",
        "! Every test",
        "Rates.",
    ):
        assert shown in text
    for hidden in ("validation score", "Scores", "Costs", "What these numbers mean", "Commands", "mlflow"):
        assert hidden not in text


def test_numbers_of_a_table_are_whole_and_end_at_one_column() -> None:
    lines = terminal(SECTIONS)
    ends = [
        line.index(score) + len(score)
        for line in lines
        for score in ("0.967", "0.961", "0.012")
        if score in line
    ]
    assert len(ends) == 3
    assert len(set(ends)) == 1
    assert any("5e-4 = 1e-3" in line and "[0.905, 0.998]" in line for line in lines)


def test_columns_that_do_not_fit_are_left_out_from_the_right() -> None:
    columns = [Column("variant", "text"), *(Column(f"score {i}") for i in range(9))]
    table = Table(tuple(columns), (("lora", *["0.967 [0.915, 1.000]"] * 9),))
    lines = terminal([Section("a", "A", table=table)])
    assert max(map(cell_len, lines)) <= 80
    assert sum(line.count("0.967 [0.915, 1.000]") for line in lines) == 3
    assert not any("score 3" in line or "…" in line for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b c", "--folder", "it's"],
        [*map(str, range(80)), "x" * 70, "$HOME", "*"],
        ["y" * 300, "z"],
        ["--note", "it's a \\ long 'word' " * 20, "--seeds", "1"],
    ],
)
def test_a_printed_command_is_one_command_to_a_shell(words: list[str]) -> None:
    command = shlex.join(["printf", r"%s\0", *words])
    lines = terminal([Section("a", "A", command=command)])
    start = next(place for place, line in enumerate(lines) if line.startswith("  printf"))
    assert max(map(len, lines)) <= 80
    ended = subprocess.run(["sh"], input="\n".join(lines[start:]), capture_output=True, text=True, check=True)
    assert ended.stdout.split("\0")[:-1] == words
    assert not ended.stderr


# -- Markdown


def test_markdown_tables_have_equal_rows_and_names_are_no_markup() -> None:
    text = render.to_markdown(SECTIONS)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    scores = [row for row in rows if "/a b" not in row and "fingerprint" not in row][:5]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in scores} == {6}
    assert r"a\|b" in text
    assert r"\<b>lora\</b>" in text
    assert r"`lora-orchestrator show 0a1b2c3d4e5f --output '/a b\|c'`" in text
    assert "validation score" not in text


def test_markdown_has_verdicts_warnings_and_whole_commands_but_no_folded_section_and_no_chart() -> None:
    text = render.to_markdown(SECTIONS)
    assert "## Supported: Do they differ?" in text
    assert "- Three seeds.\n- One run diverged." in text
    assert f"```sh\n{LONG}\n```" in text
    assert text.endswith("The whole study:\n\n```sh\nmlflow ui\n```\n")
    assert not re.search("Scores|Losses|Costs|What these numbers mean|image", text)


# -- page


class Page(HTMLParser):
    """A parsed page: its start tags with their attributes, and the text of its script elements by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.setdefault(self.tags[-1][1].get("id", ""), data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def unpacked(self, script: str) -> str:
        return gzip.decompress(base64.b64decode(self.scripts[script])).decode()


@pytest.fixture(scope="module")
def text() -> str:
    return render.to_html("A <study>", "How far?", "rank 8 · seeds 0 to 2", ["84 finished"], SECTIONS)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_one_small_file_that_asks_for_nothing(text: str, page: Page) -> None:
    assert len(text) < 700_000
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert {name for tag, attributes in page.tags for name in attributes if name == "src"} == {"src"}
    assert "link" not in dict(page.tags)
    links = {link["href"] for link in page.all("a")}
    assert {link for link in links if not link.startswith("#")} == {
        f"{name}.{kind}" for name in ("curves", "curves-2", "costs") for kind in ("png", "svg")
    }
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert "default-src 'none'" in policy
    assert "eval" not in policy


def test_names_are_no_markup(text: str, page: Page) -> None:
    assert not page.all("b")
    assert "<h1>A &lt;study&gt;</h1>" in text
    assert "letters on &lt;tiny&gt;" in text
    assert "&lt;b&gt;lora" in text


def test_the_first_section_stands_above_the_contents_and_all_keep_their_order(text: str, page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == [section.name for section in SECTIONS]
    assert text.index('id="glance"') < text.index("<nav") < text.index('id="verdict"')
    contents = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert contents == [s.name for s in SECTIONS if s.name not in ("glance", "verdict-2")]
    assert ">Scores</a>" in text
    assert text.count("<details>") == 2


def test_a_title_keeps_what_follows_its_colon_where_the_contents_need_it() -> None:
    sections = [Section("a", "A"), *(Section(name, f"Scores: {name}") for name in ("letters", "digits"))]
    text = render.to_html("a", "", "", [], sections)
    assert ">Scores: letters</a>" in text
    assert ">Scores: digits</a>" in text


def test_each_chart_has_a_picture_for_both_color_schemes(page: Page) -> None:
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        f"A picture of {n}" for n in ("curves", "curves-2", "costs")
    ]
    for image in images:
        picture = ElementTree.fromstring(base64.b64decode(image["src"].partition(",")[2]))
        assert (picture.get("width"), picture.get("height")) == (image["width"], image["height"])
        assert (
            len([path for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("fill")]) >= 3
        )
        style = picture.findtext("{http://www.w3.org/2000/svg}style") or ""
        light, dark = chart_style.LIGHT, chart_style.DARK
        assert f'[fill="{light["ink"]}"]{{fill:{dark["ink"]}}}' in style


def test_the_script_has_each_chart_in_both_widths_and_both_themes(page: Page) -> None:
    data = json.loads(page.unpacked("charts"))
    assert list(data["charts"]) == ["curves", "curves-2", "costs"]
    wide, narrow = (data["charts"]["curves"][width]["width"] for width in ("wide", "narrow"))
    assert wide - narrow == chart_style.WIDE - chart_style.PHONE
    assert data["themes"] == {"light": chart_style.theme(False), "dark": chart_style.theme(True)}
    assert "vegaEmbed" in page.unpacked("library")


def test_a_page_without_charts_has_no_library() -> None:
    text = render.to_html("a", "", "", [], [Section("a", "A", table=Table((Column("variant", "text"),), ()))])
    assert len(text) < 20_000
    assert "<nav" not in text
    assert "<table" not in text


def test_only_a_table_with_more_columns_has_a_switch(page: Page) -> None:
    assert [each["type"] for each in page.all("input")] == ["checkbox"]


# -- the page in a browser


class Browser:
    """A headless Chromium, which the tests control by the Chrome DevTools Protocol through two pipes."""

    def __init__(self, profile: Path) -> None:
        theirs, self._write = os.pipe()
        self._read, their_write = os.pipe()

        def place_pipes() -> None:
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs, their_write)]
            for place, end in enumerate(high, 3):
                os.dup2(end, place)

        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--force-device-scale-factor=1",
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4), preexec_fn=place_pipes, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(their_write)
        self._rest, self._count, self._session = b"", 0, ""
        self.faults: list[dict[str, Any]] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") in (
                "Log.entryAdded",
                "Runtime.exceptionThrown",
                "Runtime.consoleAPICalled",
            ):
                self.faults.append(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            self._rest += os.read(self._read, 1 << 20) or b'{"error": "Chromium has ended", "id": -1}\0'
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        assert answer.get("id") != -1, answer
        return answer

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + 60
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.1)

    def open(self, path: Path, width: int, height: int, scheme: str) -> None:
        metrics = {"deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics)
        self.emulate("", scheme)
        self.send("Page.navigate", url=f"{path.as_uri()}?{time.monotonic_ns()}")
        self.wait_for("document.readyState == 'complete' && !!document.querySelector('figure')")

    def emulate(self, media: str, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text)
    return path


in_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
DRAWN = "document.querySelectorAll('figure.drawn .plot svg').length == 3"


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light")]
)
def test_the_page_draws_all_charts_without_scrolling_and_fits_the_window(
    browser: Browser, file: Path, width: int, height: int, scheme: str
) -> None:
    browser.faults.clear()
    browser.open(file, width, height, scheme)
    browser.wait_for(DRAWN)
    assert browser.evaluate("scrollY") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('table').getBoundingClientRect().bottom") < height
    legend = "document.querySelector('.plot .role-legend-label text').getAttribute('fill')"
    colors = {"light": chart_style.LIGHT, "dark": chart_style.DARK}
    assert browser.evaluate(legend) == colors[scheme]["soft"]
    browser.emulate("", "dark" if scheme == "light" else "light")
    browser.wait_for(f"{legend} == '{colors['dark' if scheme == 'light' else 'light']['soft']}'")
    assert browser.faults == []


@in_browser
@pytest.mark.slow
def test_points_tell_their_values_and_their_command(browser: Browser, file: Path) -> None:
    browser.faults.clear()
    browser.open(file, 1280, 800, "light")
    browser.wait_for(DRAWN)
    box = (
        "(() => { const point = document.querySelector('#curves .mark-symbol.role-mark path');"
        " point.scrollIntoView({block: 'center'}); return point.getBoundingClientRect().toJSON(); })()"
    )
    place = browser.evaluate(box)
    at = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
    browser.wait_for("!!document.querySelector('#vg-tooltip-element.visible')")
    assert "<b>1" in browser.evaluate("document.querySelector('#vg-tooltip-element').textContent")
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    browser.wait_for("document.querySelector('#curves output').textContent != ''")
    command = browser.evaluate("document.querySelector('#curves output code').textContent")
    assert command == f"lora-orchestrator show {FINGERPRINT}"
    assert browser.faults == []


@in_browser
@pytest.mark.slow
def test_links_open_folded_sections_and_print_shows_every_picture(browser: Browser, file: Path) -> None:
    browser.open(file, 1280, 800, "dark")
    browser.wait_for(DRAWN)
    browser.evaluate("document.querySelector('nav a[href=\"#costs\"]').click()")
    browser.wait_for("document.querySelector('#costs details').open")
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 1
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    browser.emulate("print", "dark")
    images = "[...document.querySelectorAll('figure img')]"
    shown = f"{images}.filter(each => each.checkVisibility() && each.width > 300).length"
    assert browser.evaluate(shown) == 3
    assert not browser.evaluate(
        "[...document.querySelectorAll('.plot')].some(each => each.checkVisibility())"
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.evaluate("dispatchEvent(new Event('afterprint'))")
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 1


@in_browser
@pytest.mark.slow
def test_the_pictures_stay_where_the_script_fails(browser: Browser, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(text.replace("new DecompressionStream", "new UnknownStream"))
    browser.open(path, 1280, 800, "light")
    browser.wait_for("document.querySelector('#curves img').naturalWidth > 300")
    assert browser.evaluate("document.querySelector('#curves img').checkVisibility()")
    assert not browser.evaluate("!!document.querySelector('.plot svg')")
