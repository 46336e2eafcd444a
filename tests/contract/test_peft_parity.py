"""Every variant that PEFT has takes the same ten steps as PEFT's, on layers of Linear (Llama) and Conv1D
(GPT-2)."""

from __future__ import annotations

import parity
import pytest

from variants import catalogue
from variants.contract import Checked


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", parity.SETTINGS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_ten_steps(name: str, model: str) -> None:
    parity.steps_alike(catalogue.get(name), parity.SETTINGS[name], model)


def test_who_claims_an_oracle_has_one() -> None:
    claim = {name for name in catalogue.names() if catalogue.get(name).checked == Checked.ORACLE}
    assert claim == set(parity.SETTINGS)
