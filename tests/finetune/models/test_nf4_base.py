"""Base models with weights of 4 bits: loading, checks before a study, and training in the real loop."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripted import Script, configuration, get_record, leases, numbers_of, solo, train
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.letters import VOCABULARY, tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from variants.nf4 import NF4Linear, NF4Weight


def save_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    tokens = {"vocab_size": len(VOCABULARY), "eos_token_id": VOCABULARY.index("<eos>"), "bos_token_id": None}
    model: LlamaForCausalLM | GPT2LMHeadModel
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, **tokens))
    path = folder / kind
    with base_store.suppress_transformers_logging():
        model.to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def prepare(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> ModelChoice:
    name = str(save_model(folder, kind, dtype))
    return ModelChoice(
        name, model_catalogue.prepare_base_model(name, folder / "bases", lambda _: None), "nf4"
    )


def load(choice: ModelChoice, folder: Path) -> BaseModel:
    return loading.load_base_model(choice, folder / "bases", "cpu", tasks.get("letters"))


def test_a_model_is_quantized_when_it_is_loaded(tmp_path: Path) -> None:
    choice = prepare(tmp_path)
    model = load(choice, tmp_path).model
    plain = load(replace(choice, dtype="bfloat16"), tmp_path).model
    quantized = {name: each for name, each in model.named_modules() if isinstance(each, NF4Linear)}
    assert len(quantized) == 14
    for name, layer in quantized.items():
        assert torch.equal(layer.weight, NF4Weight.quantize(plain.get_submodule(name).weight).dequantize())
    kept = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name])
        assert not parameter.requires_grad
    ids = torch.arange(4, 20).view(2, 8)
    difference = (model(input_ids=ids).logits - plain(input_ids=ids).logits).norm()
    assert 0 < difference < 0.2 * plain(input_ids=ids).logits.norm()


def test_weights_in_the_dtype_of_their_file_are_not_copied_in_memory(tmp_path: Path) -> None:
    """Each tensor stays in the mapped file until it is moved to the device."""
    choice = prepare(tmp_path)
    for dtype, is_mapped in (("bfloat16", True), ("nf4", True), ("float32", False)):
        model, _ = loading._load_model(replace(choice, dtype=dtype), tmp_path / "bases", tasks.get("letters"))
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in lines
            if f"{choice.name}/" in line
        ]
        in_file = [any(a <= p.data_ptr() < b for a, b in ranges) for p in model.parameters()]
        assert all(in_file) if is_mapped else not any(in_file), dtype


def test_a_model_without_linear_layers_in_its_blocks_is_refused(tmp_path: Path) -> None:
    choice = prepare(tmp_path, "gpt2")
    message = re.escape("--dtype nf4 quantizes nn.Linear layers, and GPT2LMHeadModel has none in its blocks")
    with pytest.raises(UsageError, match=message):
        load(choice, tmp_path)
    with pytest.raises(UsageError, match=message):
        loading.build_meta_model(choice, tmp_path / "bases", tasks.get("letters"))


def resolve(folder: Path, *variants: str) -> list[Configuration]:
    choice = prepare(folder)
    options = StudyOptions(task=("letters",), model=choice.name, variants=variants, dtype="nf4")
    chosen = resolve_options(options, "letters", folder / "bases")
    return build_configuration_templates(options, chosen, choice.content, folder / "bases")


def test_full_fine_tuning_over_4_bits_is_refused_before_a_study(tmp_path: Path) -> None:
    assert [c.model.dtype for c in resolve(tmp_path, "lora", "dora", "pissa", "hira")] == ["nf4"] * 4
    with pytest.raises(
        UsageError, match=r"with full: full trains every weight, and model\.layers\S+ has 4 bits"
    ):
        resolve(tmp_path, "lora", "full")


@pytest.mark.parametrize(
    "variant", ["dora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "pissa"))]
)
def test_lanes_over_4_bits_train_as_they_do_alone(variant: str, store: Store, tmp_path: Path) -> None:
    choice = prepare(tmp_path)

    def load_base_model(_: ModelChoice, task: Task) -> BaseModel:
        return loading.load_base_model(choice, tmp_path / "bases", "cpu", task)

    two = [configuration(seed=s, variant=variant, dtype="nf4", steps=6, dropout=0.1) for s in (0, 1)]
    train(Script(leases(two), start_at={two[1].fingerprint: 2}), store, load_base_model=load_base_model)
    for one in two:
        record = get_record(store, one)
        assert record.state == "finished", record.reason
        assert record.curve[-1].loss < record.curve[0].loss
        alone = solo(one, tmp_path, load_base_model=load_base_model)
        assert numbers_of(record) == numbers_of(alone)
