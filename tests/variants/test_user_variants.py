"""Variants in a user's file and in an installed package: names, settings, laws, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from variants import catalogue
from variants.adapters import attach
from variants.api import UnsupportedError, VariantSettings
from variants.storage import load_lane, save_lane
from variants.testing import Case
from variants.testing.rig import tensors_equal
from variants.variant_settings import ENTRY_POINT_GROUP, canonical_key

OWN = '''
"""A LoRA whose scaling is a hyperparameter."""

from variants.api import Number, VariantSettings
from variants.baseline.lora import LoRA


class Scaled(LoRA):
    """W' = W + factor B A."""

    uses_alpha = False
    hyperparameters = {"factor": Number(2.0, above=0)}
    peft = None

    def scaling(self, settings: VariantSettings) -> float:
        return settings["factor"]
'''
NEEDS_ARGUMENT = """

class NeedsArgument(LoRA):
    def __init__(self, argument):
        self.argument = argument
"""
LLAMA = Case("llama", model="llama")


def write(folder: Path, text: str = OWN, name: str = "my-own.v2.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_outside_the_package_is_a_variant_of_the_axis_user(tmp_path: Path) -> None:
    path = write(tmp_path)
    variant = catalogue.get(path)
    assert (variant.name, variant.source_path, variant.axis) == ("my-own.v2.py", path, "user")
    assert variant.extra_defaults == {"factor": 2.0}


def test_a_relative_path_names_the_same_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert catalogue.get("my-own.v2.py") is catalogue.get(path)
    assert canonical_key("./my-own.v2.py.fac-tor") == "my-own.v2.py.fac_tor"


def test_the_revision_is_that_of_the_content(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    texts = (OWN, OWN, OWN.replace("2.0", "4.0"))
    a, b, c = (catalogue.get(write(f, text)).revision for f, text in zip(folders, texts, strict=True))
    assert a == b != c
    assert catalogue.get("lora").revision == ""


def test_a_lane_of_another_revision_is_not_loaded(tmp_path: Path) -> None:
    variant = catalogue.get(write(tmp_path))
    adapters = attach(LLAMA.build(), variant, VariantSettings(4))
    adapters.add_lane("a", VariantSettings(4), 0)
    save_lane(adapters, "a", tmp_path / "a.safetensors")
    adapters.remove_lane("a")
    load_lane(adapters, "a", tmp_path / "a.safetensors")
    adapters.remove_lane("a")
    vars(variant).update(revision="f" * 16)
    with pytest.raises(UnsupportedError, match="was saved with revision"):
        load_lane(adapters, "a", tmp_path / "a.safetensors")


def test_a_lane_is_known_by_the_content_of_the_variants_file(tmp_path: Path) -> None:
    """The file may be renamed. The class counts too, since a package's file may have several variants."""
    variant = catalogue.get(write(tmp_path))
    adapters = attach(LLAMA.build(), variant, VariantSettings(4))
    adapters.add_lane("a", VariantSettings(4), 0)
    save_lane(adapters, "a", tmp_path / "a.safetensors")
    renamed = catalogue.get(write(tmp_path, name="renamed.py"))
    assert renamed.name != variant.name
    others = attach(LLAMA.build(), renamed, VariantSettings(4))
    load_lane(others, "a", tmp_path / "a.safetensors")
    assert tensors_equal(others.trainable("a"), adapters.trainable("a"))
    type(renamed).__qualname__ = "Other"
    with pytest.raises(UnsupportedError, match=r"holds a lane of my-own\.v2\.py, not of renamed\.py"):
        load_lane(others, "b", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("import sys\nsys.exit(3)", r"\(line 2\) cannot be imported: SystemExit"),
        (OWN + OWN.replace("Scaled", "Other"), "it defines 2"),
    ],
)
def test_a_file_that_is_no_variant_gives_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnsupportedError, match=message) as raised:
        catalogue.get(str(path))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def install(folder: Path, **targets: str) -> None:
    """Write a package with entry points for variants, as pip installs it: name -> target."""
    (folder / "my_package.py").write_text(OWN + NEEDS_ARGUMENT)
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in targets.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines, ""]))


def run(folder: Path, code: str) -> list[str]:
    """Run code in a process that finds the packages in a folder, and return the lines that it prints."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom variants import catalogue\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_package_registers_a_variant(tmp_path: Path) -> None:
    install(tmp_path, **{"my-scaled": "my_package:Scaled"})
    code = """
from variants.__main__ import main
print('my_scaled' in catalogue.names(), 'torch' in sys.modules)
v = catalogue.get('my_scaled')
print(v.name, v.axis, dict(v.extra_defaults), len(v.revision))
main([])
"""
    first, second, *rest = run(tmp_path, code)
    assert first == "True False"
    assert second == "my_scaled user {'factor': 2.0} 16"
    assert any(line.startswith("my_scaled") for line in rest)


@pytest.mark.slow  # a process that imports torch
def test_a_broken_entry_point_gives_one_line(tmp_path: Path) -> None:
    targets = {"a": "my_package:Missing", "b": "json:loads", "c": "my_package:NeedsArgument"}
    install(tmp_path, **targets)
    code = """
for name in ('a', 'b', 'c'):
    try: catalogue.get(name)
    except ValueError as error: print(error)
"""
    lines = run(tmp_path, code)
    words = ("cannot be imported: AttributeError", "is no subclass", "cannot be imported: TypeError")
    assert len(lines) == 3
    assert all(word in line for word, line in zip(words, lines, strict=True))
