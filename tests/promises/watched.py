"""A LoRA variant that logs its steps, can be slowed down by a test, and fails at two learning rates.

It is a user's variant file (docs/variants.md, "Bring your own variant"). The environment variable WATCHED
names the folder that it shares with the test. Studies use it with a constant learning rate, which identifies
a lane among those with the same seed. Lanes of fewer than 12 steps are not logged: the program tries a user's
variant on such lanes before it trains.
"""

import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from variants import api
from variants.baseline.lora import LoRA

RAISES = 0.3
RUNS_OUT_OF_MEMORY = 0.7


class Watched(api.StepHooks, LoRA):
    """W' = W + s B A, as in LoRA."""

    def before_step(self, lane: api.LaneView) -> None:
        """Log the step; wait 0.2 s if the file `slow` exists, and while `held` exists; fail at two rates."""
        if lane.total_steps < 12:
            return
        folder = Path(os.environ["WATCHED"])
        rate = lane.learning_rate(next(iter(lane.layers.values())).trainable["A"])
        if lane.step == 0:
            tensors = {
                f"{name}.{key}": tensor.detach().clone().contiguous()
                for name, layer in lane.layers.items()
                for key, tensor in layer.trainable.items()
            }
            save_file(tensors, folder / f"initial-{rate:g}-{lane.seed}.safetensors")
        with (folder / f"{os.getpid()}.steps").open("a") as file:
            file.write(f"{rate:g} {lane.seed} {lane.step + 1}\n")
        began = time.monotonic()
        while (folder / "held").exists() or ((folder / "slow").exists() and time.monotonic() - began < 0.2):
            time.sleep(0.01)
        if abs(rate - RAISES) < 1e-6:
            raise ValueError(f"no lane of this variant learns at {RAISES}")
        if abs(rate - RUNS_OUT_OF_MEMORY) < 1e-6:
            raise torch.OutOfMemoryError(f"no memory for a lane at {RUNS_OUT_OF_MEMORY}")
