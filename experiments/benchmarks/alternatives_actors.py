"""The study of `makespan.py` with Ray Tune's class trainable, reused actors and PEFT.

    python alternatives_actors.py STUDY.json SCORES.json --processes 2

Each actor loads the base model once and trains one run after another; `step` trains to the next evaluation.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from alternatives_peft import FineTune, Run, Study, read_options, write_tune_scores
from ray import tune


class PeftTrainable(tune.Trainable):
    """One run at a time; the base model stays in the process."""

    def setup(self, config: dict[str, Any]) -> None:
        """Load the study and the base model, and begin the first run."""
        torch.set_num_threads(1)
        self.study = Study.read(Path(config["study"]))
        self.base = self.study.load_base()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another run in the same process."""
        self.fine_tune = FineTune(self.study, self.base, Run(**new_config["run"]))
        self.evaluation_steps = iter(self.study.evaluation_steps)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation. Returns its scores."""
        scores: dict[str, Any] = self.fine_tune.train_to(next(self.evaluation_steps))
        return {**scores, "run": self.fine_tune.run.key, "done": self.fine_tune.step == self.study.steps}


def run() -> None:
    """Train the study of the command line."""
    options = read_options(__doc__)
    ray.init(num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
    runs = [asdict(each) for each in Study.read(options.study).runs]
    tuner = tune.Tuner(
        tune.with_resources(PeftTrainable, {"cpu": 1}),
        param_space={"study": str(options.study.resolve()), "run": tune.grid_search(runs)},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(options.scores.parent.resolve() / "tune"),
            verbose=0,
            # By default Tune saves class trainables at their end; this one would fail and lose its actor.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    write_tune_scores(tuner.fit(), options.scores)


if __name__ == "__main__":
    run()
