"""The loss of a frozen output layer equals the plain cross-entropy, and keeps no logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.finetune.data.batches import Batch, DeviceBatch, Row, pad_rows
from orchestrator.finetune.evaluation import forward
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import letters
from orchestrator.finetune.tasks.base import IGNORE_INDEX
from variants import catalogue as variants
from variants.adapters import attach
from variants.api import VariantSettings

CPU = torch.device("cpu")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS = {**SIZE, "vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def tiny(kind: str, **options: Any) -> BaseModel:
    config = getattr(transformers, kind)(**{**OPTIONS, **options}, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.mul_(30)  # logits large enough to be capped
    return BaseModel(model.eval().requires_grad_(False), letters.tokenizer(), CPU)


def rows(count: int, seed: int = 0) -> list[Row]:
    """Return rows of several lengths, each with labels in its second half."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 4 + number % 5
        ids = torch.randint(1, 20, (length + 1,), generator=generator).tolist()
        targets = (*[IGNORE_INDEX] * (length // 2), *ids[1 + length // 2 :])
        made.append(Row(tuple(ids[:-1]), targets, tuple(ids[:2])))
    return made


def problem(dtype: torch.dtype, bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(16, 50, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(30, 16, dtype=dtype).mul_(4).requires_grad_(True)
    return hidden, layer, torch.randint(50, (30,)), torch.rand(30, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_gradients_equal_those_of_cross_entropy(
    dtype: torch.dtype, bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK_TARGETS", chunk)
    hidden, layer, labels, weights = problem(dtype, bias)
    objective, losses = forward.compute_token_objective(hidden, layer, labels, weights, (20, 10))
    (3 * objective).backward()
    found, hidden.grad = hidden.grad, None
    logits = layer(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    expected = cross_entropy(logits.to(wide), labels, reduction="none")
    (3 * (expected * weights.to(wide)).sum()).backward()
    assert losses.dtype == wide
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(objective.detach(), (expected * weights.to(wide)).sum().detach())
    # An element near zero is a difference of large ones, so the error of bfloat16 is that of the largest.
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (found - hidden.grad).abs().max() <= tolerance * hidden.grad.abs().max()
    assert layer.weight.grad is None
    with torch.no_grad():
        scored, predictions = forward.predict_tokens(hidden, layer, labels, (20, 10))
    assert torch.equal(scored, losses)
    assert torch.equal(predictions, logits.argmax(dim=1))


def test_a_lane_whose_logits_are_not_finite_has_no_finite_loss_and_harms_no_other() -> None:
    hidden, layer, labels, weights = problem(torch.float32)
    alone = forward.compute_token_objective(hidden, layer, labels, weights, (20, 10))[1]
    with torch.no_grad():
        hidden[:20] = torch.inf
    objective, losses = forward.compute_token_objective(hidden, layer, labels, weights, (20, 10))
    objective.backward()
    assert losses[:20].isnan().all()
    assert torch.equal(losses[20:], alone[20:])
    assert hidden.grad is not None
    assert hidden.grad[20:].isfinite().all()


class LargestTensor(TorchDispatchMode):
    """A mode that notes the number of values of the largest tensor of each dtype that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.sizes[made.dtype] = max(self.sizes[made.dtype], made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_only_the_logits_of_one_chunk_exist_and_none_is_kept(train: bool, dtype: torch.dtype) -> None:
    """The tensors of 8,192 targets over 150,000 tokens have shapes only: logits of all would take 4.9 GB."""
    vocabulary, count = 150_000, 8192
    with torch.device("meta"):
        layer = nn.Linear(64, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        hidden = torch.empty(count, 64, dtype=dtype, requires_grad=train)
        labels, weights = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    kept: list[int] = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        if train:
            objective, _ = forward.compute_token_objective(hidden, layer, labels, weights, (count,))
            assert sum(kept) == 0
            objective.backward()
            assert hidden.grad is not None
        else:
            forward.predict_tokens(hidden, layer, labels, (count,))
    assert largest.sizes[dtype] == forward.CHUNK_TARGETS * vocabulary
    if dtype == torch.bfloat16:
        assert largest.sizes[torch.float32] == forward.WIDE_ROWS * vocabulary


@contextmanager
def counted_plain_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the forward passes that compute logits with the model's own forward method."""
    calls: list[int] = []
    plain = forward._compute_token_logits
    with monkeypatch.context() as patch:
        patch.setattr(forward, "_compute_token_logits", lambda *args: calls.append(1) or plain(*args))
        yield calls


MODELS = {
    "Llama": ("LlamaConfig", {}, True),
    "Qwen3": ("Qwen3Config", {"tie_word_embeddings": True}, True),
    "Mistral": ("MistralConfig", {"sliding_window": 4}, True),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "Gemma 2": ("Gemma2Config", {"sliding_window": 4}, False),
    "Cohere": ("CohereConfig", {"logit_scale": 0.25}, False),
    "Granite": ("GraniteConfig", {"logits_scaling": 4.0}, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_change_their_logits_are_computed_by_their_own_forward_method(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options, ends_with_output_layer = MODELS[name]
    base_model, task = tiny(kind, **options), tasks.get("letters")
    assert base_model.ends_with_output_layer == ends_with_output_layer
    first, second = (pad_rows(rows(8, seed), 8, 0) for seed in (0, 1))
    batch = DeviceBatch.copy_to(CPU, [first, second])
    adapters = attach(base_model.model, variants.get("lora"), VariantSettings(4, 8.0))
    for lane in "xy":
        adapters.add_lane(lane, VariantSettings(4, 8.0), seed=0)
    with counted_plain_passes(monkeypatch) as calls:
        with adapters.activate_lanes("xy", None):
            objective, losses = forward.compute_objective(base_model, task, batch)
            objective.backward()
        with torch.no_grad(), adapters.activate_lanes("xy", None):
            scored, predictions = forward.predict(base_model, task, batch)
    assert len(calls) == (0 if ends_with_output_layer else 2)
    found = {n: p.grad for n, p in adapters.trainable("x").items()}
    for parameter in adapters.trainable("x").values():
        parameter.grad = None
    joined = Batch.concatenate([first, second])
    has_label = joined.targets != IGNORE_INDEX
    with adapters.activate_lanes("xy", None):
        logits = base_model.model(input_ids=joined.ids, use_cache=False).logits[has_label]
        expected = cross_entropy(logits, joined.targets[has_label], reduction="none")
        expected.mean().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored, losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(predictions, logits.argmax(dim=1))
    for parameter_name, parameter in adapters.trainable("x").items():
        torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("variant", "targets"), [("full", "blocks"), ("lora", "lm_head,q_proj")])
def test_a_trained_output_layer_gets_its_gradient(variant: str, targets: str) -> None:
    base_model = tiny("LlamaConfig")
    adapters = attach(base_model.model, variants.get(variant), VariantSettings(4, 8.0), targets)
    adapters.add_lane("x", VariantSettings(4, 8.0), seed=0)
    with adapters.activate_lanes(["x"], None):
        batch = DeviceBatch.copy_to(CPU, [pad_rows(rows(8), 8, 0)])
        forward.compute_objective(base_model, tasks.get("letters"), batch)[0].backward()
    of_output_layer = [p for n, p in adapters.trainable("x").items() if "lm_head" in n]
    assert of_output_layer
    assert any(p.grad is not None and p.grad.any() for p in of_output_layer)
