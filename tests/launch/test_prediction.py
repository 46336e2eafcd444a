"""Predicted GPU hours: the formula against counts of real steps, and what a plan prints of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import meta_step
import model_shapes
import pytest
from points import configuration
from synthetic_task import StepSize

from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch import prediction, prices
from orchestrator.launch.decoder_shape import ModelShape, PredictionError, find_shape
from orchestrator.launch.known_models import KNOWN_MODELS
from orchestrator.launch.prediction import RowLengths, predict, predict_lanes, step_seconds
from orchestrator.study.configuration import BatchConfig, ModelChoice

(H100,) = (gpu for gpu in prices.load_prices() if gpu.gpu == "H100")
METAMATHQA = RowLengths(prompt=113, answer=137)


def transformers_config(name: str) -> Any:
    import transformers

    shape = model_shapes.SHAPES[name]
    return getattr(transformers, f"{shape.family}Config")(**shape.sizes)


@pytest.mark.parametrize(
    ("model", "variant", "lanes", "kernels"),
    [
        ("qwen3-0.6b", "lora", 4, "liger"),
        ("qwen3-0.6b", "pissa", 4, "torch"),
        ("llama-3.1-8b", "dora", 1, "liger"),
        ("llama-3.1-8b", "hira", 1, "torch"),
        pytest.param("qwen3-0.6b", "lora", 4, "torch", marks=pytest.mark.slow),
        pytest.param("qwen3-0.6b", "dora", 4, "torch", marks=pytest.mark.slow),
        pytest.param("qwen3-0.6b", "hira", 4, "torch", marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b", "lora", 1, "torch", marks=pytest.mark.slow),
    ],
)
def test_the_formula_reproduces_counted_steps(
    model: str, variant: str, lanes: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models have four blocks, to save time: the count takes a seventh as long."""
    shape = model_shapes.SHAPES[model]
    cut = replace(shape, sizes={**shape.sizes, "num_hidden_layers": 4})
    monkeypatch.setitem(model_shapes.SHAPES, model, cut)
    counted = meta_step.count_step(model, variant, lanes, kernels == "liger", StepSize(8, 8, 512))
    sizes = ModelShape.from_config(transformers_config(model))
    monkeypatch.setattr(prediction, "LAUNCH_SECONDS", 0.0)  # the count has no time of the host
    predicted = step_seconds(sizes, variant, BatchConfig(8, 8, 512), METAMATHQA, H100, lanes, kernels)
    assert predicted == pytest.approx(counted["device_seconds"] / lanes, rel=0.15)


@pytest.mark.parametrize(
    ("variant", "lanes"),
    [
        ("lora", 1),
        ("lora", 4),
        ("pissa", 4),
        pytest.param("dora", 4, marks=pytest.mark.slow),
        pytest.param("hira", 4, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_kernels_is_that_of_a_counted_micro_batch(
    variant: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model_shapes.SHAPES["qwen3-0.6b"]
    cut = replace(shape, sizes={**shape.sizes, "num_hidden_layers": 4})
    monkeypatch.setitem(model_shapes.SHAPES, "qwen3-0.6b", cut)
    counted = meta_step.count_step("qwen3-0.6b", variant, lanes, False, StepSize(8, 8, 512))
    sizes = ModelShape.from_config(transformers_config("qwen3-0.6b"))
    # With launches of one second, the host's time is all of the time.
    monkeypatch.setattr(prediction, "LAUNCH_SECONDS", 1.0)
    predicted = step_seconds(sizes, variant, BatchConfig(8, 8, 512), METAMATHQA, H100, lanes, "torch")
    assert predicted * lanes == pytest.approx(counted["launches"], rel=0.15)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_models_of_the_hub_are_predicted_before_they_are_here(name: str, tmp_path: Path) -> None:
    shape = find_shape(ModelChoice(name, UNPREPARED, "bfloat16"), tmp_path)
    assert shape.norms_queries == ("Qwen3" in name)
    weights = (shape.layers * shape.layer_weights + shape.hidden * shape.vocab) / 1e9
    billions = {"135M": 0.135, "0.6B": 0.6, "1.7B": 1.72, "8B": 7.5}
    assert weights == pytest.approx(next(b for size, b in billions.items() if size in name), rel=0.01)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "Olmoe", "Phi", "Starcoder2", "Gemma2", "GPT2"])
def test_models_with_other_layers_have_no_prediction(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    with pytest.raises(PredictionError, match=f"type {config.model_type} have not been counted"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("model", "variant", "kernels"), [("qwen3-0.6b", "lora", "torch"), ("llama-3.1-8b", "dora", "liger")]
)
def test_the_predicted_memory_of_a_lane_is_that_of_a_counted_step(
    model: str, variant: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the memory that a second lane adds per block, without the embedding and the output layer."""
    shape = model_shapes.SHAPES[model]
    peaks = {}
    for blocks, lanes in product((1, 3), (1, 2)):
        cut = replace(shape, sizes={**shape.sizes, "num_hidden_layers": blocks})
        monkeypatch.setitem(model_shapes.SHAPES, model, cut)
        counted = meta_step.count_step(model, variant, lanes, kernels == "liger", StepSize(8, 8, 512))
        peaks[blocks, lanes] = counted["peak_gib"] * 2**30
    block = (peaks[3, 2] - peaks[3, 1] - peaks[1, 2] + peaks[1, 1]) / 2
    sizes = replace(ModelShape.from_config(transformers_config(model)), layers=1)
    predicted = prediction.lane_bytes(sizes, variant, METAMATHQA.row * 8, kernels, False)
    assert predicted == pytest.approx(block, rel=0.15)


def test_gradient_checkpointing_adds_to_the_steps_and_not_to_the_evaluations(tmp_path: Path) -> None:
    model = ModelChoice("Qwen/Qwen3-0.6B-Base", UNPREPARED, "bfloat16")
    one = replace(configuration(), model=model)
    rows = RowLengths.sample(tasks.get(one.task.name), one.batches.max_length)
    shape = find_shape(model, tmp_path)
    steps = one.lr_schedule.steps * step_seconds(shape, "lora", one.batches, rows, H100, 4, "torch")
    without, with_it = (predict([one], tmp_path, H100, 4, "torch", used).seconds for used in (False, True))
    assert with_it - without == pytest.approx(steps / 3)


def test_the_predicted_lanes_follow_the_memory_of_the_gpu(tmp_path: Path) -> None:
    def lanes(name: str, gib: float, rows: int = 8, **options: Any) -> int:
        model = ModelChoice(name, UNPREPARED, "bfloat16")
        one = replace(configuration(), model=model, batches=BatchConfig(rows, 1, 512))
        return predict_lanes([one], tmp_path, gib * 2**30, **options)[0]

    small, large = "Qwen/Qwen3-0.6B-Base", "meta-llama/Llama-3.1-8B"
    assert lanes(small, 79) == lanes(large, 79) == 8, "all eight lanes of short rows fit"
    assert lanes(large, 16) == 1, "not even the weights fit"
    assert lanes(large, 24, 64) < lanes(large, 79, 64)
    assert lanes(large, 24, 64, checkpointing=True) > lanes(large, 24, 64)


def test_every_gpu_with_bfloat16_has_a_prediction_and_a_slower_one_a_longer() -> None:
    shape = ModelShape.from_config(transformers_config("qwen3-0.6b"))
    seconds = {
        gpu.gpu: step_seconds(
            shape,
            "lora",
            BatchConfig(8, 8, 512),
            METAMATHQA,
            gpu,
            4,
            "torch",
        )
        for gpu in prices.load_prices()
        if gpu.bf16_tflops is not None
    }
    assert {"T4"} == {gpu.gpu for gpu in prices.load_prices()} - seconds.keys()
    assert seconds["A10G"] > seconds["L40S"] > seconds["A100-80G"] > seconds["H100"] > seconds["H200"]
