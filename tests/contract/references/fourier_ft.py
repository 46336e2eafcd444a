"""PEFT's FourierFT, whose locations are copied to the lane."""

from __future__ import annotations

from parity import Reference
from peft import FourierFTConfig, PeftConfig, PeftModel

from variants.adapters import Adapters
from variants.testing.cases import Case

FREQUENCIES, SCALE = 20, 20.0


def _config(targets: list[str]) -> PeftConfig:
    # With this seed no location is in the first row or column of a spectrum. These are sums over outputs or
    # inputs, whose gradient is zero beside GPT-2's layer norms: AdamW would make steps of PEFT's rounding.
    return FourierFTConfig(
        n_frequency=FREQUENCIES, scaling=SCALE, random_loc_seed=412, target_modules=targets
    )


def _init_fourier_ft(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = dict(reference_model.get_base_model().named_modules())
    for key, locations in adapters.frozen("0").items():
        locations.copy_(modules[key.removesuffix(".locations")].indices["default"])
        assert locations.all(), "a location in the first row or column"


REFERENCE = Reference(
    _config,
    {"fourierft_spectrum": "entries"},
    extra={"frequencies": FREQUENCIES, "scale": SCALE},
    init=_init_fourier_ft,
    tolerance=1e-4,
)
