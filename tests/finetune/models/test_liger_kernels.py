"""Liger's kernels as an option: refusals, the names of Liger that are used, and equal results."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import Script, configuration, leases, tiny_base_model, train

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.finetune.models import changes
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError

MISSING = [module for module in ("liger_kernel", "triton") if find_spec(module) is None]
needs_liger = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


def compare(device: str, model: str, *variants: str) -> list[dict[str, Any]]:
    """Return what liger_comparison.py prints. Liger changes transformers for a whole process."""
    script = Path(__file__).with_name("liger_comparison.py")
    command = [sys.executable, str(script), device, model, *variants]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_equal(results: list[dict[str, Any]], count: int) -> None:
    assert len(results) == count
    for result in results:
        plain, liger = result["losses"]
        assert liger == pytest.approx(plain, rel=1e-5), result
        assert result["error"] < 1e-3, result


@needs_liger
@pytest.mark.skipif(torch.cuda.is_available(), reason="here kernels can be launched")
def test_a_kernel_that_cannot_be_launched_is_the_machines_fault() -> None:
    with pytest.raises(
        UsageError, match=r"no kernel can be launched \(.*install gcc and python3-dev"
    ) as raised:
        changes.launch_kernel("cpu")
    assert "\n" not in str(raised.value)
    assert classify_error(raised.value) is Fault.DEVICE


def test_a_record_names_the_kernels_of_its_base_model(store: Store) -> None:
    def load(choice: ModelChoice, task: Task) -> BaseModel:
        return replace(tiny_base_model(choice, task), kernels="liger 0.8.5")

    plain, other = configuration(seed=0, steps=2), configuration(seed=1, steps=2)
    train(Script(leases([plain])), store)
    train(Script(leases([other])), store, load_base_model=load)
    records = [store.get(each.fingerprint) for each in (plain, other)]
    assert [record.provenance.kernels for record in records if record] == ["torch", "liger 0.8.5"]


@needs_liger
def test_liger_has_the_families_and_arguments_that_are_used() -> None:
    from liger_kernel.transformers import monkey_patch

    functions = {family: monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[family] for family in changes.FAMILIES}
    used = {**changes.KERNELS, **changes.LOSSES}
    for family, function in functions.items():
        arguments = inspect.signature(function).parameters.keys()
        activation = "geglu" if "gemma" in family else "swiglu"
        assert {"rope", "rms_norm", activation, *changes.LOSSES} <= arguments, family
        assert arguments <= used.keys() | {"model"}, f"{family} has a kernel that is not chosen"


@needs_liger
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_interpreted_kernels_give_the_same_losses_and_gradients(model: str) -> None:
    """Triton's interpreter runs Liger's kernels on the CPU."""
    check_equal(compare("cpu", model, "lora", "dora"), 2)


def check_losses(results: list[dict[str, Any]]) -> None:
    single, half = results
    check_equal([single], 1)
    assert half["losses"][1] == pytest.approx(half["losses"][0], rel=1e-5)
    assert half["error"] < 1e-2, "gradients are rounded to bfloat16"


@needs_liger
def test_the_interpreted_cross_entropy_gives_the_same_losses_and_gradients() -> None:
    check_losses(compare("cpu", "loss", "float32", "bfloat16"))


@pytest.mark.gpu
@needs_liger
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cross_entropy_on_a_gpu_gives_the_same_losses_and_gradients() -> None:
    check_losses(compare("cuda", "loss", "float32", "bfloat16"))


@pytest.mark.gpu
@needs_liger
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["llama", "qwen3", "mistral", "gemma2"])
def test_kernels_on_a_gpu_give_the_same_losses_and_gradients(model: str) -> None:
    variants = ("lora", "dora", "hira", "pissa", "lora_moe")
    check_equal(compare("cuda", model, *variants), len(variants))
