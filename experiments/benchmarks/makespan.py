"""Compare whole studies with other ways to run the same study: seconds from the command to its end.

    python experiments/benchmarks/makespan.py --out makespan.json                     the small study
    python experiments/benchmarks/makespan.py --studies medium --out makespan.json    adds to the same file
    python experiments/benchmarks/makespan.py --sides ours actors --rounds 5 --out makespan.json

Studies, on the task `letters` (its base model is pretrained once, before the clock starts):
small   lora, rslora, dora, hira, pissa x 7 rates x 3 seeds = 105 runs of 60 steps; about 1 core-second a run
medium  lora, dora x 7 rates x 2 seeds = 28 runs of 600 steps; about 10 core-seconds a run
long    lora, dora x 2 rates = 4 runs of 3,600 steps; about 60 core-seconds a run

Sides, which run in turn with an empty store and one thread a process, as many processes as there are cores:
ours       experiments/lr_sensitivity.py, with its checkpoints, records, MLflow runs and report
actors     a Ray Tune class trainable with `reuse_actors`, the base model kept, PEFT, a hand-written loop
processes  plain processes with PEFT, without Ray

The alternatives write only the last scores. --out keeps the rounds of earlier
calls, so a long comparison can be run in parts; the table has the medians of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alternatives import Run, Study
from measuring import Summary, markdown_table

from orchestrator.finetune.data.batches import Row, compute_max_row_length, encode_examples
from orchestrator.finetune.models.catalogue import prepare_base_model
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.examples import SPLITS
from orchestrator.record.schema import current_commit
from orchestrator.record.store import Store
from orchestrator.util.command import main

FOLDER = Path(__file__).parent
LR_SENSITIVITY = FOLDER.parent / "lr_sensitivity.py"
TASK, MODEL = "letters", "letters-base"
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
CONVERGED = 0.9
"""Score from which on a run counts as converged. Scores of runs that converged on both sides are compared."""


@dataclass(frozen=True)
class Grid:
    """The runs of a study."""

    variants: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    steps: int

    @property
    def runs(self) -> list[Run]:
        """All runs, variant by variant."""
        return [Run(v, r, s) for v in self.variants for r in self.rates for s in range(self.seeds)]


STUDIES = {
    "tiny": Grid(("lora",), RATES[3:4], 2, 6),
    "small": Grid(("lora", "rslora", "dora", "hira", "pissa"), RATES, 3, 60),
    "medium": Grid(("lora", "dora"), RATES, 2, 600),
    "long": Grid(("lora", "dora"), RATES[2:4], 1, 3600),
}
SIDES = ("ours", "actors", "processes")


def prepare_study(name: str, work: Path) -> Study:
    """Return a study of `STUDIES`.

    Args:
        name: The name of the study.
        work: The folder that gets the base model of its task, if it lacks it.
    """
    task, grid = tasks.get(TASK), STUDIES[name]
    content = prepare_base_model(MODEL, work / "bases")
    defaults, processor = task.defaults, task.processor()  # type: ignore[attr-defined]  # of PretrainedTask
    counts = (defaults.train_size, defaults.validation_size, defaults.test_size)
    longest = compute_max_row_length(task, defaults.max_length) + 1
    rows = {
        split: _as_pairs(encode_examples(task.examples(split, count), task, processor, longest))
        for split, count in zip(SPLITS, counts, strict=True)
    }
    base = base_store.base_folder(work / "bases", MODEL, content)
    return Study(str(base), rows, grid.runs, grid.steps, defaults.evaluations, defaults.batch_size)


def _as_pairs(rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    return [(list(row.ids), [int(label) for label in row.targets]) for row in rows]


def run_side(side: str, name: str, study: Study, folder: Path, work: Path) -> dict[str, Any]:
    """Run a study on one side.

    Args:
        side: One of `SIDES`.
        name: The name of the study.
        study: The study.
        folder: The folder of this run, which must not exist.
        work: The folder with the base model.

    Returns:
        "seconds" of the command, and "scores": name of a run -> its scores.

    Raises:
        subprocess.CalledProcessError: The command failed; its output is in `folder`/log.
        RuntimeError: A run has no scores.
    """
    folder.mkdir(parents=True)
    command = _our_command(name, folder, work) if side == "ours" else _alternative(side, study, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    with (folder / "log").open("w") as log:
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)
        seconds = time.perf_counter() - started
    scores = _our_scores(folder) if side == "ours" else json.loads((folder / "scores.json").read_text())
    if missing := {run.key for run in study.runs} - scores.keys():
        raise RuntimeError(
            f"{side}: {len(missing)} runs have no score, such as {min(missing)}; see {folder}/log"
        )
    return {"seconds": seconds, "scores": scores}


def _our_command(name: str, folder: Path, work: Path) -> list[str]:
    grid = STUDIES[name]
    (folder / "store").mkdir()
    (folder / "store" / "bases").symlink_to(work / "bases")
    options = {
        "--task": [TASK],
        "--model": [MODEL],
        "--variants": grid.variants,
        "--learning-rates": [f"{rate:g}" for rate in grid.rates],
        "--seeds": [str(grid.seeds)],
        "--steps": [str(grid.steps)],
        "--widen": ["0"],
        "--output": [str(folder)],
        "--store": [str(folder / "store")],
    }
    return [sys.executable, str(LR_SENSITIVITY), *(word for k, v in options.items() for word in (k, *v))]


def _alternative(side: str, study: Study, folder: Path) -> list[str]:
    (folder / "study.json").write_text(json.dumps(asdict(study)))
    command = [sys.executable, str(FOLDER / "alternatives.py"), side, "study.json", "scores.json"]
    return [*command, "--processes", str(os.cpu_count())]


def _our_scores(folder: Path) -> dict[str, dict[str, float]]:
    scores = {}
    for record in Store(folder / "store").records():
        one = record.configuration
        key = Run(one.variant.name, one.optimizer.learning_rate, one.seed).key
        scores[key] = {f"{e.split} {n}": value for e in record.evaluations for n, value in e.scores.items()}
    return scores


def measure_round(
    name: str, options: argparse.Namespace, number: int, work: Path
) -> Iterator[dict[str, Any]]:
    """Run all sides once, in an order that rotates with the round, and yield a row for each.

    Args:
        name: The name of the study.
        options: The options of the command line.
        number: The number of the round.
        work: The folder of the studies' files.
    """
    study = prepare_study(name, work)
    shift = number % len(options.sides)
    for side in options.sides[shift:] + options.sides[:shift]:
        folder = work / f"{name}-{side}-{time.time_ns()}"
        row = run_side(side, name, study, folder, work)
        row |= {"study": name, "side": side, "round": number, "runs": len(study.runs)}
        row |= {"commit": current_commit(), "load": os.getloadavg()[0]}
        print(f"{name}, {side}: {row['seconds']:.1f} s for {row['runs']} runs", flush=True)
        yield row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of all rounds.

    Each side has its seconds, the ratio of our seconds to them over the rounds that have both, and the mean
    difference of the test scores of runs that have converged on both sides.
    """
    lines = []
    for study, side in dict.fromkeys((row["study"], row["side"]) for row in rows):
        mine, other = (
            {r["round"]: r for r in rows if (r["study"], r["side"]) == (study, s)} for s in ("ours", side)
        )
        both = sorted(mine.keys() & other.keys())
        pairs = [mine[number]["seconds"] / other[number]["seconds"] for number in both]
        seconds = Summary.of([row["seconds"] for row in other.values()])
        differences = [d for number in both for d in _score_differences(mine[number], other[number])]
        lines.append(
            [
                study,
                side,
                len(other),
                str(seconds),
                str(Summary.of(pairs)) if pairs else "",
                f"{statistics.mean(differences):+.3f} ({len(differences)} runs)" if differences else "",
            ]
        )
    header = ["study", "side", "rounds", "seconds", "ours / it", "its score - ours, converged runs"]
    return markdown_table(header, lines)


def _score_differences(mine: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Return the differences of the test scores of runs that have converged on both sides."""
    found, name = [], "test exact_match"
    for key, scores in other["scores"].items():
        pair = scores.get(name, 0.0), mine["scores"][key].get(name, 0.0)
        if min(pair) >= CONVERGED:
            found.append(pair[0] - pair[1])
    return found


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=sorted(STUDIES), default=["small"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1, help="rounds to add; default: 1")
    parser.add_argument("--work", type=Path, default=Path("makespan"), help="folder of the studies' files")
    parser.add_argument("--out", type=Path, help="JSON file; rounds that it has are kept")
    return parser.parse_args()


def run() -> None:
    """Run the rounds of the command line, and print the table of all rounds."""
    options = read_options()
    work = options.work.resolve()
    rows = json.loads(options.out.read_text()) if options.out is not None and options.out.exists() else []
    first = 1 + max((row["round"] for row in rows), default=-1)
    for number in range(first, first + options.rounds):
        for name in options.studies:
            for row in measure_round(name, options, number, work):
                rows.append(row)
                if options.out is not None:
                    options.out.write_text(json.dumps(rows) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    main(run)
