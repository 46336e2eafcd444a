"""docs/variants.md: its example is a variant that works."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from variants.api import Variant
from variants.testing import CASES, check_laws

DOCS_FILE = Path(__file__).parents[2] / "docs" / "variants.md"


def test_the_example_of_the_docs_is_a_variant_that_passes_the_laws(tmp_path: Path) -> None:
    """The section "Add a variant" has an example; it is executed as a file of its own."""
    block = (
        DOCS_FILE.read_text().partition("## Add a variant")[2].partition("```python\n")[2].partition("```")[0]
    )
    file = tmp_path / "scaled_columns.py"
    file.write_text(block)
    spec = importlib.util.spec_from_file_location("example.scaled_columns", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Variant)]
    (example,) = [each for each in classes if each.__module__ == module.__name__]
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 20
    check_laws(example(), CASES[:2])
