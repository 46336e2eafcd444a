"""PEFT's OFT with the Cayley-Neumann series and in the exact form, both with blocks of 8 inputs."""

from __future__ import annotations

from parity import Reference
from peft import OFTConfig

REFERENCE = Reference(
    lambda targets: OFTConfig(oft_block_size=8, target_modules=targets),
    {"oft_R.weight": "Q"},
    extra={"block_size": 8},
    models=("llama",),
)
OTHER_SETTINGS = {
    "exact": Reference(
        lambda targets: OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=targets),
        {"oft_R.weight": "Q"},
        extra={"block_size": 8, "cayley_neumann": False},
    )
}
