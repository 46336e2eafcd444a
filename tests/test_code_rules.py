"""Rules of the code that neither ruff nor import-linter checks: sizes, private names of Ray, advice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "experiments", "orchestrator", "tests", "variants")
PRIVATE_OF_RAY = re.compile(r"\bray(?:\.\w+)*\._[a-z]\w+")
PRIVATE_OF_RAY_FILE = ROOT / "orchestrator" / "execution" / "private_ray.py"
BUDGETS = {
    "orchestrator": (159, 22938),
    "orchestrator/analyze": (24, 5661),
    "orchestrator/cli": (4, 315),
    "orchestrator/cluster": (3, 230),
    "orchestrator/execution": (16, 2513),
    "orchestrator/export": (5, 669),
    "orchestrator/finetune": (64, 8294),
    "orchestrator/launch": (8, 1430),
    "orchestrator/record": (12, 1675),
    "orchestrator/study": (11, 1502),
    "orchestrator/util": (8, 543),
    "variants": (108, 6107),
    "experiments": (17, 2240),
    "tests": (262, 33604),
}
"""Package -> (modules, lines of code) that it may have at most. A change that makes one smaller
lowers its numbers; a change that raises one says what that is worth."""
DOC_WORDS = 38_128
"""Words that all pages may have together."""


def sources(*folders: str) -> list[Path]:
    """Return the Python files below the folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the path relative to the root of the repository."""
    return path.relative_to(ROOT).as_posix()


PROGRAM = sources("orchestrator", "variants", "experiments")


def count_code(path: Path) -> int:
    """Return the number of lines that are neither blank, nor comments, nor bare strings (docstrings)."""
    lines = path.read_text().split("\n")
    code = {
        number for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")
    }
    prose: set[int] = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            code.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.update(range(node.lineno, node.end_lineno + 1))
    return len(code - prose)


def test_no_package_exceeds_its_budget() -> None:
    sizes = {name_of(path): count_code(path) for path in (*PROGRAM, *sources("tests"))}
    found: dict[str, tuple[int, int]] = {}
    for package in BUDGETS:
        inside = [size for name, size in sizes.items() if name.startswith(f"{package}/")]
        found[package] = (len(inside), sum(inside))
    assert {
        package: f"{size}, at most {most}"
        for package, most in BUDGETS.items()
        if (size := found[package])[0] > most[0] or size[1] > most[1]
    } == {}


def test_the_pages_exceed_no_budget() -> None:
    pages = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
    assert sum(len(page.read_text().split()) for page in pages) <= DOC_WORDS


def test_private_names_of_ray_are_in_one_file() -> None:
    """A new version of Ray may change `ray._private`, `ray.train.v2._internal`, ... without notice."""
    found = {
        name_of(path): names
        for path in PROGRAM
        if path != PRIVATE_OF_RAY_FILE and (names := PRIVATE_OF_RAY.findall(path.read_text()))
    }
    assert found == {}


def test_no_advice_installs_this_project_from_an_index() -> None:
    """It is on none: the command would fail, or install what somebody else has put there."""
    paths = (*PROGRAM, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md")
    advice = re.compile(r"pip install [^\n`]*\blora-orchestrator\b(?!/)")
    assert [name_of(path) for path in paths if advice.search(path.read_text())] == []


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:e|f|orchestrator|variants)/[\w/]+(?:\.py|/))", text)
    folders = {"e": "orchestrator/execution", "f": "orchestrator/finetune"}
    paths = {name: ROOT / re.sub(r"^[ef](?=/)", lambda match: folders[match[0]], name) for name in named}
    assert [name for name, path in paths.items() if not path.exists()] == []
