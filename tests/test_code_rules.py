"""Rules of the code that neither ruff nor import-linter checks: sizes, names of modules, retired words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_BYTES, MAX_FUNCTION_LINES = 500, 20_000, 60
SHARED_NAMES = {"__init__", "__main__", "adapters", "base", "catalogue", "errors", "export"}
"""Names that several modules may have, because each package may have such a module."""
PRIVATE_OF_RAY = re.compile(r"\bray(?:\.\w+)*\._[a-z]\w+")
PRIVATE_OF_RAY_FILE = ROOT / "orchestrator" / "execution" / "ray" / "private.py"
RETIRED = {
    "seat": "trainer",
    "seats": "trainers",
    "packs": "lane groups",
    "bench": "BaseModel",
    "workshop": "Engine",
    "BadInput": "UsageError",
    "evidence": "calibration",
    "ledger": "budget",
}
"""Words of earlier versions, with the words that replace them (docs/architecture.md, glossary)."""
KEPT = {
    "docs/architecture.md",  # The glossary lists the earlier words.
    "docs/options.md",  # The page lists the earlier names of options.
    "orchestrator/study/retired_options.py",
    "orchestrator/record/store.py",  # A store on disk has a folder `evidence`.
    "orchestrator/study/study_name.py",  # This file names the same folder.
}
"""Files that need a retired word, because it is a name on disk or an option of an earlier version."""


def sources(*folders: str) -> list[Path]:
    """Return the Python files below the folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the path relative to the root of the repository."""
    return path.relative_to(ROOT).as_posix()


PROGRAM = sources("orchestrator", "variants", "experiments")


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of each function in a file, without its decorators."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_module_is_too_large() -> None:
    sizes = {name_of(path): (len(path.read_text().splitlines()), path.stat().st_size) for path in PROGRAM}
    assert {n: size for n, size in sizes.items() if size[0] > MAX_LINES or size[1] > MAX_BYTES} == {}


def test_no_function_is_too_long() -> None:
    sizes = {f"{name_of(path)}: {name}": lines for path in PROGRAM for name, lines in functions(path)}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES} == {}


def test_no_two_modules_have_one_name() -> None:
    by_name: dict[str, list[str]] = {}
    for path in sources("orchestrator", "variants"):
        by_name.setdefault(path.stem, []).append(name_of(path))
    assert {n: paths for n, paths in by_name.items() if len(paths) > 1 and n not in SHARED_NAMES} == {}


def test_private_names_of_ray_are_in_one_file() -> None:
    """A new version of Ray may change `ray._private`, `ray.train.v2._internal`, ... without notice."""
    found = {
        name_of(path): names
        for path in PROGRAM
        if path != PRIVATE_OF_RAY_FILE and (names := PRIVATE_OF_RAY.findall(path.read_text()))
    }
    assert found == {}


def test_retired_words_are_not_used() -> None:
    found: dict[str, set[str]] = {}
    for path in (*PROGRAM, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"):
        words = set(re.findall(r"[A-Za-z]+", path.read_text().replace("_", " "))) & RETIRED.keys()
        if words and name_of(path) not in KEPT:
            found[name_of(path)] = words
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
    assert len(paths) > 40
    assert [name for name, path in paths.items() if not path.exists()] == []
