"""The study of `makespan.py` with Ray and PEFT, as one would write it without this project.

    python alternatives_ray.py {actors,trainers} STUDY.json SCORES.json --processes 2

actors    a Ray Tune class trainable with `reuse_actors`: each actor loads the base model once
trainers  as Ray's guide to hyperparameter tuning has it: each trial starts a TorchTrainer with one worker,
          with transformers' Trainer and a PEFT model
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from alternatives import (
    WARMUP,
    FineTune,
    Run,
    Study,
    compute_loss,
    count_correct,
    peft_config,
    read_options,
)
from peft import get_peft_model
from ray import tune


def write_tune_scores(results: Iterable[Any], file: Path) -> None:
    """Write the last scores of each run, taken from the results of Ray Tune, to a JSON file."""
    scores = {
        result.metrics["run"]: {k: v for k, v in result.metrics.items() if k.startswith(("val", "test "))}
        for result in results
    }
    file.write_text(json.dumps(scores))


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


def run_actors(options: argparse.Namespace) -> None:
    """Train the study with reused actors."""
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


def make_examples(study: Study, split: str, order: list[int]) -> list[dict[str, Any]]:
    """Return the rows of a split in the given order, as transformers' Trainer takes them."""
    ids, labels = study.tensors[split]
    return [{"input_ids": ids[row], "labels": labels[row]} for row in order]


def train_worker(config: dict[str, Any]) -> None:
    """Train one run in a Ray Train worker, and report its last scores."""
    import ray.train
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        """A Trainer that takes the examples in the given order."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    torch.set_num_threads(1)
    study, one = Study.read(Path(config["study"])), Run(**config["run"])
    torch.manual_seed(one.seed)
    model = get_peft_model(study.load_base(), peft_config(one.variant))
    order = [row for step in range(study.steps) for row in study.batch_rows(one.seed, step)]
    splits = {
        name: make_examples(study, name, list(range(len(study.rows[name]))))
        for name in ("validation", "test")
    }

    def compute_metrics(predictions: Any) -> dict[str, float]:
        logits, labels = (torch.from_numpy(x) for x in (predictions.predictions, predictions.label_ids))
        return {"exact_match": float(count_correct(logits, labels)) / len(labels)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=study.batch_size,
            per_device_eval_batch_size=64,
            max_steps=study.steps,
            learning_rate=one.rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            optim="adamw_torch_fused",
            eval_strategy="steps",
            eval_steps=study.steps // study.evaluations,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        trainer = InOrder(
            model,
            arguments,
            train_dataset=make_examples(study, "train", order),
            eval_dataset=splits["validation"],
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: compute_loss(
                outputs.logits, labels
            ),
            compute_metrics=compute_metrics,
        )
        trainer.train()
        scores = {name: trainer.evaluate(rows) for name, rows in splits.items()}
    last = {
        f"{name} {k}": found[f"eval_{k}"] for name, found in scores.items() for k in ("loss", "exact_match")
    }
    ray.train.report({**last, "run": one.key})


def train_trial(config: dict[str, Any]) -> None:
    """Run a Ray Train run in a trial."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            storage_path=str(Path(config["study"]).parent / "train"), callbacks=[TuneReportCallback()]
        ),
    ).fit()


def run_trainers(options: argparse.Namespace) -> None:
    """Train the study with a Ray Train run in each trial."""
    # A little more than the workers need, for the trials that wait for them.
    ray.init(num_cpus=options.processes + 1, include_dashboard=False, log_to_driver=False)
    runs = [asdict(each) for each in Study.read(options.study).runs]
    tuner = tune.Tuner(
        tune.with_resources(train_trial, {"cpu": 0.01}),
        param_space={"study": str(options.study.resolve()), "run": tune.grid_search(runs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=options.processes),
        run_config=tune.RunConfig(storage_path=str(options.scores.parent.resolve() / "tune"), verbose=0),
    )
    write_tune_scores(tuner.fit(), options.scores)


def run() -> None:
    """Train the study of the command line."""
    options = read_options(__doc__, "actors", "trainers")
    {"actors": run_actors, "trainers": run_trainers}[options.side](options)


if __name__ == "__main__":
    run()
