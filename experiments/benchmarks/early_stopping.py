"""Compare early stopping with the full grid: the learning rates that they choose, and their optimizer steps.

    python experiments/benchmarks/early_stopping.py --output results-asha -- --dry-run --evaluations 10
    python experiments/benchmarks/early_stopping.py --output results-median --scheduler median -- --dry-run

Two studies of the same grid run in one store. The first uses the scheduler. The second trains the stopped
runs to the end. The words after `--` are options of `lora-orchestrator study` for both. The table has the
learning rate that each study chooses for each variant, and the first study's share of the second's steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import markdown_table

import orchestrator
from orchestrator.execution.schedulers import SCHEDULERS
from orchestrator.util.command import main


@dataclass(frozen=True)
class Outcome:
    """The learning rates that a study has chosen, and its optimizer steps."""

    rates: Mapping[str, float]
    """Variant and task -> the chosen learning rate; NaN if no run has a score."""
    steps: Mapping[str, int]
    """Variant and task -> optimizer steps of all runs."""


def train(study: str, output: Path, words: Sequence[str]) -> None:
    """Run `lora-orchestrator study`, and wait for its end."""
    command = [sys.executable, "-m", "orchestrator", "study", *words, "--study", study]
    subprocess.run([*command, "--widen", "0", "--output", str(output)], check=True)


def read_outcome(study: str, output: Path) -> Outcome:
    """Return the outcome of a study that has ended."""
    found = orchestrator.load(study, output=output)
    rates = {f"{row.variant} {row.task}": row.learning_rate for row in found.best.itertuples()}
    names = found.runs["variant"] + " " + found.runs["task"]
    return Outcome(rates, {str(k): int(v) for k, v in found.runs["steps"].groupby(names).sum().items()})


def format_table(scheduler: str, early: Outcome, full: Outcome) -> str:
    """Return a row for each variant, and one for all of them."""
    rows: list[list[object]] = []
    for name, rate in full.rates.items():
        chosen = early.rates.get(name)
        rows.append([name, chosen, rate, f"{early.steps.get(name, 0) / full.steps[name]:.0%}"])
    same = sum(early.rates.get(name) == rate for name, rate in full.rates.items())
    share = sum(early.steps.values()) / sum(full.steps.values())
    rows.append(["all", f"the same for {same} of {len(full.rates)}", "", f"{share:.0%}"])
    return markdown_table(["variant", f"rate, {scheduler}", "rate, full grid", "steps"], rows)


def run() -> None:
    """Run both studies, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of both studies; must not exist")
    parser.add_argument(
        "--scheduler", choices=[name for name in SCHEDULERS if SCHEDULERS[name]], default="asha"
    )
    parser.add_argument("--out", type=Path, help="write the outcomes to this JSON file")
    parser.add_argument("words", nargs="*", help="options of the studies")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output}: it exists; what was trained before cannot be stopped early")
    train("early", options.output, [*options.words, "--scheduler", options.scheduler])
    early = read_outcome("early", options.output)  # before the second study continues the stopped runs
    train("full", options.output, options.words)
    full = read_outcome("full", options.output)
    if options.out is not None:
        options.out.write_text(json.dumps({"early": asdict(early), "full": asdict(full)}, indent=1) + "\n")
    print(format_table(options.scheduler, early, full))


if __name__ == "__main__":
    main(run)
