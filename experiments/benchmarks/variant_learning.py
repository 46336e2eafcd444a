"""Does every variant learn? The tables of docs/learning.md, from the records of ordinary studies.

    python experiments/benchmarks/variant_learning.py                    the commands of the studies
    python experiments/benchmarks/variant_learning.py STUDY ...          the tables, when they have run
    python experiments/benchmarks/variant_learning.py STUDY ... --write  the same, into docs/learning.md

Every variant is trained at five rates with two seeds. The rates are multiplied by the order of magnitude that
the variant declares for its best rate (`typical_lr_scale`); there is one study for each order. A row has a
variant's best learning rate, chosen by the validation score, its scores there (means over the seeds), and the
gain of the test score over the untrained base model, in points. "learns" is yes if the mean gain is above 0.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from markdown_table import markdown_table

import orchestrator
from orchestrator.analyze.number_format import points, rate
from orchestrator.analyze.results import Curve, Panel
from orchestrator.analyze.run_labels import USABLE
from orchestrator.study.option_groups import default_output
from orchestrator.util.command import main
from orchestrator.util.errors import UsageError
from variants import catalogue

PAGE = Path(__file__).parents[2] / "docs" / "learning.md"
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates of a variant whose best rate is about LoRA's."""
CONTROLS = ("lora", "full", "head_only")
"""The rows that come first: LoRA and the controls."""
HEADER = ("variant", "best rate", "validation", "test", "gain, points", "runs without a result", "learns")


def study_commands(task: str, variants: Sequence[str]) -> dict[str, str]:
    """Return the commands of the studies by their names, one for each order of magnitude of the rates.

    Args:
        task: The task; `letters` has no classification head, so `head_only` is left out there.
        variants: The variants.
    """
    by_scale: dict[float, list[str]] = defaultdict(list)
    for name in variants:
        if name != "head_only" or task != "letters":
            by_scale[catalogue.get(name).typical_lr_scale].append(name)
    commands = {}
    for scale, names in sorted(by_scale.items()):
        study = f"learning-{task}-{scale:g}"
        words = ["python", "experiments/lr_sensitivity.py", "--dry-run", "--task", task, "--seeds", "2"]
        words += ["--widen", "0", "--study", study]
        words += ["--learning-rates", *(f"{rate * scale:g}" for rate in RATES), "--variants", *names]
        commands[study] = shlex.join(words)
    return commands


def learning_table(curves: Iterable[Curve]) -> str:
    """Return the table of one task, the controls first and then by test score."""
    return markdown_table(HEADER, (_cells(curve) for curve in sorted(curves, key=_order)))


def _order(curve: Curve) -> tuple[int, float, str]:
    place = CONTROLS.index(curve.variant) if curve.variant in CONTROLS else len(CONTROLS)
    score = curve.best_test.mean if curve.best_test.mean is not None else -1.0
    return place, -score, curve.label


def _cells(curve: Curve) -> tuple[str, ...]:
    gain = curve.gain_over_untrained.mean
    runs = sum(len(point.runs) for point in curve.points)
    lost = sum(run.label != USABLE for point in curve.points for run in point.runs)
    return (
        f"`{curve.label}`",
        rate(curve.best_rate),
        _score(curve.best_validation.mean),
        _score(curve.best_test.mean),
        points(gain),
        f"{lost} of {runs}",
        "yes" if gain is not None and gain > 0 else "**no**",
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def describe_panels(panels: Sequence[Panel]) -> str:
    """Return the table of each task, below a line with the task and the untrained base model's score."""
    by_task: dict[str, list[Panel]] = defaultdict(list)
    for panel in panels:
        by_task[panel.task].append(panel)
    parts = []
    for task, own in by_task.items():
        curves = {curve.label: curve for panel in own for curve in panel.curves}
        untrained = _score(own[0].untrained_test)
        parts.append(f"Task `{task}`, {own[0].metric}; the untrained base model scores {untrained}.")
        parts.append(learning_table(curves.values()))
    return "\n\n".join(parts)


def write_page(tables: str) -> None:
    """Write the tables between the markers of docs/learning.md."""
    pattern = re.compile(r"(<!-- learning:[^\n]*-->\n).*?(<!-- end of learning -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda found: f"{found[1]}\n{tables}\n\n{found[2]}", PAGE.read_text()))


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="none: print the commands of the studies")
    parser.add_argument("--output", type=Path, default=default_output(), help="folder with the studies")
    parser.add_argument("--task", default="letters", help="task of the printed commands; default: letters")
    parser.add_argument("--write", action="store_true", help="write docs/learning.md")
    return parser.parse_args()


def run() -> None:
    """Print the commands of the studies, or the tables of studies that have been run."""
    options = read_options()
    if not options.studies:
        commands = study_commands(options.task, catalogue.names())
        print("\n".join(commands.values()))
        print(f"python experiments/benchmarks/variant_learning.py {' '.join(commands)} --write")
        return
    panels = []
    for study in options.studies:
        own = orchestrator.load(study, output=options.output).summary.panels
        if not own:
            raise UsageError(f"study {study!r}: it has no curves over learning rates")
        panels += own
    tables = describe_panels(panels)
    print(tables)
    if options.write:
        write_page(tables)


if __name__ == "__main__":
    main(run)
