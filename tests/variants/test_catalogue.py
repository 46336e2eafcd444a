"""Names, and what is refused before anything is trained."""

from __future__ import annotations

import subprocess
import sys

import pytest

from variants import catalogue
from variants.base import Checked, Kind, Settings, Unsupported


def test_the_five_and_their_axes() -> None:
    expected = {
        "lora": ("baseline", Kind.STACKED),
        "rslora": ("optimization", Kind.STACKED),
        "dora": ("optimization", Kind.STACKED),
        "hira": ("rank", Kind.DENSE),
        "pissa": ("initialization", Kind.STACKED),
    }
    assert set(expected) <= set(catalogue.names())
    for name, (axis, kind) in expected.items():
        variant = catalogue.get(name)
        assert (catalogue.axis(name), variant.axis, variant.kind) == (axis, axis, kind)
        assert variant.checked == Checked.ORACLE
        assert variant.title
        assert variant.paper


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no variant 'rs-lora'. Did you mean 'rslora'\?"):
        catalogue.get("rs-lora")
    with pytest.raises(ValueError, match=f"Choose from: {', '.join(sorted(catalogue.names()))}"):
        catalogue.axis("zzz")


def test_names_need_no_torch() -> None:
    code = "import sys; from variants import catalogue; catalogue.names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", Settings(rank=0), "rank 0"),
        ("lora", Settings(rank=True), "rank True"),
        ("lora", Settings(alpha=float("nan")), "alpha nan"),
        ("lora", Settings(alpha=None), "alpha None"),
        ("lora", Settings(alpha=-1.0), "alpha -1.0"),
        ("lora", Settings(dropout=1.0), "dropout 1.0"),
        ("lora", Settings(extra={"svd": 4}), "lora does not know 'svd'; its own settings: none"),
        ("pissa", Settings(extra={"svd": "fast"}), "svd 'fast'"),
        ("pissa", Settings(extra={"svd": 0}), "svd '0'"),
    ],
)
def test_bad_settings_are_named(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        catalogue.get(name).checked_settings(settings)


def test_defaults_are_filled_in() -> None:
    assert catalogue.get("pissa").checked_settings(Settings()).extra == {"svd": "exact"}
    assert catalogue.get("hira").checked_settings(Settings(alpha=16.0)).alpha is None
