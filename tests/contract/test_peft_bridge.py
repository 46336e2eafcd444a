"""`peft:TYPE` for every tuner of the installed PEFT: the laws, and agreement with PEFT on a whole model."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from rule import initial_tensors
from torch import nn

from orchestrator.util.errors import install_hint
from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import FrozenLayer, MergeError, UnsupportedError, Variant, VariantSettings
from variants.merging import merge_and_detach
from variants.peft_bridge import RULE, PeftTuner, build_layers, read_state
from variants.testing import CASES, LAWS, Case, NotApplicableError, applies
from variants.testing.rig import (
    LaneOptimizer,
    attach_lanes,
    model_output,
    model_state,
    perturb_lanes,
    tensors_equal,
)

REFUSED_TYPES = {
    **dict.fromkeys(
        (
            "CARTRIDGE", "CPT", "LILY", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
            "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS", "XLORA",
        ),
        f"{RULE} ...; `python -m variants` names the variants of this project",
    ),
    "RANDLORA": f"{RULE} ...; take rand_lora, a variant of this project",
    **dict.fromkeys(("FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA"), "uses shared state"),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW"), "does not support prompt learning"),
    "ADALORA": "`total_step` is None, supply a value > 0.; take adalora",
    "IA3": "Please specify `feedforward_modules` in `peft_config`; take ia3",
    "OFT": "either r (4) or oft_block_size (32)",
    "POLY": "task_ids should not be None",
}  # fmt: skip
"""Types that the probe refuses, with a part of the reason; " ..." stands for any text."""
TYPES = sorted(each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING if each.value not in REFUSED_TYPES)
SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 64, "scaling": 15.0},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {"sparsity": 0.9},
    "WAVEFT": {"n_frequency": 64, "scaling": 5.0},
}
"""Hyperparameters that fit the small layers of the cases, where PEFT's defaults do not."""
FAILURES = {
    ("DELORA", "fits_a_representable_target", "rectangles"): (
        "B = 0 is normalized with the clamp 1e-4, so that the first step sets the update to its full size, "
        "whatever the learning rate is"
    ),
    ("GLORA", "every_tensor_gets_a_gradient", "gpt2"): "D multiplies the bias, which is 0 in a new GPT-2",
}
"""(tuner, law, model) -> reason for which the tuner breaks the law by its nature, as PEFT computes it."""
DEFAULT_TYPES = ("BEFT", "BOFT", "LOHA", "LORA", "SHIRA")
"""Tuners whose laws the default run checks but for the one that trains for long; the others differ in PEFT's
code alone."""
LAW_CASES = tuple(CASES[number] for number in (0, 1, 3, 5, 6, 8))


def variant(peft_type: str, **more: Any) -> Variant:
    """Return the variant of a tuner, with defaults that fit the small layers of the cases, or others."""
    found = copy.copy(catalogue.get(f"peft:{peft_type}"))
    declared = dict(found.hyperparameters)
    for name, value in {**SMALL.get(peft_type, {}), **more}.items():
        declared[name] = dataclasses.replace(declared[name], default=value)
    vars(found).update(hyperparameters=declared)
    return found


def law_cases(peft_type: str, law: str) -> list[Case]:
    """Return the cases to which the law applies, of which the first differs for each tuner and law."""
    cases = [case for case in LAW_CASES if applies(LAWS[law], variant(peft_type), case)]
    first = (TYPES.index(peft_type) + list(LAWS).index(law)) % len(cases)
    return cases[first:] + cases[:first]


def group_of(peft_type: str) -> pytest.MarkDecorator:
    """Let the workers of pytest-xdist share this file, which has no expensive fixtures."""
    return pytest.mark.xdist_group(f"peft-{peft_type}")


def law_parameters() -> list[Any]:
    """Return each tuner and law; the default run has most laws of `DEFAULT_TYPES`."""
    found = []
    for peft_type in TYPES:
        for law in LAWS:
            is_default = peft_type in DEFAULT_TYPES and law != "fits_a_representable_target"
            tier = () if is_default else (pytest.mark.slow,)
            found.append(pytest.param(peft_type, law, marks=(group_of(peft_type), *tier)))
    return found


def check_law(peft_type: str, law: str, case: Case) -> None:
    """Check a law, or that a tuner breaks it by its nature.

    Raises:
        NotApplicableError: The law does not apply, or the tuner breaks it by its nature.
    """
    if reason := FAILURES.get((peft_type, law, case.model)):
        with pytest.raises(AssertionError):
            LAWS[law](variant(peft_type), case)
        raise NotApplicableError(reason)
    LAWS[law](variant(peft_type), case)


@pytest.mark.parametrize(("peft_type", "law"), law_parameters())
def test_law(peft_type: str, law: str) -> None:
    try:
        check_law(peft_type, law, law_cases(peft_type, law)[0])
    except NotApplicableError as reason:
        pytest.skip(str(reason))


@pytest.mark.nightly
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("peft_type", [pytest.param(each, marks=group_of(each)) for each in TYPES])
def test_law_on_all_other_cases(peft_type: str, law: str) -> None:
    broken_on = {}
    for case in law_cases(peft_type, law)[1:]:
        try:
            check_law(peft_type, law, case)
        except NotApplicableError:
            continue
        except AssertionError as error:
            broken_on[case.name] = error
    assert broken_on == {}


OTHER_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("BOFT", {"boft_block_size": 0, "boft_block_num": 4}),
    ("C3A", {"init_weights": "gaussian"}),
    ("DEFT", {"decomposition_method": "qr"}),
    ("GLORA", {"config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
    ("GRALORA", {"hybrid_r": 2}),
    ("LOKR", {"decompose_both": True, "init_weights": "lycoris"}),
    ("LORA", {"use_dora": True}),
    ("LORA", {"use_rslora": True, "init_lora_weights": "orthogonal"}),
    ("LORA", {"lora_bias": True}),
    ("MISS", {"init_weights": "bat"}),
    ("MISS", {"init_weights": "mini", "mini_r": 4}),
    ("PEANUT", {"depth": 2}),
    ("PSOFT", {"psoft_svd": "lowrank", "psoft_orth": False, "ab_svd_init": "pissa_init"}),
    ("ROAD", {"variant": "road_4"}),
    ("SUPERTUNING", {"select_top": False}),
]
"""Tuners with other values than the defaults."""


@pytest.mark.parametrize(
    ("peft_type", "values"),
    [
        *((each, {}) for each in DEFAULT_TYPES),
        *(pytest.param(each, {}, marks=pytest.mark.slow) for each in TYPES if each not in DEFAULT_TYPES),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHER_VALUES),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_three_steps_equal_those_of_peft(peft_type: str, values: dict[str, Any]) -> None:
    """In float64, with the initial values of the lane. PEFT adapts the whole model at once."""
    case, ours = Case("llama", model="llama", dtype=torch.float64), variant(peft_type, **values)
    adapters = attach_lanes(case, ours, 1)
    model = peft_model(case, adapters)
    expected = {
        name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad
    }
    lane = {name.replace("/", "."): p for name, p in adapters.trainable("0").items()}
    assert lane.keys() == expected.keys()
    optimizer = LaneOptimizer(adapters, "0", 0.01, 3)
    reference = torch.optim.AdamW(expected.values(), lr=0.01)
    for step in range(3):
        rows = case.rows(0, step)
        optimizer.zero_grad()
        reference.zero_grad()
        with adapters.activate_lanes(["0"], step):
            loss = case.loss(model_output(adapters.model, rows), rows)
        loss.backward()
        expected_loss = case.loss(model_output(model, rows), rows)
        expected_loss.backward()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        optimizer.step()
        reference.step()
    for name, parameter in lane.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-8, msg=f"{name} differs")


@pytest.mark.slow
@pytest.mark.parametrize(("peft_type", "values"), OTHER_VALUES)
def test_other_values_merge_and_are_exported(peft_type: str, values: dict[str, Any]) -> None:
    LAWS["merged_equals_forward"](variant(peft_type, **values), CASES[0])
    LAWS["export_loads_in_peft"](variant(peft_type, **values), CASES[0])


def peft_model(case: Case, adapters: Adapters) -> nn.Module:
    """Return PEFT's model in float64, with the values of a lane.

    PEFT makes it in float32, because its SVD needs float32.
    """
    assert isinstance(adapters.variant, PeftTuner)
    config = adapters.variant.config_class(**adapters.variant.peft_config(adapters.settings))
    config.target_modules = set(adapters.layers)
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.build().float(), config).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_(name in trained)
    modules = dict(model.get_base_model().named_modules())
    for name, tensor in {**adapters.trainable("0"), **adapters.frozen("0")}.items():
        layer, _, path = name.rpartition(".")
        if "dtype" in vars(modules[layer]):  # AdaMSS casts its input to it
            modules[layer].dtype = torch.float64
        owner, _, key = path.rpartition("/")
        found = modules[layer].get_submodule(owner.replace("/", ".")) if owner else vars(modules[layer])[key]
        if isinstance(found, nn.Module):
            getattr(found, key).data.copy_(tensor)
        else:
            found["default"] = tensor.clone()
    return model


@pytest.mark.parametrize("peft_type", TYPES)
def test_all_random_values_of_a_layer_are_tensors_of_the_lane(peft_type: str) -> None:
    """What differs between layers of two seeds is stored with the lane, and equal seeds give equal layers."""
    layer = FrozenLayer("layer", CASES[0].build().there[0].weight.detach(), None)
    tuner, layers = variant(peft_type), {"one": (layer.weight, None)}
    assert isinstance(tuner, PeftTuner)
    settings = tuner.validate_settings(VariantSettings(4, 8.0))
    made = [build_layers(tuner, settings, layers, seed)["one"] for seed in (1, 1, 2)]
    tensors = [read_state(each) for each in made]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    buffers = [dict(each.named_buffers()) for each in made]
    for name, buffer in buffers[0].items():
        if name.replace(".", "/") not in tensors[0]:
            assert torch.equal(buffer, buffers[2][name]), name
    assert plain_state(made[0]) == plain_state(made[2])


def plain_state(layer: nn.Module) -> dict[str, str]:
    """Return all attributes of a layer and of its parts that are neither modules nor tensors, as text."""
    return {
        f"{path}.{name}": repr(value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and "tensor(" not in repr(value) and " object at 0x" not in repr(value)
    }


def test_a_lane_has_the_noise_of_its_seed_and_leaves_the_global_state_alone() -> None:
    layer = FrozenLayer("layer", CASES[0].build().there[0].weight.detach(), None)
    loha, settings = variant("LOHA"), VariantSettings(4, 8.0, extra=variant("LOHA").extra_defaults)
    state = torch.random.get_rng_state()
    one, again, other = (
        initial_tensors(loha, layer, settings, seed=seed).trainable["hada_w1_b/default"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_type_of_peft_has_a_variant_or_a_reason() -> None:
    assert {each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING} == {*TYPES, *REFUSED_TYPES}
    for peft_type in TYPES:
        found = catalogue.get(f"peft:{peft_type}")
        assert (found.name, found.axis) == (f"peft:{peft_type}", "peft")
        assert found.revision == f"peft {peft.__version__}"
    for peft_type, reason in REFUSED_TYPES.items():
        pattern = ".*".join(map(re.escape, reason.split(" ...")))
        with pytest.raises(UnsupportedError, match=pattern):
            catalogue.get(f"peft:{peft_type}")


@pytest.mark.parametrize(
    ("peft_type", "name", "value", "reason"),
    [
        ("LOHA", "rank_dropout", 0.1, "peft:LOHA does not know 'rank_dropout'"),
        ("ADAMSS", "use_asa", True, "peft:ADAMSS does not know 'use_asa'"),
        ("WAVEFT", "proportional_parameters", True, f"proportional_parameters True (default False): {RULE}"),
        ("FOURIERFT", "scaling", 0.0, f"scaling 0.0 (default 150.0): {RULE}"),
        ("GRALORA", "gralora_k", 3, "gralora_k 3 (default 2): PEFT says: r should be divisible by gralora_k"),
        *(
            ("LORA", "init_lora_weights", each, "must be one of 'true', 'gaussian'")
            for each in ("corda", "eva", "loftq")
        ),
        *(("LORA", "init_lora_weights", each, RULE) for each in ("olora", "pissa")),
        ("LORA", "bias", "all", RULE),
        ("LOHA", "nothing", 1, "peft:LOHA does not know 'nothing'"),
        ("LOKR", "decompose_both", 3, "must be true or false"),
    ],
)
def test_a_value_is_refused_with_the_reason(peft_type: str, name: str, value: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        catalogue.get(f"peft:{peft_type}").validate_settings(VariantSettings(4, 8.0, extra={name: value}))


def test_a_layer_that_a_tuner_cannot_adapt_is_refused_before_a_lane_starts() -> None:
    message = r"there\.0: .*divisible by group_size \(64\)"
    with pytest.raises(UnsupportedError, match=message):
        attach(CASES[0].build(), catalogue.get("peft:ROAD"), VariantSettings(4, 8.0))


def test_a_bias_that_a_layer_does_not_have_is_not_merged_and_nothing_changes() -> None:
    case = CASES[0]
    model = case.build()
    model.back[1].register_parameter("bias", None)  # the last layer
    adapters = attach_lanes(case, variant("BEFT"), 1, model=model)
    perturb_lanes(case, adapters)
    weights = model_state(model)
    with pytest.raises(MergeError, match=r"peft:BEFT cannot be merged into back\.1, which has no bias"):
        merge_and_detach(adapters, "0")
    assert tensors_equal(model_state(model), weights)


@pytest.mark.parametrize("value", ["gaussian", "orthogonal"])
def test_a_word_of_peft_is_an_initialization(value: str) -> None:
    settings = VariantSettings(4, 8.0, extra={"init_lora_weights": value})
    layer = FrozenLayer("layer", torch.zeros(256, 256), None)
    lora = catalogue.get("peft:LORA")
    tensors = initial_tensors(lora, layer, lora.validate_settings(settings)).trainable
    a, b = tensors["lora_A/default/weight"], tensors["lora_B/default/weight"]
    if value == "gaussian":
        assert abs(a.std().item() - 1 / 4) < 0.02
        assert not b.any()
    else:
        assert b.any()
        assert (b @ a).abs().max() < 1e-5


def test_without_peft_the_error_is_one_line() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\nfrom variants import catalogue\n"
        "try: catalogue.get('peft:LOHA')\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"peft:LOHA needs peft, which is not installed: {install_hint('peft')}\n"
