"""The study of `makespan.py` as Ray's guide to hyperparameter tuning has it: a Ray Train run in each trial.

    python alternatives_trainers.py STUDY.json SCORES.json --processes 2

Each trial of Ray Tune starts a TorchTrainer with one worker, with transformers' Trainer and a PEFT model.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from alternatives_peft import (
    WARMUP,
    Run,
    Study,
    compute_loss,
    count_correct,
    peft_config,
    read_options,
    write_tune_scores,
)
from peft import get_peft_model
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from transformers import Trainer, TrainingArguments


class InOrder(Trainer):
    """A Trainer that takes the examples in the given order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_examples(study: Study, split: str, order: list[int]) -> list[dict[str, Any]]:
    """Return the rows of a split in the given order, as transformers' Trainer takes them."""
    ids, labels = study.tensors[split]
    return [{"input_ids": ids[row], "labels": labels[row]} for row in order]


def train_worker(config: dict[str, Any]) -> None:
    """Train one run in a Ray Train worker, and report its last scores."""
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
    TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            storage_path=str(Path(config["study"]).parent / "train"), callbacks=[TuneReportCallback()]
        ),
    ).fit()


def run() -> None:
    """Train the study of the command line."""
    options = read_options(__doc__)
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


if __name__ == "__main__":
    run()
