"""Predicted GPU hours: the formula against counts of real steps, and what a plan prints of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import meta_step
import model_shapes
import pytest
from synthetic_task import StepSize

from orchestrator.launch import prediction, prices
from orchestrator.launch.prediction import ModelShape, RowLengths, step_seconds
from orchestrator.study.configuration import BatchConfig

(H100,) = (gpu for gpu in prices.load_prices() if gpu.gpu == "H100")
METAMATHQA = RowLengths(prompt=113, answer=137)


def transformers_config(name: str) -> Any:
    import transformers

    shape = model_shapes.SHAPES[name]
    return getattr(transformers, f"{shape.family}Config")(**shape.sizes)


@pytest.mark.parametrize(
    ("model", "variant", "lanes", "kernels"),
    [
        ("qwen3-0.6b", "lora", 4, "torch"),
        ("qwen3-0.6b", "lora", 4, "liger"),
        ("qwen3-0.6b", "pissa", 4, "torch"),
        ("qwen3-0.6b", "dora", 4, "torch"),
        ("qwen3-0.6b", "hira", 4, "torch"),
        ("llama-3.1-8b", "lora", 1, "torch"),
        ("llama-3.1-8b", "dora", 1, "liger"),
        ("llama-3.1-8b", "hira", 1, "torch"),
    ],
)
def test_the_formula_reproduces_counted_steps(
    model: str, variant: str, lanes: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four blocks, which take a seventh of the time to count."""
    shape = model_shapes.SHAPES[model]
    cut = replace(shape, sizes={**shape.sizes, "num_hidden_layers": 4})
    monkeypatch.setitem(model_shapes.SHAPES, model, cut)
    counted = meta_step.count_step(model, variant, lanes, kernels == "liger", StepSize(8, 8, 512))
    sizes = ModelShape.from_config(transformers_config(model))
    monkeypatch.setattr(prediction, "LAUNCH_SECONDS", 0.0)  # the count has no time of the host
    predicted = step_seconds(sizes, variant, BatchConfig(8, 8, 512), METAMATHQA, H100, lanes, kernels)
    assert predicted == pytest.approx(counted["device_seconds"] / lanes, rel=0.15)


@pytest.mark.parametrize(
    ("variant", "lanes"), [("lora", 1), ("lora", 4), ("dora", 4), ("hira", 4), ("pissa", 4)]
)
def test_the_number_of_kernels_is_that_of_a_counted_micro_batch(
    variant: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model_shapes.SHAPES["qwen3-0.6b"]
    cut = replace(shape, sizes={**shape.sizes, "num_hidden_layers": 4})
    monkeypatch.setitem(model_shapes.SHAPES, "qwen3-0.6b", cut)
    counted = meta_step.count_step("qwen3-0.6b", variant, lanes, False, StepSize(8, 8, 512))
    sizes = ModelShape.from_config(transformers_config("qwen3-0.6b"))
    # A small model on a fast device: the host's time is all of it.
    monkeypatch.setattr(prediction, "LAUNCH_SECONDS", 1.0)
    predicted = step_seconds(sizes, variant, BatchConfig(8, 8, 512), METAMATHQA, H100, lanes, "torch")
    assert predicted * lanes == pytest.approx(counted["launches"], rel=0.15)


def test_the_shape_of_the_default_model_is_the_benchmarks() -> None:
    assert ModelShape.from_config(transformers_config("qwen3-0.6b")) == prediction.QWEN3_06B


def test_every_gpu_with_bfloat16_has_a_prediction_and_a_slower_one_a_longer() -> None:
    seconds = {
        gpu.gpu: step_seconds(
            prediction.QWEN3_06B, "lora", BatchConfig(8, 8, 512), METAMATHQA, gpu, 4, "torch"
        )
        for gpu in prices.load_prices()
        if gpu.bf16_tflops is not None
    }
    assert {"T4"} == {gpu.gpu for gpu in prices.load_prices()} - seconds.keys()
    assert seconds["A10G"] > seconds["L40S"] > seconds["A100-80G"] > seconds["H100"] > seconds["H200"]
