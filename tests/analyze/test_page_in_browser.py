"""The page in a real browser: figures are drawn, nothing is requested, nothing is wider than the window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic import study

from orchestrator.analyze.report import write_report
from orchestrator.record.study_file import StudyFile

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
]
# The page is shown in a frame of the given width, because Chromium's windows have a minimum width. A script
# writes the numbers of figures and images and the page's width into the document around the frame.
FRAME = """<body style="margin: 0">
<iframe src="report.html" style="border: 0; width: {width}px; height: 9000px"></iframe>
<script>
setInterval(() => {{
  const page = document.querySelector("iframe").contentDocument;
  document.body.dataset.found = [page.querySelectorAll(".js-plotly-plot .main-svg").length,
    page.documentElement.scrollWidth, page.querySelectorAll("figure img").length].join(" ");
}}, 100);
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    study_file = StudyFile("curves", "How far apart?", "python experiments/lr_sensitivity.py --dry-run")
    write_report(study_file, study(), path, "")
    return path


def opened(folder: Path, width: int) -> tuple[list[int], str]:
    """Open the page in a frame of this width.

    Returns:
        The number of Plotly's SVG elements, the width of the page in pixels and the number of images; and
        Chromium's log.
    """
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        f"--window-size={max(width, 500)},9000",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = re.search(r'data-found="([\d ]+)"', ended.stdout)
    assert found, ended.stderr
    return [int(number) for number in found[1].split()], ended.stderr


@pytest.mark.parametrize("width", [1280, 390])
def test_figures_are_drawn_and_nothing_is_wider_than_the_window(folder: Path, width: int) -> None:
    (parts, page_width, images), log = opened(folder, width)
    assert parts >= 3  # curves, heat map and spread
    assert page_width <= width
    assert images == 0
    assert "CONSOLE" not in log  # no error of the script, and no request that the page's policy has refused


def test_a_browser_that_cannot_inflate_shows_the_pictures_beside_the_page(folder: Path) -> None:
    page = folder / "report.html"
    whole = page.read_text()
    page.write_text(whole.replace("new DecompressionStream", "new UnknownStream"))
    try:
        (parts, _, images), log = opened(folder, 1279)
    finally:
        page.write_text(whole)
    assert (parts, images) == (0, 3)
    assert "UnknownStream is not defined" in log
