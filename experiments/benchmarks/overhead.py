"""Measure the share of a trainer's time that is neither an optimizer step nor an evaluation.

    python experiments/benchmarks/overhead.py                        a loop in this process, task `letters`
    python experiments/benchmarks/overhead.py --lanes 8 --runs 40 --steps 200
    python experiments/benchmarks/overhead.py --store results/store  every study that a store has

Without --store the real loop trains LoRA runs of `letters` from a list, with a real store: checkpoints and
records are written, and there is no Ray. With --store the records of real studies are read. A record says
where the time of its trainer's process went (docs/results.md). The *warm share* leaves out the time before
the first step: imports, the base model, the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from paired_timing import describe_machine

from orchestrator.analyze.costs import summarize_time_use
from orchestrator.finetune.engine import loop
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.catalogue import prepare_base_model
from orchestrator.finetune.models.loading import load_base_model
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.provenance import current_provenance
from orchestrator.record.schema import Record, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    VariantChoice,
)
from orchestrator.util.command import main
from orchestrator.util.errors import UsageError

TASK, MODEL = "letters", "letters-base"


@dataclass
class ListSource:
    """A lane source that leases the runs of a list in order and lets every lane train to its end."""

    waiting: list[Configuration]

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Lease the next runs, which all have one group key."""
        given, self.waiting = self.waiting[:capacity], self.waiting[capacity:]
        return LeaseGrant(tuple(Lease(one, 1) for one in given), closed=not self.waiting)

    def report(self, report: Report) -> Directive:
        """Let the lane continue."""
        return Directive.CONTINUE

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """Return no directive."""
        return {}

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """Refuse: no lane of this source is given back.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"lane {fingerprint[:12]} was given back; its failure is in the output above")

    def notify(self, line: str) -> None:
        """Print the line."""
        print(line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Do nothing: the lanes are those of the list."""

    def note_progress(self) -> None:
        """Do nothing: no heartbeat depends on the progress."""

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Do nothing: the record is in the store."""


def make_runs(store: Store, count: int, steps: int) -> list[Configuration]:
    """Return LoRA runs of different seeds.

    Args:
        store: The store, which gets the base model if it lacks it.
        count: The number of runs.
        steps: The optimizer steps of a run.
    """
    task = tasks.get(TASK)
    model = ModelChoice(MODEL, prepare_base_model(MODEL, store.bases))
    batches = BatchConfig(task.defaults.batch_size, 1, task.defaults.max_length)
    return [
        Configuration(
            VariantChoice("lora"),
            task.choice(),
            model,
            OptimizerConfig(1e-2),
            LRSchedule(steps),
            batches,
            evaluations=task.defaults.evaluations,
            seed=seed,
        )
        for seed in range(count)
    ]


def train_runs(store: Store, runs: list[Configuration], lanes: int, load: loop.BaseModelLoader) -> None:
    """Train runs of one group key in this process, without Ray.

    Args:
        store: The store, which gets the records.
        runs: The runs.
        lanes: Lanes that train at once.
        load: Loads the base model.
    """
    loop.run(
        ListSource(runs),
        store,
        load,
        loop.LoopSettings(lanes, idle_seconds=1.0),
        provenance=current_provenance,
    )


def _load_on_cpu(bases: Path, choice: ModelChoice, task: Task) -> BaseModel:
    return load_base_model(choice, bases, "cpu", task)


def summarize(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Return how the trainers of some records used their time, as a row of the result.

    Args:
        name: The name of the row.
        records: The records.

    Raises:
        UsageError: No record states its trainer's use of time.
    """
    time_use = summarize_time_use(records)
    if time_use is None:
        raise UsageError(f"{name}: no record says where the time went; an earlier version wrote them all.")
    warm = time_use.total - time_use.start
    return {
        "runs": len(records),
        "name": name,
        "train_seconds": time_use.train,
        "evaluate_seconds": time_use.evaluate + time_use.generate,
        "start_seconds": time_use.start,
        "other_seconds": time_use.other,
        "warm_share": time_use.other / warm,
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the shares."""
    header = ["what", "runs", "steps, s", "evaluation, s", "start, s", "other, s", "warm share of other"]
    names = ("train_seconds", "evaluate_seconds", "start_seconds", "other_seconds")
    return markdown_table(
        header,
        [
            [row["name"], row["runs"], *(f"{row[n]:.1f}" for n in names), f"{row['warm_share']:.1%}"]
            for row in rows
        ],
    )


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, help="read the records of this store and train nothing")
    parser.add_argument("--bases", type=Path, help="folder of prepared base models; default: pretrain one")
    parser.add_argument("--lanes", type=int, default=4, help="lanes that train at once; default: 4")
    parser.add_argument("--runs", type=int, default=20, help="runs to train; default: 20")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run; default: 60")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    return parser.parse_args()


def run() -> None:
    """Measure or read what the command line asks for, and print the table."""
    options = read_options()
    if options.store is not None:
        rows = [summarize(str(options.store), list(Store(options.store).records()))]
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            if options.bases is not None:
                store.bases = options.bases
            runs = make_runs(store, options.runs, options.steps)
            load = partial(_load_on_cpu, store.bases)
            train_runs(store, runs, options.lanes, load)
            name = f"{options.steps} steps, {options.lanes} lanes, one process"
            rows = [summarize(name, list(store.records()))]
    if options.out is not None:
        result = {"machine": describe_machine(torch.device("cpu")), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    main(run)
