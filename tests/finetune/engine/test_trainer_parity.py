"""Twenty steps of LoRA and of full fine-tuning agree with transformers' Trainer and PEFT."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from encoders import KINDS
from scripted import configuration, tiny_base_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from orchestrator.finetune.data.batches import make_training_batch
from orchestrator.finetune.engine.lane import Lane, has_weight_decay
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import Configuration, LRSchedule
from variants import catalogue
from variants.adapters import attach
from variants.api import VariantSettings

STEPS = 20


def point(task: str, schedule: str, variant: str = "lora") -> Configuration:
    """Return a configuration with four steps of warm-up, weight decay, and clipping in some steps."""
    one = configuration(task=task, steps=STEPS, evaluations=1, rate=2e-2, batch_size=8, variant=variant)
    return replace(
        one,
        optimizer=replace(one.optimizer, weight_decay=0.3, clip_norm=0.5),
        lr_schedule=LRSchedule(STEPS, schedule, 0.2),  # type: ignore[arg-type]
    )


def base_model_of(one: Configuration) -> BaseModel:
    """Return the tiny model in float64, without its own dropout."""
    base_model = tiny_base_model(one.model, tasks.get(one.task.name))
    base_model.model.double()
    for module in base_model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base_model


def ours(one: Configuration, folder: Path) -> tuple[list[float], list[float], dict[str, Tensor], LaneGroup]:
    """Train a lane. Returns its losses, gradient norms, final parameters and lane group."""
    base_model = base_model_of(one)
    choice = one.variant
    adapters = attach(
        base_model.model,
        catalogue.get(choice.name),
        VariantSettings(choice.rank, choice.alpha, choice.dropout),
        heads=base_model.head_names,
    )
    task = tasks.get(one.task.name)
    lane_group = LaneGroup(
        base_model,
        adapters,
        TaskData.load(one, task, base_model, adapters, ProcessGroup(), folder),
        ProcessGroup(),
    )
    lane = Lane(Lease(one, 1))
    lane.initialize(adapters, math.inf, None)
    for _ in range(STEPS):
        (taken,) = lane_group.reduce_gradients([lane], *lane_group.backward([lane]))
        assert lane.take_optimizer_step(taken) is None
    parameters = {name: parameter.detach().clone() for name, parameter in lane.parameters.items()}
    return [s.loss for s in lane.curve], [s.gradient_norm for s in lane.curve], parameters, lane_group


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean cross-entropy in the model's precision; transformers would compute it in float32."""
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


class InOrder(transformers.Trainer):
    """A Trainer that takes the examples in the given order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def theirs(
    model: Any, one: Configuration, lane_group: LaneGroup, folder: Path
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train with transformers' Trainer on the lane's batches. Returns the first three results of `ours`."""
    batches = one.batches
    length = max(len(row.ids) for row in lane_group.data.train)
    examples = []
    for step in range(STEPS):
        batch = make_training_batch(
            lane_group.data.train,
            one.seed,
            step * batches.batch_size,
            batches.batch_size,
            length,
            0,
        )
        width = length - batch.length
        ids = torch.nn.functional.pad(batch.ids, (0, width))
        real = torch.nn.functional.pad(batch.attention_mask.long(), (0, width))
        if lane_group.data.task.has_head:
            labels = batch.targets[batch.targets != -100]
        else:  # the targets are already shifted, as `loss_of` requires
            labels = torch.nn.functional.pad(batch.targets, (0, width), value=-100)
        examples += [
            {"input_ids": i, "attention_mask": r, "labels": y}
            for i, r, y in zip(ids, real, labels, strict=True)
        ]
    options = one.optimizer
    trainer = InOrder(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batches.batch_size,
            max_steps=STEPS,
            learning_rate=options.learning_rate,
            lr_scheduler_type=one.lr_schedule.name,
            warmup_steps=one.lr_schedule.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.clip_norm,
            optim="adamw_torch_fused",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,
        compute_loss_func=loss_of,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return [float(e["loss"]) for e in log], [float(e["grad_norm"]) for e in log], parameters


def name_in_peft(name: str, heads: tuple[str, ...]) -> str:
    layer, _, parameter = name.rpartition(".")
    if any(layer == head or layer.startswith(f"{head}.") for head in heads):
        return f"base_model.model.{layer}.modules_to_save.default.{parameter}"
    return f"base_model.model.{layer}.lora_{parameter}.default.weight"


@pytest.mark.parametrize(("task", "schedule"), [("letters", "cosine"), ("reviews", "linear")])
def test_twenty_steps_of_lora(task: str, schedule: str, tmp_path: Path) -> None:
    """The models are a Llama without a head and a BERT with a head."""
    one = point(task, schedule)
    losses, norms, mine, lane_group = ours(one, tmp_path / "data")
    names = list(lane_group.adapters.layers)
    lane_group.adapters.detach()

    base_model = base_model_of(one)
    config = peft.LoraConfig(
        r=one.variant.rank,
        lora_alpha=one.variant.alpha,
        target_modules=names,
        modules_to_save=list(base_model.head_names) or None,
    )
    model = peft.get_peft_model(base_model.model, config)
    fresh = attach(
        base_model_of(one).model, catalogue.get("lora"), VariantSettings(4, 8.0), heads=base_model.head_names
    )
    fresh.add_lane("lane", VariantSettings(4, 8.0), one.seed)
    start = {name_in_peft(n, base_model.head_names): p for n, p in fresh.trainable("lane").items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])

    their_losses, their_norms, end = theirs(model, one, lane_group, tmp_path / "trainer")
    assert min(norms) < one.optimizer.clip_norm < max(norms), "some gradients are clipped, others not"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(their_losses), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(their_norms), rtol=1e-6, atol=1e-6)
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter, end[name_in_peft(name, base_model.head_names)], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("task", ["letters", "reviews"])
def test_twenty_steps_of_full_fine_tuning(task: str, tmp_path: Path) -> None:
    """Biases and parameters of normalization layers have no weight decay."""
    one = point(task, "linear", "full")
    losses, _, mine, lane_group = ours(one, tmp_path / "data")
    lane_group.adapters.detach()
    base_model = base_model_of(one)
    base_model.model.requires_grad_(True)
    fresh = attach(
        base_model_of(one).model, catalogue.get("full"), VariantSettings(), heads=base_model.head_names
    )
    fresh.add_lane("lane", VariantSettings(), one.seed)
    start = {name.removeprefix("model:"): p for name, p in fresh.trainable("lane").items()}
    with torch.no_grad():
        for name, parameter in base_model.model.named_parameters():
            parameter.copy_(start[name])
    their_losses, _, end = theirs(base_model.model, one, lane_group, tmp_path / "trainer")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(their_losses), rtol=0, atol=1e-6)
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, end[name.removeprefix("model:")], rtol=0, atol=1e-6)


GPT2 = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize("kind", ["llama", "gpt2", *KINDS])
def test_weight_decay_applies_to_the_parameters_that_trainer_decays(kind: str) -> None:
    if kind == "llama":
        model = tiny_base_model(configuration().model).model
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    else:
        words, make = KINDS[kind]
        model = make({"vocab_size": len(words()), "max_position_embeddings": 32})
    expected = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    adapters = attach(model, catalogue.get("full"), VariantSettings())
    adapters.add_lane("lane", VariantSettings(), 0)
    names = {name: name.removeprefix("model:") for name in adapters.trainable("lane")}
    assert expected & set(names.values())
    assert {short for name, short in names.items() if has_weight_decay(name, adapters)} == expected & set(
        names.values()
    )


@pytest.mark.parametrize("own", [None, "AVX2"])
def test_kernels_that_round_by_the_number_of_lanes_are_off_unless_a_user_sets_them(own: str | None) -> None:
    name, others = "ONEDNN_MAX_CPU_ISA", dict(os.environ)
    others.pop(name, None)
    program = f"import orchestrator.finetune, os; print(os.environ[{name!r}])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=others | ({name: own} if own else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (own or "AVX512_CORE_FP16")
