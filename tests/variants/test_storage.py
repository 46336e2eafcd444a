"""Loading of adapters that PEFT wrote, export in PEFT's format, and files of lanes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    HiraConfig,
    HRAConfig,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn

from variants import catalogue
from variants.adapters import attach
from variants.api import (
    FrozenLayer,
    InitialTensors,
    LayerRandom,
    PeftMethod,
    UnsupportedError,
    VariantSettings,
)
from variants.baseline.lora import LoRA
from variants.low_rank import LowRank
from variants.peft_format import PeftFormat
from variants.storage import convert_lane, load_lane, load_peft, save_lane, save_peft
from variants.testing import Case
from variants.testing.rig import attach_lanes

LLAMA, GPT2 = Case("llama", model="llama"), Case("gpt2", model="gpt2")
IDS = torch.randint(0, 16, (8, 5), generator=torch.Generator().manual_seed(0))


def save_with_peft(folder: Path, config: PeftConfig, base: nn.Module) -> torch.Tensor:
    """Save a PEFT adapter with random parameters and return its logits."""
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        (LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]), "lora"),
        (LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], use_rslora=True), "rslora"),
        (LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True), "dora"),
        (HiraConfig(r=3, target_modules=["up_proj"]), "hira"),
        (
            C3AConfig(block_size=8, target_modules=["q_proj", "up_proj"], block_size_pattern={"q_proj": 4}),
            "c3a",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_of_peft_are_loaded(tmp_path: Path, config: PeftConfig, variant: str) -> None:
    peft_logits = save_with_peft(tmp_path, config, LLAMA.build())
    adapters = load_peft(LLAMA.build(), tmp_path)
    assert adapters.variant.name == variant
    with torch.no_grad(), adapters.activate_lanes(["peft"], None):
        ours = adapters.model(IDS).logits
    torch.testing.assert_close(ours, peft_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_adapters_on_conv1d_are_loaded(tmp_path: Path) -> None:
    peft_logits = save_with_peft(tmp_path, LoraConfig(r=3, target_modules=["c_attn", "c_fc"]), GPT2.build())
    adapters = load_peft(GPT2.build(), tmp_path)
    with torch.no_grad(), adapters.activate_lanes(["peft"], None):
        torch.testing.assert_close(adapters.model(IDS).logits, peft_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_modules_to_save_become_the_lanes_head(tmp_path: Path, variant: str) -> None:
    config = LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=variant == "dora"
    )
    peft_logits = save_with_peft(tmp_path, config, LLAMA.build())
    adapters = load_peft(LLAMA.build(), tmp_path)
    assert adapters.variant.name == variant
    assert list(adapters.heads) == ["lm_head"]
    assert [name for name in adapters.trainable("peft") if adapters.is_head(name)] == ["lm_head.weight"]
    with torch.no_grad(), adapters.activate_lanes(["peft"], None):
        torch.testing.assert_close(adapters.model(IDS).logits, peft_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LNTuningConfig(target_modules=["norm"]), "no variant here is PEFT's LN_TUNING"),
        (LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, use_rslora=True), "no variant here is"),
        (LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"), "a pissa adapter over"),
        (LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"q_proj": 2}), "PEFT's rank_pattern"),
        (LoraConfig(r=3, target_modules=["q_proj"], bias="all"), "PEFT's bias 'all'"),
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"], bias="oft_only"), "PEFT's bias 'oft_only'"),
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"], coft=True), "no variant here is PEFT's OFT"),
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"], block_share=True), "no variant here is"),
        (
            LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"]),
            "modules_to_save has model.norm, a LlamaRMSNorm; only linear layers are read",
        ),
    ],
)
def test_unsupported_adapters_are_refused(tmp_path: Path, config: PeftConfig, message: str) -> None:
    save_with_peft(tmp_path, config, LLAMA.build())
    with pytest.raises(UnsupportedError, match=message):
        load_peft(LLAMA.build(), tmp_path)


@pytest.mark.parametrize("name", [n for n in catalogue.names() if vars(type(catalogue.get(n))).get("peft")])
def test_an_adapter_with_trained_biases_is_refused_for_every_variant(tmp_path: Path, name: str) -> None:
    variant = catalogue.get(name)
    config = variant.peft_config(variant.validate_settings(VariantSettings(4, 8.0)))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(UnsupportedError, match=r"PEFT's bias 'all' \(trained biases\) is not supported"):
        load_peft(LLAMA.build(), tmp_path)


def test_a_series_of_rotations_of_an_older_peft_is_refused(tmp_path: Path) -> None:
    config = OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    peft_logits = save_with_peft(tmp_path, config, LLAMA.build())
    adapters = load_peft(LLAMA.build(), tmp_path)
    with torch.no_grad(), adapters.activate_lanes(["peft"], None):
        torch.testing.assert_close(adapters.model(IDS).logits, peft_logits, rtol=1e-4, atol=1e-5)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    del saved["peft_version"]
    file.write_text(json.dumps(saved))
    with pytest.raises(UnsupportedError, match=r"PEFT before 0\.18 made the adapter"):
        load_peft(LLAMA.build(), tmp_path)
    file.write_text(json.dumps({**saved, "use_cayley_neumann": False}))
    assert not load_peft(LLAMA.build(), tmp_path).settings["cayley_neumann"]


@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
def test_a_boft_adapter_with_fewer_factors_than_its_config_names_is_refused(tmp_path: Path) -> None:
    save_with_peft(tmp_path, BOFTConfig(target_modules=["q_proj"]), LLAMA.build())
    file = tmp_path / "adapter_config.json"
    # What PEFT writes for two factors where it cannot build its CUDA extension.
    file.write_text(json.dumps({**json.loads(file.read_text()), "boft_n_butterfly_factor": 2}))
    with pytest.raises(UnsupportedError, match="has 1 of the 2 butterfly factors that its config names"):
        load_peft(LLAMA.build(), tmp_path)


def test_an_hra_adapter_may_have_more_reflections_than_a_layer_has_outputs(tmp_path: Path) -> None:
    rank = 18
    peft_logits = save_with_peft(tmp_path, HRAConfig(r=rank, target_modules=["k_proj"]), LLAMA.build())
    loaded = load_peft(LLAMA.build(), tmp_path)
    assert all(layer.frozen_layer.shape[0] < rank for layer in loaded.layers.values())
    with torch.no_grad(), loaded.activate_lanes(["peft"], None):
        torch.testing.assert_close(loaded.model(IDS).logits, peft_logits, rtol=1e-4, atol=1e-5)
    attach(LLAMA.build(), catalogue.get("hra"), VariantSettings(rank))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_with_peft(tmp_path, LoraConfig(r=3, target_modules=["q_proj"]), LLAMA.build())
    with pytest.raises(UnsupportedError, match="which the model does not have"):
        load_peft(GPT2.build(), tmp_path)


def test_pissa_is_exported_as_lora_of_twice_the_rank(tmp_path: Path) -> None:
    # Twice this rank exceeds the smaller side of some layers, 16, and the adapter is loaded all the same.
    settings = VariantSettings(10, 5.0)
    adapters = attach(LLAMA.build(), catalogue.get("pissa"), settings)
    adapters.add_lane("a", settings, 0)
    save_peft(adapters, "a", tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (20, 10.0, "LORA")
    assert config["base_model_name_or_path"] == "some/base"
    back = load_peft(LLAMA.build(), tmp_path)
    assert (back.variant.name, back.settings.rank) == ("lora", 20)


def test_layers_with_different_ranks_are_exported_with_a_rank_pattern(tmp_path: Path) -> None:
    settings = VariantSettings(3, 5.0)  # of which one goes to the pool of the layers of a type
    targets = "re:.*(q_proj|layers.0.self_attn.k_proj)"
    adapters = attach(LLAMA.build(), catalogue.get("rasa"), settings, targets=targets)
    adapters.add_lane("a", settings, 0)
    with torch.no_grad(), adapters.activate_lanes(["a"], None):
        for parameter in adapters.trainable("a").values():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ours = adapters.model(IDS).logits
    save_peft(adapters, "a", tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name[-6:]: rank for name, rank in config["rank_pattern"].items()} == {"q_proj": 4, "k_proj": 3}
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(LLAMA.build(), tmp_path)(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


class Aardvark(LoRA):
    """A user's variant with another initialization, whose name sorts before "lora"."""

    name = "aardvark"

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {**super().peft_config(settings), "init_lora_weights": "gaussian"}

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        return InitialTensors(
            {name: 2 * tensor for name, tensor in super().init(layer, random).trainable.items()}
        )


class Thirds(LoRA):
    """A user's variant with another scaling."""

    name = "thirds"

    def scaling(self, settings: VariantSettings) -> float:
        return super().scaling(settings) / 3


def test_a_subclass_does_not_load_plain_lora_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with_peft(tmp_path, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]), LLAMA.build())
    known = {"aardvark": Aardvark(), **{name: catalogue.get(name) for name in catalogue.names()}}
    monkeypatch.setattr(catalogue, "names", lambda: tuple(sorted(known)))
    monkeypatch.setattr(catalogue, "get", known.__getitem__)
    assert catalogue.names()[0] < "lora"
    assert load_peft(LLAMA.build(), tmp_path).variant.name == "lora"


@pytest.mark.parametrize(
    "name",
    [*(n for n in catalogue.names() if isinstance(v := catalogue.get(n), LowRank) and v.peft), "thirds"],
)
def test_the_exported_alpha_gives_the_variants_scaling(name: str) -> None:
    variant = Thirds() if name == "thirds" else catalogue.get(name)
    adapters = attach_lanes(LLAMA, variant, 1, VariantSettings(4, 6.0))
    config, _ = convert_lane(adapters, "0")
    if config["peft_type"] != "LORA":
        pytest.skip("PEFT scales this method by other rules")
    scaling = variant.scaling(adapters.lane_settings("0"))
    for layer in adapters.layers:
        rank = config.get("rank_pattern", {}).get(layer, config["r"])
        alpha = config.get("alpha_pattern", {}).get(layer, config["lora_alpha"])
        assert alpha / (rank**0.5 if config["use_rslora"] else rank) == pytest.approx(scaling)


class LinearOnly(LoRA):
    """A user's variant that PEFT has for layers of type Linear only, with whole numbers in its format."""

    name = "linear_only"
    peft = PeftMethod(
        "LINEAR", {"A": "a", "B": "b", "places": "i"}, optional=frozenset({"B"}), adapts_conv1d=False
    )


def test_whole_numbers_are_frozen_and_optional_tensors_may_be_missing() -> None:
    settings = VariantSettings(2, 4.0)
    layer = FrozenLayer("layer", torch.zeros(3, 5), None)
    tensors = {"A": torch.ones(2, 5), "places": torch.arange(2)}
    exported = PeftFormat.to_peft(LinearOnly(), tensors, layer.with_settings(settings))
    assert exported.keys() == {"a", "i"}
    loaded = LinearOnly().init_from_peft(exported, settings)
    assert (loaded.trainable.keys(), loaded.frozen.keys()) == ({"A"}, {"places"})
    with pytest.raises(KeyError, match="'a'"):
        LinearOnly().init_from_peft({"i": exported["i"]}, settings)


def test_an_export_that_peft_could_not_load_is_refused(tmp_path: Path) -> None:
    adapters = attach(GPT2.build(), LinearOnly(), VariantSettings(2))
    adapters.add_lane("a", VariantSettings(2), seed=5)
    with pytest.raises(UnsupportedError, match="linear_only cannot be exported: PEFT has this method for"):
        save_peft(adapters, "a", tmp_path, "some/base")
    assert not list(tmp_path.iterdir())


def test_a_lane_of_another_variant_is_refused(tmp_path: Path) -> None:
    adapters = attach(LLAMA.build(), catalogue.get("lora"), VariantSettings(2))
    adapters.add_lane("a", VariantSettings(2), seed=5)
    save_lane(adapters, "a", tmp_path / "a.safetensors")
    others = attach(LLAMA.build(), catalogue.get("dora"), VariantSettings(2))
    with pytest.raises(UnsupportedError, match="holds a lane of lora, not of dora"):
        load_lane(others, "b", tmp_path / "a.safetensors")


def test_a_lane_of_other_numerics_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = attach(LLAMA.build(), catalogue.get("lora"), VariantSettings(2))
    adapters.add_lane("a", VariantSettings(2), seed=5)
    save_lane(adapters, "a", tmp_path / "a.safetensors")
    monkeypatch.setattr(type(adapters.variant), "numerics", 3)
    with pytest.raises(UnsupportedError, match="saved with numerics 2 of lora; this version has 3"):
        load_lane(adapters, "b", tmp_path / "a.safetensors")
