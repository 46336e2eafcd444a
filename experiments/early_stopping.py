"""Does early stopping choose the rate that the full grid chooses?

    python experiments/early_stopping.py --dry-run      a rehearsal on this machine, no GPU, a few minutes
    python experiments/early_stopping.py                the study, on a GPU or a Ray cluster

The grid runs under --scheduler, then, in the same store, to the end: what was stopped goes on from its
checkpoint. --search, --sampler, --space and --points are refused: it is a grid. Early stopping cannot stop
what was trained to the end before: a store that knows such results, and a grid that is extended afterwards,
are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from orchestrator.analyze.selection import Choice
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions, parse
from orchestrator.util.command import main
from orchestrator.util.errors import BadInput


@dataclass(frozen=True)
class StoppingOptions(StudyOptions):
    scheduler: str = "asha"
    """The early stopping that is judged: asha, median, hyperband (Ray Tune's)."""


@dataclass(frozen=True)
class Stopping(Choice):
    """choice.json: of each variant the chosen rate and the optimizer steps of its lanes."""

    rates: Mapping[str, float | None]
    steps: Mapping[str, int]


def run() -> int:
    options = parse(__doc__, StoppingOptions)
    if options.search != "grid":
        raise BadInput(
            f"--search {options.search}: early stopping is compared with the full grid; take grid."
        )
    if options.scheduler == "none":
        raise BadInput("--scheduler none: the full grid is trained anyhow; take asha, median or hyperband.")
    from orchestrator.analyze import selection
    from orchestrator.launch.run_study import Experiment, run_study

    experiment = Experiment(
        script="early_stopping",
        question="Does early stopping choose the rate that the full grid chooses?",
        variants=("lora", "rslora", "dora", "hira", "pissa"),
        task="chain_sum",
        dry_run_task="letters",
    )
    scheduler = options.scheduler
    default_task = experiment.dry_run_task if options.dry_run else experiment.task
    study = selection.study_name(experiment.script, options, default_task)
    early = replace(options, study=f"{study}-{scheduler}")
    assert early.study is not None
    grid = replace(options, scheduler="none", study=f"{study}-grid")
    code = run_study(experiment, early, check=partial(_check, early))
    if code == 0 and not options.plan:
        # Kept, as the summary is another one when the grid has gone on.
        stopping = selection.keep(options.output / early.study, Stopping, partial(_found, early))
    code = code or run_study(experiment, grid)
    if code == 0 and not options.plan:
        _print(scheduler, stopping, _found(grid))
    return code


def _check(options: StudyOptions, wanted: Sequence[Configuration]) -> None:
    """Raises BadInput where the grid has gone on already: what it trained would pass for early stopping's."""
    from orchestrator.analyze import selection
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import StudyFile

    assert options.study is not None
    folder, store = options.output / options.study, Store(options.store_folder)
    asked, rule = [c.fingerprint for c in wanted], "take an --output of its own, without --store"
    why = f", some of them trained to the end; {rule}"
    if selection.refuse_another(folder, options.study, asked, "early stopping", why):
        return
    done = {f for f in asked if store.meets(f) is not None}
    study = (StudyFile.read(folder) or StudyFile(options.study, "", "")).extended(asked, done)
    if before := done.intersection(study.reused):
        raise BadInput(
            f"--store {str(store.root)!r}: {len(before)} of the {len(wanted)} configurations were trained to "
            f"the end there before this study, too late for early stopping; {rule}."
        )


def _found(options: StudyOptions) -> Stopping:
    """What the study says now."""
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import find_study

    assert options.study is not None
    folder, study = find_study(options.output, options.study)
    curves = [c for p in json.loads((folder / "summary.json").read_text())["panels"] for c in p["curves"]]
    store = Store(options.store_folder)
    steps: Counter[str] = Counter()
    for record in filter(None, map(store.get, study.configurations)):
        steps[record.configuration.variant.name] += record.steps
    rates = {curve["variant"]: curve["best_rate"] for curve in curves}
    return Stopping(tuple(sorted(study.configurations)), rates, dict(steps))


def _print(scheduler: str, stopping: Stopping, grid: Stopping) -> None:
    from orchestrator.analyze.formatting import rate

    print(f"\n{'':12} {'chosen rate':^17} {'optimizer steps':^19}")
    print(f"{'variant':12} {scheduler:>9} {'grid':>7} {scheduler:>11} {'grid':>7}")
    rates = [(stopping.rates.get(variant), grid.rates[variant]) for variant in grid.rates]
    for variant, (early, full) in zip(grid.rates, rates, strict=True):
        counts = f"{stopping.steps.get(variant, 0):11} {grid.steps[variant]:7}"
        print(f"{variant:12} {rate(early):>9} {rate(full):>7} {counts}")
    same = sum(early == full for early, full in rates if full is not None)
    share = sum(stopping.steps.values()) / sum(grid.steps.values())
    print(f"The same rate for {same} of {len(rates)} variants, in {share:.0%} of the steps.")


if __name__ == "__main__":
    main(run)
