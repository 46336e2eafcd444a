"""vLLM's rule for adapters. The laws check the other forms of export: PEFT's format and merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from variants import catalogue
from variants.export_forms import export_forms, vllm_max_lora_rank, vllm_obstacle
from variants.storage import save_peft
from variants.testing import CASES
from variants.testing.rig import attach_lanes

LORA = {"peft_type": "LORA", "r": 16, "bias": "none", "use_dora": False, "modules_to_save": None}


@pytest.mark.parametrize(
    ("fields", "obstacle"),
    [
        ({}, ""),
        ({"use_rslora": True, "r": 512}, ""),
        ({"peft_type": "LOHA"}, "loads LoRA, and no other method"),
        ({"use_dora": True}, "does not load DoRA"),
        ({"modules_to_save": ["classifier"]}, "loads no trained head"),
        ({"bias": "all"}, "loads no biases"),
        ({"r": 513}, "rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 8}}, "one rank for all layers"),
    ],
)
def test_vllms_rule_admits_plain_lora_alone(fields: dict[str, Any], obstacle: str) -> None:
    found = vllm_obstacle({**LORA, **fields})
    assert (obstacle in found) if obstacle else not found


def test_vllm_is_started_with_the_next_rank_that_it_knows() -> None:
    assert [vllm_max_lora_rank(rank) for rank in (1, 2, 8, 257, 512, 513)] == [1, 8, 8, 320, 512, None]


@pytest.mark.parametrize(
    "name", [n for n in catalogue.names() if export_forms(catalogue.get(n)).vllm.possible]
)
def test_exports_for_vllm_have_loras_tensors_alone(name: str, tmp_path: Path) -> None:
    save_peft(attach_lanes(CASES[0], catalogue.get(name), 1), "0", tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not vllm_obstacle(config)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    for key, shape in shapes.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert shape["lora_B" in key] == config["r"]
