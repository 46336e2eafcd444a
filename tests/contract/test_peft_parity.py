"""Every variant that PEFT has takes the same ten steps as PEFT's, on layers of Linear (Llama) and Conv1D
(GPT-2); the controls take those of plain AdamW."""

from __future__ import annotations

import parity
import pytest

from variants import catalogue
from variants.base import VerifiedBy


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, oracle in parity.SETTINGS.items() for model in oracle.models]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_ten_steps(name: str, model: str) -> None:
    parity.steps_alike(catalogue.get(name), parity.SETTINGS[name], model)


@pytest.mark.parametrize("model", parity.LANGUAGE)
def test_adalora_while_its_ranks_stay(model: str) -> None:
    ours = parity.steps_alike(catalogue.get("adalora"), parity.ADALORA_SETTLED, model)
    ranks = ours.ranks_in_use("0").values()
    assert sum(ranks) == len(ranks) * parity.RANK
    assert len(set(ranks)) > 1


def test_who_claims_an_oracle_has_one() -> None:
    claim = {
        name
        for name in catalogue.names()
        if catalogue.get(name).verified_by == VerifiedBy.REFERENCE_IMPLEMENTATION
    }
    assert claim == set(parity.SETTINGS)
