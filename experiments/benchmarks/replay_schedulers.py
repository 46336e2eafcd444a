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

SEATS, LANES = 2, 4  # as a dry run on two cores


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
    full = _full(options)
    file = options.output / "replays.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(row["rates"], row["scheduler"], row["evaluations"], row["here"]) for row in rows}
    stored = max(record.configuration.evaluations for record in full)
    with nullcontext() if options.here else ray_cluster.connect() as cluster:
        for evaluations in options.evaluations or (stored,):
            for rates in options.rates:
                for scheduler in options.schedulers:
                    if (rates, scheduler, evaluations, options.here) not in done:
                        rows.append(_replay(options, cluster, full, rates, scheduler, evaluations))
                        file.write_text(json.dumps(rows, indent=1) + "\n")
                        print(_line(rows[-1]), flush=True)
    text = _markdown(rows)
    (options.output / "replays.md").write_text(text)
    print(text)


def _full(options: Options) -> list[Record]:
    """The records of the full grid. Raises BadInput when there is none."""
    from orchestrator.record.store import Store
    from orchestrator.util.errors import BadInput

    found = [
        record
        for record in Store(options.store, create=False).records()
        if record.state in ("finished", "diverged")
        and (not options.variants or record.configuration.variant.name in options.variants)
    ]
    if not found:
        raise BadInput(f"{str(options.store)!r} holds no whole curve; train the full grid first, see --help.")
    return found


def _rate(record: Record) -> float:
    return record.configuration.optimizer.learning_rate


def _replay(
    options: Options,
    cluster: Cluster | None,
    full: Sequence[Record],
    rates: int,
    scheduler: str,
    evaluations: int,
) -> dict[str, Any]:
    """One study under `scheduler`, in a store of its own, measured against the records of the same grid."""
    import shutil

    from rehearsal import Plan, play

    from orchestrator.record.store import Store

    grid = sorted({_rate(record) for record in full})
    grid = grid[:: max(1, len(grid) // rates)]
    same = [record for record in full if _rate(record) in grid]
    stored = same[0].configuration.evaluations
    points = [replace(record.configuration, evaluations=evaluations) for record in same]
    began = time.monotonic()
    if cluster is None:
        from decide import decide

        from orchestrator.study.grid import order_of_entry

        whole = {point.fingerprint: record for point, record in zip(points, same, strict=True)}
        found = decide(scheduler, order_of_entry(points, LANES), whole, SEATS * LANES, options.guess)
        counted = sum(record.steps for record in found)
    else:
        folder = options.output / f"{rates}-{scheduler}-{evaluations}"
        shutil.rmtree(folder, ignore_errors=True)  # of a replay that was broken off
        store, plan = Store(folder), Plan(str(options.store.resolve()), stored, options.guess)
        counted = play(points, scheduler, cluster, SEATS, LANES, store, plan)
        found = [record for point in points if (record := store.get(point.fingerprint)) is not None]
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    return {
        "rates": rates,
        "scheduler": scheduler,
        "evaluations": evaluations,
        "here": options.here,
        "guess": options.guess if evaluations > stored else 0,
        "configurations": len(points),
        "missing": len(points) - len(found),
        "states": dict(Counter(record.state for record in found)),
        "seconds": round(seconds),
        "steps": counted,
        "share": counted / sum(record.steps for record in same),
        "variants": _by_variant(grid, same, found),
    }


def _by_variant(
    grid: Sequence[float], full: Sequence[Record], found: Sequence[Record]
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

    every, early, whole, spent = curves(full), curves(found), steps(full), steps(found)
    told = {}
    for variant, curve in every.items():
        chosen = early[variant].best_rate if variant in early else None
        means = {point.learning_rate: point.validation.mean for point in curve.points}
        told[variant] = {
            "share": spent[variant] / whole[variant],
            "best": curve.best_rate,
            "chosen": chosen,
            "away": None if chosen is None else grid.index(chosen) - grid.index(curve.best_rate),
            "best_score": means[curve.best_rate],
            "lost": None if chosen is None else means[curve.best_rate] - means[chosen],
        }
    return told


def _near(row: Mapping[str, Any]) -> str:
    aways = [variant["away"] for variant in row["variants"].values()]
    near = sum(away is not None and abs(away) <= 1 for away in aways)
    return f"{near} of {len(aways)}"


def _line(row: Mapping[str, Any]) -> str:
    lost = [variant["lost"] for variant in row["variants"].values() if variant["lost"] is not None]
    return (
        f"| {row['evaluations']} | {row['rates']} | {row['scheduler']} | {row['share']:.0%} | {_near(row)} "
        f"| {sum(lost) / len(lost):.3f} | {max(lost):.3f} | {row['seconds']} |"
    )


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """All replays, one a line, then each variant of every replay."""
    ordered = sorted(rows, key=lambda row: (row["evaluations"], row["rates"], row["scheduler"]))
    lines = [
        "| evaluations | rates | scheduler | steps | within one point | mean score lost | most | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, ordered),
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
        cells = [_cell(row["variants"].get(name)) for name in names]
        lines.append(f"| {row['evaluations']} | {row['rates']} | {row['scheduler']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(variant: Mapping[str, Any] | None) -> str:
    if variant is None or variant["away"] is None:
        return "none"
    return (
        f"{variant['share']:.0%}, {variant['away']:+d}" if variant["away"] else f"{variant['share']:.0%}, 0"
    )


if __name__ == "__main__":
    main(run)
