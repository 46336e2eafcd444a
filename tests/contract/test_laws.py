"""Every variant of the catalogue satisfies every law on every case.

The default run checks the laws of CHEAP for each variant, and nearly all laws for one variant of each kind
(KINDS), on one case each. The tests marked `slow` add all other laws on one case each, and for the variants
in KINDS all cases (except for the law that trains for long). The laws of FORMS are checked on a model whose
files are saved and loaded, and for LoRA on all cases, in the default run. All other combinations are marked
`nightly`.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import broken
import pytest
import torch
from kinds import KINDS
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import (
    AdaptationScope,
    AuxiliaryLoss,
    Batching,
    UnsupportedError,
    Variant,
    VariantSettings,
)
from variants.baseline.lora import LoRA
from variants.describe import export_forms
from variants.testing import CASES, LAWS, Case, NotApplicableError, applies, check_laws, find_broken_laws
from variants.testing.rig import (
    attach_lanes,
    backward,
    lane_outputs,
    perturb_lanes,
    relative_error,
    tensors_equal,
    train,
)

NAMES = catalogue.names()
CHEAP = (
    "starts_as_declared",
    "every_tensor_gets_a_gradient",
    "removal_restores_the_base",
    "frozen_stays_frozen",
    "parameter_count_follows_from_shapes",
)
FITTED = ("hira", "lora", "lora_moe")
"""The variants of which the default run checks that they fit a target, which takes hundreds of steps."""

FORMS = {"export_loads_in_peft": "peft", "merged_equals_forward": "merged"}
"""Law about a form of export -> the form of `export_forms` that says whether a variant has this form."""
SAVED = "llama-float32-several"
"""The case on which these laws are checked for every variant: PEFT and transformers load the files of the
base model, of the adapter and of the merged model."""

EXCEPTIONS = {
    ("goat", "fits_a_representable_target"): (
        ("tall-bias-float32-one", "wide-nobias-float32-several"),
        "Each token uses two of four experts of rank 1, and their selection has no gradient: the loss falls "
        "to 0.13 and 0.16 of its first value, and 1000 steps instead of 150 reach 0.05 at best.",
    )
}
"""(variant, law) -> cases on which the variant breaks the law by its nature, and the reason."""


def applicable_cases(law: str, name: str) -> tuple[Case, ...]:
    return tuple(case for case in CASES if applies(LAWS[law], catalogue.get(name), case))


def is_default(name: str, law: str) -> bool:
    """Return whether the default run checks the law."""
    return name in FITTED if law == "fits_a_representable_target" else law in CHEAP or name in KINDS


def chosen_cases(name: str, law: str) -> tuple[Case, ...]:
    """Return the cases of the default and the slow run; the first is another one for each variant and law."""
    cases = applicable_cases(law, name)
    turn = (NAMES.index(name) + list(LAWS).index(law)) % len(cases)
    count = len(cases) if name in KINDS and law != "fits_a_representable_target" else 1
    saved = tuple(case for case in cases if law in FORMS and case.name == SAVED)
    return (*saved, *(case for case in (*cases[turn:], *cases[:turn])[:count] if case not in saved))


def group_of(name: str) -> pytest.MarkDecorator:
    """Let the workers of pytest-xdist share this file, which has no expensive fixtures."""
    return pytest.mark.xdist_group(f"laws-{name}")


def parameters() -> list[Any]:
    """Return the combinations of the default and the slow run."""
    found = []
    for name in NAMES:
        for law in LAWS:
            for number, case in enumerate(chosen_cases(name, law)):
                marks = [group_of(name)]
                is_usual = number == 0 or (law in FORMS and name == "lora")
                if not (is_usual and is_default(name, law)):
                    marks.append(pytest.mark.slow)
                found.append(pytest.param(name, case, law, id=f"{name}-{case.name}-{law}", marks=marks))
    return found


PARAMETERS = parameters()


def check_law(name: str, case: Case, law: str) -> None:
    """Check a law, and that it does not apply only where the catalogue says so.

    Raises:
        AssertionError: The variant breaks the law, though not by its nature.
        NotApplicableError: The law does not apply.
    """
    exceptions, reason = EXCEPTIONS.get((name, law), ((), ""))
    if case.name in exceptions:
        with pytest.raises(AssertionError):
            LAWS[law](catalogue.get(name), case)
        raise NotApplicableError(reason)
    try:
        LAWS[law](catalogue.get(name), case)
    except NotApplicableError as refusal:
        form = export_forms(catalogue.get(name))[FORMS[law]] if law in FORMS else None
        if form and form["possible"] and not (case.model == "gpt2" and "Conv1D" in form["note"]):
            raise AssertionError(f"{FORMS[law]} is possible, says the catalogue, but: {refusal}") from None
        raise


@pytest.mark.parametrize(("name", "case", "law"), PARAMETERS)
def test_law(name: str, case: Case, law: str) -> None:
    try:
        check_law(name, case, law)
    except NotApplicableError as reason:
        pytest.skip(str(reason))


@pytest.mark.nightly
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=group_of(name)) for name in NAMES])
def test_law_on_all_other_cases(name: str, law: str) -> None:
    broken_on = {}
    for case in applicable_cases(law, name):
        if case not in chosen_cases(name, law):
            try:
                check_law(name, case, law)
            except NotApplicableError:
                continue
            except AssertionError as error:
                broken_on[case.name] = error
    assert broken_on == {}


def test_the_default_and_the_slow_run_meet_every_law_variant_and_pair_of_law_and_case() -> None:
    marks = {each.values: {mark.name for mark in each.marks} for each in PARAMETERS}
    default = [values for values, found in marks.items() if "slow" not in found]
    assert {name for name, _, _ in default} == set(NAMES)
    assert {law for _, _, law in default} == set(LAWS)
    assert {(name, law) for name, _, law in marks} == set(product(NAMES, LAWS))
    pairs = {(case, law) for name in NAMES for law in LAWS for case in applicable_cases(law, name)}
    assert {(case, law) for _, case, law in marks} == pairs, "a case that no variant meets before the night"


# Each broken variant is detected by exactly one law, so no law is empty or redundant.


BY_NAME = {case.name: case for case in CASES}
ONE, SEVERAL = BY_NAME["tall-bias-float32-one"], BY_NAME["wide-nobias-float32-several"]

MUTANTS: list[tuple[type[Variant], Case, str]] = [
    (broken.StartsElsewhere, SEVERAL, "starts_as_declared"),
    (broken.DeadTensor, SEVERAL, "every_tensor_gets_a_gradient"),
    (broken.MergesUnscaled, ONE, "merged_equals_forward"),
    (broken.RoundsTheBase, SEVERAL, "removal_restores_the_base"),
    (broken.MovesFrozen, ONE, "frozen_stays_frozen"),
    (broken.ForgetsFrozen, SEVERAL, "saved_lane_is_restored"),
    (broken.LeaksBetweenLanes, SEVERAL, "lanes_are_independent"),
    (broken.ScalesAcrossExperts, SEVERAL, "lanes_are_independent"),
    (broken.CountsWrong, ONE, "parameter_count_follows_from_shapes"),
    (broken.GoesUphill, SEVERAL, "fits_a_representable_target"),
    (broken.ExportsWrongAlpha, SEVERAL, "export_loads_in_peft"),
]


FEW = ("lanes_are_independent", "merged_equals_forward", "saved_lane_is_restored")
"""The laws whose broken variants the default run checks; all laws run to show that one alone is broken."""


@pytest.mark.parametrize(
    ("kind", "case", "law"),
    [
        pytest.param(*mutant, id=mutant[2], marks=() if mutant[2] in FEW else pytest.mark.slow)
        for mutant in MUTANTS
    ],
)
def test_a_broken_variant_breaks_one_law_only(kind: type[Variant], case: Case, law: str) -> None:
    assert [found for found, _ in find_broken_laws(kind(), case)] == [law]


def test_every_law_has_a_broken_variant() -> None:
    assert {law for _, _, law in MUTANTS} == set(LAWS)


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


# A lane's gradients among other lanes. On a GPU, a lane in a group equals the lane alone up to rounding,
# because the order of sums may differ. At rank 1, PyTorch alone would sum products with a single column in
# another order for one lane than for several.


WITH_LANES = [case for case in CASES if case.lanes > 1]
ON_GPU = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, case in product(NAMES, WITH_LANES)
    if torch.cuda.is_available()
]
"""Empty without a GPU, so that there are not hundreds of skipped tests."""


def gradients(case: Case, adapters: Adapters, lanes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients of lane "1" after one backward pass of these lanes together."""
    for lane in lanes:
        for parameter in adapters.trainable(lane).values():
            parameter.grad = None
    auxiliary = backward(case, adapters, lanes, [0] * len(lanes))
    assert (auxiliary is not None) == isinstance(adapters.variant, AuxiliaryLoss)
    return {n: p.grad.clone() for n, p in adapters.trainable("1").items() if p.grad is not None}


def check_lanes_agree(name: str, case: Case) -> None:
    variant = catalogue.get(name)
    if variant.batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} trains one lane at a time")
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and case.model != "headed":
        pytest.skip("the model has no head")
    adapters = attach_lanes(case, variant, 3, VariantSettings(4, 8.0, dropout=0.1))
    perturb_lanes(case, adapters)
    alone = lane_outputs(case, adapters, ["1"])
    assert relative_error(lane_outputs(case, adapters).chunk(3)[1], alone) < case.tolerance
    expected, grouped = gradients(case, adapters, ("1",)), gradients(case, adapters, ("0", "1", "2"))
    assert expected.keys() == grouped.keys() == adapters.trainable("1").keys()
    for key, gradient in expected.items():
        assert relative_error(grouped[key], gradient) < case.tolerance, key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "case"), ON_GPU)
def test_lanes_agree_on_a_gpu(name: str, case: Case) -> None:
    check_lanes_agree(name, replace(case, device="cuda"))


def test_the_check_of_the_gpu_tests_holds_on_a_cpu() -> None:
    """A defect of the check is noticed without a GPU.

    The laws are stricter on a CPU, where a lane in a group equals the lane alone bit for bit.
    """
    check_lanes_agree("lora", next(case for case in WITH_LANES if case.model == "headed"))


RANK_ONE = Case("rank-one", out_features=64, in_features=48)
WITHOUT_RANK_ONE = ["adamole", "goat", "gralora", "head_only", "hra", "lora_moe", "pro_lora", "psoft", "rasa"]
"""A head alone, and variants that divide the rank."""


@pytest.mark.parametrize("name", ["adalora", "delta_lora", "relora"])
def test_lanes_are_independent_through_all_phases(name: str) -> None:
    """Sixteen steps have three merges of ReLoRA and six prunings of AdaLoRA.

    The law's five steps have one merge and two prunings.
    """
    case, steps = CASES[3], 16
    grouped = attach_lanes(case, catalogue.get(name), 3)
    train(case, grouped, steps)
    for lane in range(3):
        alone = attach_lanes(case, catalogue.get(name), 0)
        alone.add_lane(str(lane), alone.settings, seed=lane)
        train(case, alone, steps)
        assert tensors_equal(alone.trainable(str(lane)), grouped.trainable(str(lane)))
        assert tensors_equal(alone.frozen(str(lane)), grouped.frozen(str(lane)))


@pytest.mark.parametrize("name", NAMES)
def test_lanes_of_rank_one_are_independent(name: str) -> None:
    if catalogue.get(name).batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} trains one lane at a time")
    try:
        adapters = attach_lanes(RANK_ONE, catalogue.get(name), 3, VariantSettings(1, 8.0))
    except UnsupportedError as refusal:
        if name not in WITHOUT_RANK_ONE:
            raise
        pytest.skip(str(refusal))
    check_equal_bits(adapters)


@pytest.mark.parametrize(("rank", "top_k"), [(2, 0), (2, 2), (16, 2)])
def test_lanes_with_experts_of_rank_one_or_few_gates_are_independent(rank: int, top_k: int) -> None:
    settings = VariantSettings(rank, 16.0, extra={"top_k": top_k})
    check_equal_bits(attach_lanes(RANK_ONE, catalogue.get("lora_moe"), 3, settings))


def check_equal_bits(adapters: Adapters) -> None:
    perturb_lanes(RANK_ONE, adapters)
    alone, grouped = (gradients(RANK_ONE, adapters, lanes) for lanes in (("1",), ("0", "1", "2")))
    assert alone
    assert tensors_equal(alone, grouped)
