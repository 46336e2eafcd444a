"""DenseLoRA's rule and initialization."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_output
from torch import Tensor, nn

from variants import catalogue
from variants.api import MergeError, Params, VariantSettings
from variants.merging import merge_and_detach
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes

SETTINGS = VariantSettings(2, 8.0, extra={"rank_factor": 3})


def encode_adapt_decode(
    x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float
) -> Tensor:
    """Apply encoder, GELU, M, decoder and GELU, as `Linear.forward` of the authors' code does."""

    def gelu(y: Tensor) -> Tensor:
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2

    return s * gelu(gelu(x @ params["A"].T) @ params["M"].T @ params["B"].T)


def test_the_update_is_decoder_of_m_of_encoder() -> None:
    check_output("dense_lora", encode_adapt_decode, settings=SETTINGS)


def test_encoder_and_decoder_are_shared_and_m_is_not() -> None:
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("dense_lora"), 1, SETTINGS)
    tensors = adapters.trainable("0")
    group = "group:model.layers.self_attn.k_proj"
    assert tensors[f"{group}.A"].shape == (6, 32)
    assert tensors[f"{group}.B"].shape == (16, 6)
    assert not tensors[f"{group}.B"].any()
    first, second = (tensors[f"model.layers.{block}.self_attn.k_proj.M"] for block in (0, 1))
    assert first.shape == (6, 6)
    assert not torch.equal(first, second)


def test_m_is_kaiming_uniform() -> None:
    settings = VariantSettings(8, 16.0)
    adapters = attach_lanes(Case("wide"), catalogue.get("dense_lora"), 1, settings)
    m = adapters.trainable("0")["there.0.M"]
    expected = nn.init.kaiming_uniform_(torch.empty(1000, 192), a=math.sqrt(5))
    assert m.shape == (192, 192), "the published study's r = 192"
    assert m.abs().max() <= 192**-0.5
    torch.testing.assert_close(m.std(), expected.std(), rtol=0.03, atol=0)
    assert adapters.variant.scaling(adapters.settings) == 384 / 192, "the published study's alpha = 384"


def test_a_nonlinear_update_cannot_be_merged() -> None:
    adapters = attach_lanes(Case("wide"), catalogue.get("dense_lora"), 1, SETTINGS)
    with pytest.raises(MergeError, match="dense_lora"):
        merge_and_detach(adapters, "0")
