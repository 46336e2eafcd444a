"""Every variant of the catalogue satisfies every law on every case.

The default run checks each law of each variant on one case. The laws of FORMS are checked for every variant
on a model whose files are saved and loaded, and for LoRA on all cases. The tests marked `slow` add a pairwise
cover of the cases for the variants in COVERED (except for the law that trains for long). All other
combinations are marked `nightly`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import broken
import pytest
import torch

from variants import catalogue
from variants.baseline.lora import LoRA
from variants.export_forms import export_forms
from variants.testing import CASES, LAWS, Case, NotApplicableError, applies, check_laws

COVERED = (
    "adalora",
    "dora",
    "eva",
    "full",
    "head_only",
    "hira",
    "lora",
    "lora_moe",
    "pissa",
    "relora",
    "vera",
)
"""Variants of which each uses another part of the contract."""

FORMS = {"export_loads_in_peft": "peft", "merged_equals_forward": "merged"}
"""Law about a form of export -> the field of `ExportForms` that says whether a variant has this form."""
SAVED = "llama-float32-several"
"""The case on which the default run checks these laws for every variant: PEFT and transformers load the files
of the base model, of the adapter and of the merged model."""

EXCEPTIONS = {
    ("goat", "fits_a_representable_target"): (
        ("tall-bias-float32-one", "wide-nobias-float32-several"),
        "Each token uses two of four experts of rank 1, and their selection has no gradient: the loss falls "
        "to 0.13 and 0.16 of its first value, and 1000 steps instead of 150 reach 0.05 at best.",
    )
}
"""(variant, law) -> cases on which the variant breaks the law by its nature, and the reason."""


def traits(cases: Iterable[Case]) -> set[tuple[str, object]]:
    """Return the values in `cases` that a cover pairs with a law."""
    found: set[tuple[str, object]] = set()
    for case in cases:
        found |= {("model", case.model), ("dtype", case.dtype), ("several lanes", case.lanes > 1)}
        found.add(("nf4", case.nf4))
        if not case.is_language_model:  # Language models have fixed shapes and biases.
            found |= {("tall", case.out_features > case.in_features), ("bias", case.bias)}
    return found


@cache
def cover(cases: tuple[Case, ...], first: Case) -> tuple[Case, ...]:
    """Return a smallest subset of `cases` that includes `first` and has all traits of `cases`."""
    choices = ((first, *more) for size in range(len(cases)) for more in combinations(cases, size))
    return next(chosen for chosen in choices if traits(chosen) == traits(cases))


def applicable_cases(law: str, name: str) -> tuple[Case, ...]:
    return tuple(case for case in CASES if applies(LAWS[law], catalogue.get(name), case))


def is_covered(name: str, law: str) -> bool:
    """Return whether the slow run checks the law on a cover of all cases."""
    return name in COVERED and law != "fits_a_representable_target"


def parameters() -> Iterator[Any]:
    """Yield all combinations. The default cases start at a different one for each variant and law."""
    for i, name in enumerate(catalogue.names()):
        # This file has no expensive fixtures, so the workers of pytest-xdist may share it.
        group = pytest.mark.xdist_group(f"laws-{name}")
        for j, law in enumerate(LAWS):
            cases = applicable_cases(law, name)
            first = cases[(i + j) % len(cases)]
            saved = tuple(case for case in cases if law in FORMS and case.name == SAVED)
            default = cases if law in FORMS and name == "lora" else saved or (first,)
            covered = cover(cases, first) if is_covered(name, law) else ()
            for case in cases:
                marks = [group]
                if case not in default:
                    marks.append(pytest.mark.slow if case in covered else pytest.mark.nightly)
                exceptions, reason = EXCEPTIONS.get((name, law), ((), ""))
                if case.name in exceptions:
                    marks.append(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
                yield pytest.param(name, case, law, id=f"{name}-{case.name}-{law}", marks=marks)


PARAMETERS = list(parameters())


@pytest.mark.parametrize(("name", "case", "law"), PARAMETERS)
def test_law(name: str, case: Case, law: str) -> None:
    try:
        LAWS[law](catalogue.get(name), case)
    except NotApplicableError as reason:
        form = getattr(export_forms(catalogue.get(name)), FORMS[law]) if law in FORMS else None
        if form is not None and form.possible and not (case.model == "gpt2" and "Conv1D" in form.note):
            raise AssertionError(f"{FORMS[law]} is possible, says the catalogue, but: {reason}") from None
        pytest.skip(str(reason))


def test_the_three_runs_are_the_whole_product_and_the_first_two_meet_every_pair() -> None:
    names = catalogue.names()
    product = [(name, case, law) for name in names for law in LAWS for case in applicable_cases(law, name)]
    assert [each.values for each in PARAMETERS] == product
    marks = {each.values: {mark.name for mark in each.marks} for each in PARAMETERS}
    default = {values for values, found in marks.items() if not found & {"slow", "nightly"}}
    in_ci = {values for values, found in marks.items() if "nightly" not in found}
    for name in names:
        for law in LAWS:
            assert [case for case in CASES if (name, case, law) in default]
            if is_covered(name, law):
                chosen = [case for case in CASES if (name, case, law) in in_ci]
                assert traits(chosen) == traits(applicable_cases(law, name)), f"{name}, {law}"
    pairs = {(case, law) for _, case, law in product}
    assert {(case, law) for _, case, law in in_ci} == pairs, "a case that no variant meets before the night"


def test_check_laws_accepts_a_correct_variant_and_names_the_law_that_a_broken_one_breaks() -> None:
    case = CASES[0]
    check_laws(LoRA(), [case])
    with pytest.raises(AssertionError, match=f"broken breaks merged_equals_forward on {case.name}"):
        check_laws(broken.MergesUnscaled(), [case])


def test_independence_is_checked_with_one_thread() -> None:
    """With two, AdaLoRA's gradients on this case would depend on the number of lanes."""
    case = next(one for one in CASES if one.name.startswith("tall-bias-float32-one"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        LAWS["lanes_are_independent"](catalogue.get("adalora"), case)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_laws_can_be_imported_without_pytest_and_peft() -> None:
    code = "import sys, variants.testing; print({'pytest', 'peft'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"
