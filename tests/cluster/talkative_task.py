"""A letters task whose code raises an error with secrets, as a user's code may do.

Lanes with learning rates above 1e-2 fail with an error that contains every secret of the environment, and a
server's address with a password, as errors of database drivers do. All lanes wait for the file whose path is
in the variable TEST_GO.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.local.letters import Letters

SECRETS = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)


class TalkativeLetters(Letters):
    defaults = replace(Letters.defaults, steps=12, evaluations=2, validation_size=50, test_size=50)

    def pretrain_recipe(self) -> str:
        return ""  # the test provides the model


def wait_and_fail(optimizer: Any, args: Any, kwargs: Any) -> None:
    while not Path(os.environ["TEST_GO"]).exists():
        time.sleep(0.05)
    if optimizer.param_groups[0]["lr"] > 1e-2:
        secrets = " ".join(f"{name}={os.environ[name]}" for name in SECRETS)
        raise ConnectionError(f"cannot reach {os.environ['TEST_SERVER']} with {secrets}")


if "TEST_SERVER" in os.environ:
    register_optimizer_step_pre_hook(wait_and_fail)
