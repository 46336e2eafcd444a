"""The catalogue's names and the validation of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from variants import catalogue
from variants.api import Batching, UnsupportedError, VariantSettings, VerifiedBy
from variants.errors import suggest_nearest


def test_five_variants_have_their_axis_batching_and_verification() -> None:
    expected = {
        "lora": ("baseline", Batching.BATCHED),
        "rslora": ("optimization", Batching.BATCHED),
        "dora": ("optimization", Batching.BATCHED),
        "hira": ("rank", Batching.DENSE),
        "pissa": ("initialization", Batching.BATCHED),
    }
    assert set(expected) <= set(catalogue.names())
    for name, (axis, batching) in expected.items():
        variant = catalogue.get(name)
        assert (variant.axis, variant.batching) == (axis, batching)
        assert variant.verified_by == VerifiedBy.REFERENCE_IMPLEMENTATION


def test_every_variant_that_was_verified_by_its_rule_has_a_test_of_it() -> None:
    verified = [
        name
        for name in catalogue.names()
        if catalogue.get(name).verified_by in (VerifiedBy.AUTHORS_CODE, VerifiedBy.PAPER)
    ]
    assert len(verified) > 30
    files = [*Path(__file__).parent.glob("rules/test_*.py"), *Path(__file__).parent.glob("test_*.py")]
    texts = [file.read_text() for file in files if file != Path(__file__)]
    assert [name for name in verified if not any(f'"{name}"' in text for text in texts)] == []


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"no variant 'rs-lora'. Did you mean 'rslora'\?"):
        catalogue.get("rs-lora")
    with pytest.raises(ValueError, match=f"Choose from: {', '.join(sorted(catalogue.names()))}"):
        catalogue.get("zzz")


def test_two_exchanged_letters_are_put_right() -> None:
    """The commonest mistake, of which `lroa` was answered with `road`."""
    names, wrong = catalogue.built_in_names(), []
    for name in names:
        for i in range(len(name) - 1):
            typed = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
            if typed not in names and suggest_nearest(typed, names) != f"Did you mean {name!r}?":
                wrong.append(typed)
    assert not wrong


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", VariantSettings(rank=0), "rank 0"),
        ("lora", VariantSettings(rank=True), "rank True"),
        ("lora", VariantSettings(alpha=float("nan")), "alpha nan"),
        ("lora", VariantSettings(alpha=None), "alpha None"),
        ("lora", VariantSettings(alpha=-1.0), "alpha -1.0"),
        ("lora", VariantSettings(dropout=1.0), "dropout 1.0"),
        ("lora", VariantSettings(extra={"svd": 4}), "lora does not know 'svd'; its own settings: none"),
        ("pissa", VariantSettings(extra={"svd": "fast"}), "svd 'fast'"),
        ("relora", VariantSettings(extra={"merges": 0}), "merges 0: must be a whole number of at least 1"),
        ("relora", VariantSettings(extra={"pruned": 1.0}), "must be a number of at least 0 and below 1"),
        ("lora_ga", VariantSettings(extra={"gamma": 0}), "gamma 0: must be a finite number above 0"),
        ("delta_lora", VariantSettings(extra={"ratio": float("nan")}), "ratio nan"),
        (
            "pissa",
            VariantSettings(extra={"svd": 0}),
            "svd 0: must be 'exact' or a number of power iterations",
        ),
    ],
)
def test_invalid_settings_are_refused(name: str, settings: VariantSettings, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        catalogue.get(name).validate_settings(settings)


def test_defaults_are_filled_in() -> None:
    assert catalogue.get("pissa").validate_settings(VariantSettings()).extra == {"svd": "exact"}
    assert catalogue.get("hira").validate_settings(VariantSettings(alpha=16.0)).alpha is None
