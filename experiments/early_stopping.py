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
from orchestrator.study.options import StudyOptions, parse_options
from orchestrator.util.command import main
from orchestrator.util.errors import UsageError


@dataclass(frozen=True)
class EarlyStoppingOptions(StudyOptions):
    scheduler: str = "asha"
    """The early stopping that is judged: asha, median, hyperband (Ray Tune's)."""


@dataclass(frozen=True)
class EarlyStoppingChoice(Choice):
    """choice.json: of each variant the chosen rate and the optimizer steps of its lanes."""

    rates: Mapping[str, float | None]
    steps: Mapping[str, int]


def run() -> int:
    options = parse_options(__doc__, EarlyStoppingOptions)
    if options.search != "grid":
        raise UsageError(
            f"--search {options.search}: early stopping is compared with the full grid; take grid."
        )
    if options.scheduler == "none":
        raise UsageError("--scheduler none: the full grid is trained anyhow; take asha, median or hyperband.")
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
    study_name = selection.two_stage_study_name(experiment.script, options, default_task)
    early_options = replace(options, study=f"{study_name}-{scheduler}")
    assert early_options.study is not None
    grid_options = replace(options, scheduler="none", study=f"{study_name}-grid")
    code = run_study(experiment, early_options, check=partial(_refuse_unusable_results, early_options))
    if code == 0 and not options.plan:
        # Kept, as the summary is another one when the grid has gone on.
        early_choice = selection.load_or_make_choice(
            options.output / early_options.study, EarlyStoppingChoice, partial(_current_choice, early_options)
        )
    code = code or run_study(experiment, grid_options)
    if code == 0 and not options.plan:
        _print_comparison(scheduler, early_choice, _current_choice(grid_options))
    return code


def _refuse_unusable_results(options: StudyOptions, configurations: Sequence[Configuration]) -> None:
    """Raises BadInput where the grid has gone on already: what it trained would pass for early stopping's."""
    from orchestrator.analyze import selection
    from orchestrator.record.store import Store
    from orchestrator.record.study_file import StudyFile

    assert options.study is not None
    folder, store = options.output / options.study, Store(options.store_folder)
    fingerprints, advice = (
        [c.fingerprint for c in configurations],
        "take an --output of its own, without --store",
    )
    explanation = f", some of them trained to the end; {advice}"
    if selection.check_same_candidates(folder, options.study, fingerprints, "early stopping", explanation):
        return
    finished = {f for f in fingerprints if store.get_reusable(f) is not None}
    study = (StudyFile.read(folder) or StudyFile(options.study, "", "")).with_configurations(
        fingerprints, finished
    )
    if finished_before := finished.intersection(study.reused):
        raise UsageError(
            f"--store {str(store.root)!r}: {len(finished_before)} of the {len(configurations)} configurations were trained to "
            f"the end there before this study, too late for early stopping; {advice}."
        )


def _current_choice(options: StudyOptions) -> EarlyStoppingChoice:
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
    return EarlyStoppingChoice(tuple(sorted(study.configurations)), rates, dict(steps))


def _print_comparison(
    scheduler: str, early_choice: EarlyStoppingChoice, grid_choice: EarlyStoppingChoice
) -> None:
    from orchestrator.analyze.formatting import rate

    print(f"\n{'':12} {'chosen rate':^17} {'optimizer steps':^19}")
    print(f"{'variant':12} {scheduler:>9} {'grid':>7} {scheduler:>11} {'grid':>7}")
    rates = [(early_choice.rates.get(variant), grid_choice.rates[variant]) for variant in grid_choice.rates]
    for variant, (early, full) in zip(grid_choice.rates, rates, strict=True):
        counts = f"{early_choice.steps.get(variant, 0):11} {grid_choice.steps[variant]:7}"
        print(f"{variant:12} {rate(early):>9} {rate(full):>7} {counts}")
    same = sum(early == full for early, full in rates if full is not None)
    share = sum(early_choice.steps.values()) / sum(grid_choice.steps.values())
    print(f"The same rate for {same} of {len(rates)} variants, in {share:.0%} of the steps.")


if __name__ == "__main__":
    main(run)
