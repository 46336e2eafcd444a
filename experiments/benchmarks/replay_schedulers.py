r"""Compare early stopping with the full grid: the optimizer steps, and the chosen learning rates.

    python experiments/lr_sensitivity.py --dry-run --output full --study full --seeds 5 --evaluations 12 \
        --learning-rates 1e-4:7.6e-1:8 --widen 0 \
        --variants lora rslora lora_plus dora pissa hira vera eva lora_ga delta_lora
    python experiments/benchmarks/replay_schedulers.py full/store --output replays --rates 8 16 32 \
        --evaluations 3 12

The first command trains the full grid once: 10 variants, 32 rates, 5 seeds, each evaluated 12 times (half an
hour on two idle cores). The second command replays it: Tune, broker and trainers are real, and each lane's
losses come from the stored records. It writes replays/replays.json and replays/replays.md and skips replays
that replays.json already holds. Coarser grids consist of every 2nd and every 4th stored rate; `--evaluations
3` uses every 4th of 12 stored evaluations. With `--without-ray`, no cluster is started and a replay takes
seconds.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown_table import markdown_table

from orchestrator.util.command import main

if TYPE_CHECKING:
    from simulated_curves import SimulationPlan

    from orchestrator.execution.ray.runtime import Cluster
    from orchestrator.record.schema import Record
    from orchestrator.study.configuration import Configuration

TRAINERS = 2  # the number in a dry run on two cores


@dataclass(frozen=True)
class Options:
    """Options of the script."""

    store: Path
    """Folder of the store that holds the full grid."""
    output: Path = Path("replays")
    """Folder for the results, and for the stores of replays that are running."""
    rates: tuple[int, ...] = (8, 16, 32)
    """Numbers of learning rates in the replayed grids."""
    schedulers: tuple[str, ...] = ("asha", "hyperband", "median")
    evaluations: tuple[int, ...] = ()
    """Numbers of evaluations of a lane. Default: the stored number. Each must divide it, or exceed it with
    --loss-window."""
    loss_window: int = 0
    """With more evaluations than are stored, the mean training loss of this many steps replaces a validation
    loss. (Both estimate the same where no example is seen twice.)"""
    without_ray: bool = False
    """Simulate the schedulers in this process, without a Ray cluster; not possible for hyperband."""
    variants: tuple[str, ...] = ()
    """Variants to replay. Default: all stored ones."""


def run() -> None:
    """Replay every combination of evaluations, rates and scheduler that is not in replays.json yet."""
    import tyro

    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    from orchestrator.execution.ray import runtime as ray_cluster

    options.output.mkdir(parents=True, exist_ok=True)
    full_records = _full_grid_records(options)
    file = options.output / "replays.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    replayed = {(row["evaluations"], row["rates"], row["scheduler"], row["without_ray"]) for row in rows}
    stored_evaluations = max(record.configuration.evaluations for record in full_records)
    wanted = product(options.evaluations or (stored_evaluations,), options.rates, options.schedulers)
    with nullcontext() if options.without_ray else ray_cluster.connect() as cluster:
        for evaluations, rates, scheduler in wanted:
            if (evaluations, rates, scheduler, options.without_ray) not in replayed:
                rows.append(_replay(options, cluster, full_records, rates, scheduler, evaluations))
                file.write_text(json.dumps(rows, indent=1) + "\n")
                print(*_summary_cells(rows[-1]), flush=True)
    text = _markdown(rows)
    (options.output / "replays.md").write_text(text)
    print(text)


def _full_grid_records(options: Options) -> list[Record]:
    """Return the records of the full grid. Raises UsageError when there are none."""
    from orchestrator.record.store import Store
    from orchestrator.util.errors import UsageError

    found = [
        record
        for record in Store(options.store, create=False).records()
        if record.state in ("finished", "diverged")
        and (not options.variants or record.configuration.variant.name in options.variants)
    ]
    if not found:
        raise UsageError(
            f"--store {str(options.store)!r}: holds no complete curve; train the full grid first, see --help."
        )
    return found


def _learning_rate(record: Record) -> float:
    return record.configuration.optimizer.learning_rate


def _replay(
    options: Options,
    cluster: Cluster | None,
    full_records: Sequence[Record],
    rates: int,
    scheduler: str,
    evaluations: int,
) -> dict[str, Any]:
    """Replay one study under `scheduler` and compare it with the full grid of the same rates."""
    grid = sorted({_learning_rate(record) for record in full_records})
    grid = grid[:: max(1, len(grid) // rates)]
    grid_records = [record for record in full_records if _learning_rate(record) in grid]
    stored_evaluations = grid_records[0].configuration.evaluations
    configurations = [replace(record.configuration, evaluations=evaluations) for record in grid_records]
    started = time.monotonic()
    if cluster is None:
        steps, records = _simulate(options, configurations, grid_records, scheduler)
    else:
        from simulated_curves import SimulationPlan

        plan = SimulationPlan(str(options.store.resolve()), stored_evaluations, options.loss_window)
        steps, records = _train(configurations, scheduler, cluster, plan, options.output)
    return {
        "rates": rates,
        "scheduler": scheduler,
        "evaluations": evaluations,
        "without_ray": options.without_ray,
        "loss_window": options.loss_window if evaluations > stored_evaluations else 0,
        "configurations": len(configurations),
        "missing": len(configurations) - len(records),
        "states": dict(Counter(record.state for record in records)),
        "seconds": round(time.monotonic() - started),
        "steps": steps,
        "share": steps / sum(record.steps for record in grid_records),
        "variants": _summarize_variants(grid, grid_records, records),
    }


def _simulate(
    options: Options, configurations: Sequence[Configuration], grid_records: Sequence[Record], scheduler: str
) -> tuple[int, list[Record]]:
    """Apply the scheduler in this process. Returns the steps and the records of the study."""
    from simulated_schedulers import simulate_scheduler
    from simulated_training import LANES_PER_TRAINER

    from orchestrator.study.grid import training_order

    pairs = zip(configurations, grid_records, strict=True)
    records = simulate_scheduler(
        scheduler,
        training_order(configurations, LANES_PER_TRAINER),
        {configuration.fingerprint: record for configuration, record in pairs},
        TRAINERS * LANES_PER_TRAINER,
        options.loss_window,
    )
    return sum(record.steps for record in records), records


def _train(
    configurations: Sequence[Configuration],
    scheduler: str,
    cluster: Cluster,
    plan: SimulationPlan,
    output: Path,
) -> tuple[int, list[Record]]:
    """Run the study on the cluster, with a temporary store. Returns its steps and its records."""
    from simulated_training import train_simulated

    from orchestrator.record.store import Store

    with tempfile.TemporaryDirectory(dir=output) as folder:  # on storage that all nodes see
        store = Store(folder)
        steps = train_simulated(configurations, scheduler, cluster, TRAINERS, 0.0, store, plan)
        return steps, list(store.records())


def _summarize_variants(
    grid: Sequence[float], full_records: Sequence[Record], replayed_records: Sequence[Record]
) -> dict[str, dict[str, Any]]:
    """Compare the replay's choice of a learning rate with the full grid's, for each variant.

    Args:
        grid: The learning rates, ascending.
        full_records: The records of the full grid.
        replayed_records: The records that the replay left.

    Returns:
        Variant -> share of the steps, both chosen rates, their distance in points of the grid, the validation
        score of the full grid's choice, and the score that the replay's choice loses.
    """
    from orchestrator.analyze.sensitivity import summarize_panels

    def curves(records: Sequence[Record]) -> dict[str, Any]:
        return {curve.variant: curve for panel in summarize_panels(records) for curve in panel.curves}

    def steps(records: Sequence[Record], variant: str) -> int:
        return sum(record.steps for record in records if record.configuration.variant.name == variant)

    replayed_curves = curves(replayed_records)
    summaries = {}
    for variant, curve in curves(full_records).items():
        chosen = replayed_curves[variant].best_rate if variant in replayed_curves else None
        means = {point.learning_rate: point.validation.mean for point in curve.points}
        summaries[variant] = {
            "share": steps(replayed_records, variant) / steps(full_records, variant),
            "best_rate": curve.best_rate,
            "chosen": chosen,
            "grid_distance": None if chosen is None else grid.index(chosen) - grid.index(curve.best_rate),
            "best_score": means[curve.best_rate],
            "score_loss": None if chosen is None else means[curve.best_rate] - means[chosen],
        }
    return summaries


def _summary_cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
    variants = row["variants"].values()
    distances = [variant["grid_distance"] for variant in variants]
    near = sum(distance is not None and abs(distance) <= 1 for distance in distances)
    losses = [variant["score_loss"] for variant in variants if variant["score_loss"] is not None]
    return (
        *_labels(row),
        f"{row['share']:.1%}",
        f"{near} of {len(distances)}",
        f"{sum(losses) / len(losses):.3f}",
        f"{max(losses):.3f}",
        row["seconds"],
    )


def _labels(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["evaluations"], row["rates"], row["scheduler"]


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return two Markdown tables: one row per replay, then the variants of each replay."""
    ordered = sorted(rows, key=_labels)
    labels = ("evaluations", "rates", "scheduler")
    names = sorted({name for row in rows for name in row["variants"]})
    header = (*labels, "steps", "within one point", "mean score loss", "worst", "seconds")
    choices = [
        (*_labels(row), *(_format_choice(row["variants"].get(name)) for name in names)) for row in ordered
    ]
    return (
        f"{markdown_table(header, map(_summary_cells, ordered))}\n\n"
        "Of each variant: share of the steps, and distance from the full grid's best rate in grid points.\n\n"
        f"{markdown_table((*labels, *names), choices)}\n"
    )


def _format_choice(variant: Mapping[str, Any] | None) -> str:
    if variant is None or variant["grid_distance"] is None:
        return "none"
    distance = variant["grid_distance"]
    return f"{variant['share']:.0%}, {f'{distance:+d}' if distance else '0'}"


if __name__ == "__main__":
    main(run)
