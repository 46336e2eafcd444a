"""Early stopping against the full grid: what it costs, and whether it chooses the same learning rate.

    python experiments/lr_sensitivity.py --dry-run --output full --study full --seeds 5 --evaluations 12 \\
        --learning-rates 1e-4:7.6e-1:8 \\
        --variants lora rslora lora_plus dora pissa hira vera eva lora_ga delta_lora
    python experiments/benchmarks/replay_schedulers.py full/store --output replays --rates 8 16 32 \\
        --evaluations 3 12

The first command trains the full grid once: 10 variants, 32 rates, 5 seeds, each evaluated 12 times (half an
hour on two idle cores). The second replays it: Tune, broker and seats are the real ones, and each lane's
losses are the stored ones. It writes replays/replays.json and replays/replays.md; what stands in the first is
not done again. Coarser grids are every 2nd and every 4th rate of the stored one. `--evaluations 3` looks at
every 4th of 12 stored evaluations. With `--here` no Ray is started, and a row takes seconds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.util.command import main

if TYPE_CHECKING:
    from orchestrator.execution.ray.runtime import Cluster
    from orchestrator.record.schema import Record

TRAINERS, LANES_PER_TRAINER = 2, 4  # as a dry run on two cores


@dataclass(frozen=True)
class Options:
    store: Path
    """The store that holds the full grid."""
    output: Path = Path("replays")
    """Folder for the figures, and for the stores of the replays while they run."""
    rates: tuple[int, ...] = (8, 16, 32)
    """Sizes of grid."""
    schedulers: tuple[str, ...] = ("asha", "hyperband", "median")
    evaluations: tuple[int, ...] = ()
    """How often a lane is looked at; each must divide the stored number. Default: the stored number."""
    guess: int = 0
    """Where more evaluations are asked for than are stored: the mean training loss of so many steps stands
    for a validation loss. (Where no example is seen twice both estimate the same.)"""
    here: bool = False
    """Ask the schedulers in this process, without Ray, as decide.py says; not hyperband."""
    variants: tuple[str, ...] = ()
    """Default: all that are stored."""


def run() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    from orchestrator.execution.ray import runtime as ray_cluster

    options.output.mkdir(parents=True, exist_ok=True)
    full_records = _full_grid_records(options)
    file = options.output / "replays.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    replayed = {(row["rates"], row["scheduler"], row["evaluations"], row["here"]) for row in rows}
    stored_evaluations = max(record.configuration.evaluations for record in full_records)
    with nullcontext() if options.here else ray_cluster.connect() as cluster:
        for evaluations in options.evaluations or (stored_evaluations,):
            for rates in options.rates:
                for scheduler in options.schedulers:
                    if (rates, scheduler, evaluations, options.here) not in replayed:
                        rows.append(_replay(options, cluster, full_records, rates, scheduler, evaluations))
                        file.write_text(json.dumps(rows, indent=1) + "\n")
                        print(_format_row(rows[-1]), flush=True)
    text = _markdown(rows)
    (options.output / "replays.md").write_text(text)
    print(text)


def _full_grid_records(options: Options) -> list[Record]:
    """The records of the full grid. Raises BadInput when there is none."""
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
            f"{str(options.store)!r} holds no whole curve; train the full grid first, see --help."
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
    """One study under `scheduler`, in a store of its own, measured against the records of the same grid."""
    import shutil

    from rehearsal import SimulationPlan, train_simulated

    from orchestrator.record.store import Store

    grid = sorted({_learning_rate(record) for record in full_records})
    grid = grid[:: max(1, len(grid) // rates)]
    grid_records = [record for record in full_records if _learning_rate(record) in grid]
    stored_evaluations = grid_records[0].configuration.evaluations
    configurations = [replace(record.configuration, evaluations=evaluations) for record in grid_records]
    began = time.monotonic()
    if cluster is None:
        from decide import simulate_scheduler

        from orchestrator.study.grid import training_order

        records_by_fingerprint = {
            point.fingerprint: record for point, record in zip(configurations, grid_records, strict=True)
        }
        replayed_records = simulate_scheduler(
            scheduler,
            training_order(configurations, LANES_PER_TRAINER),
            records_by_fingerprint,
            TRAINERS * LANES_PER_TRAINER,
            options.guess,
        )
        steps = sum(record.steps for record in replayed_records)
    else:
        folder = options.output / f"{rates}-{scheduler}-{evaluations}"
        shutil.rmtree(folder, ignore_errors=True)  # of a replay that was broken off
        store, plan = (
            Store(folder),
            SimulationPlan(str(options.store.resolve()), stored_evaluations, options.guess),
        )
        steps = train_simulated(configurations, scheduler, cluster, TRAINERS, LANES_PER_TRAINER, store, plan)
        replayed_records = [
            record for point in configurations if (record := store.get(point.fingerprint)) is not None
        ]
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    return {
        "rates": rates,
        "scheduler": scheduler,
        "evaluations": evaluations,
        "here": options.here,
        "guess": options.guess if evaluations > stored_evaluations else 0,
        "configurations": len(configurations),
        "missing": len(configurations) - len(replayed_records),
        "states": dict(Counter(record.state for record in replayed_records)),
        "seconds": round(seconds),
        "steps": steps,
        "share": steps / sum(record.steps for record in grid_records),
        "variants": _summarize_variants(grid, grid_records, replayed_records),
    }


def _summarize_variants(
    grid: Sequence[float], full_records: Sequence[Record], replayed_records: Sequence[Record]
) -> dict[str, dict[str, Any]]:
    """What was spent on each variant, which rate the product chooses from what it knows, and how far that is
    from the full grid's choice: in points of the grid, and in validation score."""
    from orchestrator.analyze.sensitivity import summarize

    def curves(records: Sequence[Record]) -> dict[str, Any]:
        return {curve.variant: curve for panel in summarize(records).panels for curve in panel.curves}

    def steps(records: Sequence[Record]) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for record in records:
            counts[record.configuration.variant.name] += record.steps
        return counts

    full_curves, replayed_curves, full_steps, replayed_steps = (
        curves(full_records),
        curves(replayed_records),
        steps(full_records),
        steps(replayed_records),
    )
    summaries = {}
    for variant, curve in full_curves.items():
        chosen = replayed_curves[variant].best_rate if variant in replayed_curves else None
        means = {point.learning_rate: point.validation.mean for point in curve.points}
        summaries[variant] = {
            "share": replayed_steps[variant] / full_steps[variant],
            "best": curve.best_rate,
            "chosen": chosen,
            "away": None if chosen is None else grid.index(chosen) - grid.index(curve.best_rate),
            "best_score": means[curve.best_rate],
            "lost": None if chosen is None else means[curve.best_rate] - means[chosen],
        }
    return summaries


def _count_within_one_point(row: Mapping[str, Any]) -> str:
    distances = [variant["away"] for variant in row["variants"].values()]
    near = sum(away is not None and abs(away) <= 1 for away in distances)
    return f"{near} of {len(distances)}"


def _format_row(row: Mapping[str, Any]) -> str:
    lost = [variant["lost"] for variant in row["variants"].values() if variant["lost"] is not None]
    return (
        f"| {row['evaluations']} | {row['rates']} | {row['scheduler']} | {row['share']:.0%} | {_count_within_one_point(row)} "
        f"| {sum(lost) / len(lost):.3f} | {max(lost):.3f} | {row['seconds']} |"
    )


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """All replays, one a line, then each variant of every replay."""
    ordered = sorted(rows, key=lambda row: (row["evaluations"], row["rates"], row["scheduler"]))
    lines = [
        "| evaluations | rates | scheduler | steps | within one point | mean score lost | most | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_format_row, ordered),
        "",
        "Each variant: share of the steps, and grid points from the full grid's best rate.",
        "",
    ]
    names = sorted({name for row in rows for name in row["variants"]})
    lines += [
        f"| evaluations | rates | scheduler | {' | '.join(names)} |",
        f"| --- | --- | --- | {' | '.join(['---'] * len(names))} |",
    ]
    for row in ordered:
        cells = [_format_cell(row["variants"].get(name)) for name in names]
        lines.append(f"| {row['evaluations']} | {row['rates']} | {row['scheduler']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _format_cell(variant: Mapping[str, Any] | None) -> str:
    if variant is None or variant["away"] is None:
        return "none"
    return (
        f"{variant['share']:.0%}, {variant['away']:+d}" if variant["away"] else f"{variant['share']:.0%}, 0"
    )


if __name__ == "__main__":
    main(run)
