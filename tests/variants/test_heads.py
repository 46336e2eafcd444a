"""A lane's own head: initialization, independence of lanes, saving, merging and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from variants import catalogue
from variants.api import UnsupportedError, VariantSettings
from variants.attach import Adapters, attach
from variants.merging import merge_and_detach
from variants.storage import load_lane, load_peft, save_lane, save_peft

SETTINGS = VariantSettings(rank=2, alpha=4.0)
IDS = torch.arange(16).view(8, 2)


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            num_labels=3,
        )  # fmt: skip
        return BertForSequenceClassification(config).to(dtype).eval()


def adapted(name: str = "lora", lanes: int = 2, dtype: torch.dtype = torch.float32) -> Adapters:
    adapters = attach(bert(dtype), catalogue.get(name), SETTINGS, heads=["classifier"])
    for lane in range(lanes):
        adapters.add_lane(str(lane), SETTINGS, seed=lane)
    return adapters


def logits(adapters: Adapters, *lanes: str) -> Tensor:
    with torch.no_grad(), adapters.activate_lanes(lanes, None, rows_per_lane=len(IDS)):
        return adapters.model(input_ids=IDS.repeat(len(lanes), 1)).logits


def perturb(adapters: Adapters) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lane in adapters.lanes:
            for parameter in adapters.trainable(lane).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))


def test_the_initial_head_depends_only_on_the_seed() -> None:
    lora, hira = adapted("lora"), adapted("hira")
    weight = lora.trainable("1")["classifier.weight"]
    assert torch.equal(weight, hira.trainable("1")["classifier.weight"])
    assert not torch.equal(weight, lora.trainable("0")["classifier.weight"])
    assert weight.detach().std().item() == pytest.approx(0.02, rel=0.3)
    assert not lora.trainable("1")["classifier.bias"].any()
    assert lora.is_head("classifier.weight")
    assert not lora.is_head("bert.encoder.layer.0.attention.self.query.A")


def test_the_base_model_uses_its_own_head_or_a_given_one() -> None:
    plain, adapters = bert(), adapted()
    with torch.no_grad():
        own = plain(input_ids=IDS).logits
        with adapters.disable_adapters():
            assert torch.equal(adapters.model(input_ids=IDS).logits, own)
        with adapters.disable_adapters(head_weights=adapters.init_heads(1)):
            given = adapters.model(input_ids=IDS).logits
    assert torch.equal(given, logits(adapters, "1"))
    assert not torch.equal(given, own)


def test_a_head_only_lane_is_a_linear_probe() -> None:
    """The gradients are those of logistic regression on the frozen features."""
    adapters, plain = adapted("head_only"), bert()
    labels = torch.arange(8) % 3
    with adapters.activate_lanes(["0", "1"], 0, rows_per_lane=8):
        out = adapters.model(input_ids=IDS.repeat(2, 1)).logits.chunk(2)
        sum(nn.functional.cross_entropy(each, labels) for each in out).backward()
    assert set(adapters.trainable("0")) == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        features = plain.bert(input_ids=IDS).pooler_output
    for lane in ("0", "1"):
        trainable = adapters.trainable(lane)
        probe = nn.functional.linear(features, trainable["classifier.weight"], trainable["classifier.bias"])
        error = probe.softmax(1) - nn.functional.one_hot(labels, 3)
        torch.testing.assert_close(trainable["classifier.weight"].grad, error.t() @ features / 8)


def test_head_only_needs_a_head() -> None:
    with pytest.raises(
        UnsupportedError, match="head_only trains the task's head alone, and this task has none"
    ):
        attach(bert(), catalogue.get("head_only"), SETTINGS)


def test_heads_are_float32_over_bfloat16() -> None:
    adapters = adapted(dtype=torch.bfloat16)
    assert adapters.trainable("0")["classifier.weight"].dtype == torch.float32
    assert logits(adapters, "0").dtype == torch.float32


@pytest.mark.parametrize("name", ["lora", "head_only", "full"])
def test_a_lane_and_its_head_are_saved_and_merged(name: str, tmp_path: Path) -> None:
    adapters = adapted(name, lanes=1)
    perturb(adapters)
    before = logits(adapters, "0")
    save_lane(adapters, "0", tmp_path / "lane.safetensors")
    fresh = adapted(name, lanes=0)
    load_lane(fresh, "0", tmp_path / "lane.safetensors")
    assert torch.equal(logits(fresh, "0"), before)
    merge_and_detach(adapters, "0")
    with torch.no_grad():
        torch.testing.assert_close(adapters.model(input_ids=IDS).logits, before)


def test_a_head_inside_the_base_is_exported_too(tmp_path: Path) -> None:
    """If a checkpoint has no pooler, the pooler belongs to the task's head."""
    heads = ["classifier", "bert.pooler"]
    adapters = attach(bert(), catalogue.get("lora"), SETTINGS, heads=heads)
    adapters.add_lane("0", SETTINGS, seed=0)
    perturb(adapters)
    save_peft(adapters, "0", tmp_path, "bert")
    peft_model = PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(input_ids=IDS).logits, logits(adapters, "0"))
    assert torch.equal(logits(load_peft(bert(), tmp_path, lane="0"), "0"), logits(adapters, "0"))


def test_targets_that_belong_to_the_head_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="targets 'classifier': all of it is the task's head"):
        attach(bert(), catalogue.get("lora"), SETTINGS, "classifier", heads=["classifier"])


def test_the_head_is_exported_as_a_module_to_save(tmp_path: Path) -> None:
    adapters = adapted(lanes=1)
    perturb(adapters)
    save_peft(adapters, "0", tmp_path, "bert")
    peft_model = PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(input_ids=IDS).logits, logits(adapters, "0"))
    back = load_peft(bert(), tmp_path, lane="0")
    torch.testing.assert_close(logits(back, "0"), logits(adapters, "0"))
