"""Small random models of the text architectures that studies name.

Exactly the linear layers of the published architecture have adapters. Decoders learn, and a lane gives the
same results in a lane group as alone. test_encoders.py checks the same for encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scripted import WORDS_TASK, Script, configuration, leases, numbers_of, train

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue, letters, reviews
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from variants.targets import find_target_layers

LLAMA = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
BERT = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
DEBERTA = (*(f"attention.self.{name}_proj" for name in ("query", "key", "value")), *BERT[3:])
BLOCKS = 2
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Base:
    """A text architecture.

    `prefix` is the name of the list of blocks, `layers` are the linear layers of a block, and `kind` and
    `options` are the class of the configuration and its arguments.
    """

    prefix: str
    layers: tuple[str, ...]
    kind: str
    options: dict[str, Any]

    @property
    def causal(self) -> bool:
        return self.layers == LLAMA


BASES = {
    "Llama": Base("model.layers", LLAMA, "LlamaConfig", GROUPED),
    "Mistral": Base("model.layers", LLAMA, "MistralConfig", {**GROUPED, "sliding_window": 8}),
    "Qwen2": Base("model.layers", LLAMA, "Qwen2Config", GROUPED),
    "Qwen3": Base("model.layers", LLAMA, "Qwen3Config", GROUPED),
    "Gemma2": Base("model.layers", LLAMA, "Gemma2Config", {**GROUPED, "sliding_window": 8}),
    "Gemma3": Base("model.layers", LLAMA, "Gemma3TextConfig", {**GROUPED, "sliding_window": 8}),
    "BERT": Base("bert.encoder.layer", BERT, "BertConfig", SIZE),
    "RoBERTa": Base("roberta.encoder.layer", BERT, "RobertaConfig", SIZE),
    "DeBERTa": Base(
        "deberta.encoder.layer",
        DEBERTA,
        "DebertaV2Config",
        # The options of microsoft/deberta-v3-base.
        {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the base model with a name and returns its folder."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            base, made[name] = BASES[name], tmp_path_factory.mktemp(name)
            words = letters.tokenizer() if base.causal else reviews.tokenizer()
            special = {
                "pad_token_id": words.pad_token_id,
                "bos_token_id": None,
                "eos_token_id": words.eos_token_id,
            }
            config = getattr(transformers, base.kind)(vocab_size=len(words), **base.options, **special)
            kind = transformers.AutoModelForCausalLM if base.causal else transformers.AutoModel
            with torch.random.fork_rng(devices=[]), base_store.suppress_transformers_logging():
                torch.manual_seed(0)
                kind.from_config(config).save_pretrained(made[name])
                words.save_pretrained(made[name])
        return made[name]

    return make


def train_together(model: Path, work: Path, seeds: tuple[int, ...]) -> list[Record]:
    """Train lanes with LoRA on every linear layer in one lane group, and return their records."""
    store = Store(work)
    content = model_catalogue.prepare_base_model(str(model), store.bases)
    made = []
    for seed in seeds:
        # Every step has the same eight rows, so their loss falls in a model that learns.
        one = configuration(task=WORDS_TASK, seed=seed, steps=10, batch_size=8, train_size=8)
        made.append(replace(one, model=replace(one.model, name=str(model), content=content)))
    load = partial(loading.load_base_model, root=store.bases, device="cpu")
    load_base_model = lambda choice, task: load(choice, task=task)  # noqa: E731
    train(Script(leases(made)), store, load_base_model=load_base_model, data=work.parent / "data")
    return [store.get(one.fingerprint) for one in made]  # type: ignore[misc]


@pytest.mark.parametrize("name", BASES)
def test_adapters_are_on_every_linear_layer_of_the_blocks(name: str, folder: Callable[[str], Path]) -> None:
    base = BASES[name]
    task = catalogue.get(WORDS_TASK if base.causal else "reviews")
    choice = ModelChoice(str(folder(name)), base_store.content_hash(folder(name)))
    model, heads = loading.build_meta_model(choice, folder(name) / "bases", task)
    expected = {f"{base.prefix}.{block}.{layer}" for block in range(BLOCKS) for layer in base.layers}
    assert set(find_target_layers(model, "blocks")) == expected
    assert not any(place.startswith(tuple(heads)) for place in expected if heads)


FEW = ("Gemma3",)
"""It has what each of the others has one of: a sliding window, norms of queries and keys, two kinds of
rotary positions."""
MORE = [
    pytest.param(name, marks=pytest.mark.slow) for name in BASES if BASES[name].causal and name not in FEW
]


@pytest.mark.parametrize("name", [*FEW, *MORE])
def test_lanes_learn_and_a_lane_in_a_group_equals_the_lane_alone(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    together = train_together(folder(name), tmp_path / "together", (0, 1))
    (alone,) = train_together(folder(name), tmp_path / "alone", (1,))
    for record in together:
        assert record.state == "finished", record.reason + record.traceback
        assert record.curve[-1].loss < record.curve[0].loss, [s.loss for s in record.curve]
    assert together[0].curve != together[1].curve
    assert_equal_results(together[1], alone)


def assert_equal_results(found: Record, wanted: Record) -> None:
    """Assert that two records are bit-identical. On a CPU, lanes with batches of 8 rows give such records."""
    assert replace(numbers_of(found), provenance=numbers_of(wanted).provenance) == numbers_of(wanted)
