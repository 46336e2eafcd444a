"""What to do next: one sentence and one command at the end of each study.

A study of a grid asks for its best rates: they are known when each rate within the interval of the best rate
(`ratios`) scores at most `curves.TOLERANCE` below the best score. The interval has two parts, the spacing of
the grid and the spread of the seeds. The step makes the larger part smaller. The verdicts of the other
studies name their steps themselves.

A printed grid has all rates of the study and some more. Results are found by their configuration, so that
nothing is trained twice, and the study.yaml that the command writes has the whole grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.analyze import stats
from orchestrator.analyze.comparison import CONTROLS
from orchestrator.analyze.curves import REFERENCE
from orchestrator.analyze.formatting import rate
from orchestrator.analyze.verdicts import NOT_ENDED, WIDER, Rule, decide_step, grid_words
from orchestrator.study.grids import refine_rates, round_rate
from orchestrator.study.names import store_command

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from orchestrator.analyze.results import Results

FEW_SEEDS, MANY_SEEDS, MIN_REPLICATES = 3, 10, 5
"""The seeds of a study that had one; the most seeds that a grid is worth, because a replicated tuning uses
more of them better; the fewest replicates."""
FINEST_STEP = 0.1
"""The spacing in decades at which a grid is not refined any more."""

CURVE_STEPS = (
    NOT_ENDED,
    Rule(lambda f: not f.scored, ""),
    Rule(
        lambda f: not f.learned,
        "Nothing was learnt at any rate; train twice as long.",
        command="{longer}",
    ),
    Rule(
        lambda f: f.edges,
        "The optimum may lie beyond the grid; widen it: {edges}.",
        command="{wider}",
    ),
    Rule(
        lambda f: f.one_seed,
        "One seed has no spread; " + str(FEW_SEEDS) + " seeds give intervals.",
        command="{first_seeds}",
    ),
    Rule(
        lambda f: f.coarse,
        "The grid is too coarse for the best rate to be known within 0.01 of the score; refine it: {coarse}.",
        command="{finer}",
    ),
    Rule(
        lambda f: f.have < f.seeds <= MANY_SEEDS,
        "The best rate changes with the seed: {noisy}. About {seeds} seeds make its interval as narrow as "
        "the steps of the grid, if the spread stays.",
        command="{more_seeds}",
    ),
    Rule(
        lambda f: f.replicates,
        "The rates were chosen on these seeds. About {replicates} replicates of the tuning decide which "
        "variant is better, with probability 80 %, by the spread of these seeds.",
        command="{tune}",
    ),
    Rule(lambda _: True, ""),
)
"""The rules for the next step of a grid."""


def curve_step(results: Results) -> tuple[str, str]:
    """Return the sentence and the command of the next step of a grid.

    The tasks of a study have grids of their own, so a step that changes the rates names its task.
    """
    tasks = list(dict.fromkeys(results.panels["task"]))
    found = [_step_of_task(results, task, several=len(tasks) > 1) for task in tasks]
    return next((step for step, is_last in found if not is_last), found[0][0])


def _step_of_task(results: Results, task: str, several: bool) -> tuple[tuple[str, str], bool]:
    """Return the next step of a task, and whether it is the tuning that follows a grid, or none."""
    panels = results.panels.loc[results.panels["task"] == task, "panel"]
    best, runs = (each[each["panel"].isin(panels)] for each in (results.best, results.runs))
    study = results.study
    words, where = (study.option_of(task), f"{task}: ") if several else ((), "")
    peaks = [_Peak.find(row, results) for row in best.to_dict("records") if not row["nothing_learned"]]
    known = [peak for peak in peaks if peak is not None]
    edges = [peak for peak in known if peak.side]
    open_peaks = [peak for peak in known if not peak.side and peak.reach > peak.width]
    coarse = [peak for peak in open_peaks if peak.step / 2 >= peak.spread and peak.step / 2 >= FINEST_STEP]
    noisy = [peak for peak in open_peaks if peak.spread > peak.step / 2]
    rates, have = set(runs["learning_rate"]), int(runs["seed"].nunique())
    seeds = max((peak.seeds for peak in noisy), default=0)
    replicates = _replicates(results)
    near = grid_words(_near(rates, [peak.rate for peak in known]))
    facts = {
        "missing": results.missing,
        "scored": best["learning_rate"].notna().any(),
        "learned": len(peaks),
        "edges": edges and where + ", ".join(f"{peak.curve} ({rate(peak.rate)})" for peak in edges),
        "one_seed": bool(known) and have < 2,
        "coarse": coarse
        and where + ", ".join(f"{p.curve} ({rate(p.gaps[0])} to {rate(p.gaps[-1])})" for p in coarse),
        "noisy": ", ".join(peak.curve for peak in noisy),
        "have": have,
        "seeds": seeds,
        "replicates": replicates,
        "command": study.command,
        "longer": study.again(*words, "--steps", str(2 * int(runs["steps_horizon"].max()))),
        "wider": study.again(
            *words, *grid_words(rates, chain.from_iterable(peak.beyond() for peak in edges))
        ),
        "first_seeds": study.again("--seeds", str(FEW_SEEDS)),
        "finer": study.again(
            *words, *grid_words(rates, chain.from_iterable(peak.between() for peak in coarse))
        ),
        "more_seeds": study.again("--seeds", str(seeds)),
        "tune": study.again(*([] if several else near), "--replicates", str(replicates), experiment="tuned"),
    }
    step = decide_step(CURVE_STEPS, facts)
    return step, step[1] in ("", facts["tune"])


class _Peak(NamedTuple):
    """The best rate of a curve, and how well it is known.

    Attributes:
        curve: The curve.
        rate: The best rate of the grid.
        side: -1 if the optimum may lie below the grid, 1 if it may lie above, both or neither.
        gaps: The best rate and its neighbors in the grid, ascending.
        step: The mean distance of the neighbors from the best rate in decades.
        reach: The width of the interval of the optimum in decades; 0 if it has none.
        spread: The half of this interval that is due to the seeds.
        width: The width in decades of the range of rates that score at most 0.01 below the best one.
        seeds: The number of seeds at which twice the spread is at most `step`; 0 if it is not known.
    """

    curve: str
    rate: float
    side: tuple[int, ...]
    gaps: tuple[float, ...]
    step: float
    reach: float
    spread: float
    width: float
    seeds: int

    @classmethod
    def find(cls, row: dict[str, Any], results: Results) -> _Peak | None:
        """Return the peak of the curve in a row of `Results.best`.

        It is None if no rate has a score, or if both ends of the grid have the best score.
        """
        points, ratios = (
            frame[(frame["panel"] == row["panel"]) & (frame["curve"] == row["curve"])]
            if len(frame)
            else frame
            for frame in (results.points, results.ratios)
        )
        rates = sorted(points["learning_rate"])
        if math.isnan(row["learning_rate"]) or (row["bracket"] == "both edges" and len(rates) > 1):
            return None
        sides = {"low edge": (-1,), "high edge": (1,), "both edges": (-1, 1)}.get(row["bracket"], ())
        at = rates.index(row["learning_rate"])
        gaps = tuple(rates[max(0, at - 1) : at + 2])
        step = float(np.diff(np.log10(gaps)).mean()) if len(gaps) > 1 else math.inf
        low, high = ratios[["rate_low", "rate_high"]].iloc[0] if len(ratios) else (math.nan, math.nan)
        reach = math.log10(high / low) if low < high else 0.0
        spread, n = math.sqrt(max(0.0, reach**2 - step**2)) / 2 if not sides else 0.0, row["seeds"]
        # With a power of 1, a comparison is always decided: its interval is no wider than the margin.
        needed = spread and stats.replicates_to_decide(
            spread * math.sqrt(n) / stats.t_quantile(n), step, 1, power=1.0
        )
        width = math.inf if row["width_is_bound"] else row["width"]
        return cls(
            row["curve"], row["learning_rate"], sides, gaps, step, reach, spread, width, int(needed or 0)
        )

    def beyond(self) -> list[float]:
        """Return the rates by which the grid is widened."""
        return [round_rate(self.rate * 10 ** (sign * far)) for sign in self.side for far in WIDER]

    def between(self) -> tuple[float, ...]:
        """Return the rates that halve the steps of the grid beside the best rate."""
        return refine_rates(self.gaps, math.ceil(2 / self.step))


def _near(rates: set[float], best: Sequence[float]) -> list[float]:
    """Return the rates of a grid from two below the lowest best rate to two above the highest."""
    ordered = sorted(rates)
    if not best:
        return ordered
    return ordered[max(0, ordered.index(min(best)) - 2) : ordered.index(max(best)) + 3]


def _replicates(results: Results) -> int:
    """Return the number of replicates that decides each comparison with LoRA, by the spread of the seeds.

    It is 0 if no variant has two seeds in common with LoRA.
    """
    found = []
    for panel, own in results.best.groupby("panel"):
        known = own[~own["nothing_learned"] & ~own["variant"].isin(CONTROLS) & (own["point"] != "")]
        at_best = results.runs[results.runs["point"].isin(known["point"])]
        table: pd.DataFrame = at_best.pivot_table(index="seed", columns="curve", values="test_score")
        reference = results.panels.set_index("panel").at[panel, "reference"]
        if reference in table and len(table.columns) > 1:
            others = table.drop(columns=reference).sub(table[reference], axis=0).std().dropna()
            margin = results.study.settings.margin
            found += [stats.replicates_to_decide(each, margin, len(others)) for each in others]
    return max(MIN_REPLICATES, *(each or 0 for each in found)) if found else 0


def next_step(results: Results, output: Path | None = None, store: Path | None = None) -> tuple[str, str]:
    """Return what to do after a study: a sentence, and the only command that its report shows for it.

    Args:
        results: The results.
        output: The output folder; None for the folder that contains the study's folder.
        store: The folder of the records; None for the one in the output folder.
    """
    study, lanes = results.study, results.best_lanes
    is_grid = study.settings.kind == "curve" and len(results.runs) > 0
    found = curve_step(results) if is_grid else ("", "")
    if found[1]:
        return found
    for verdict in results.verdicts.to_dict("records"):
        if verdict["next_command"]:
            return verdict["next_step"], verdict["next_command"]
    if not len(lanes):
        return "No run has finished; this tries the failed ones again.", study.again("--retry-failed")
    if study.settings.kind not in ("replicates", "transfer") and set(lanes["variant"]) != {REFERENCE}:
        return "Replicated tuning tells which variant is better.", study.again(experiment="tuned")
    task = ["--task", lanes["task"].iloc[0]] if lanes["task"].nunique() > 1 else []
    export = store_command("export", study.name, *task, output=output or study.folder.parent, store=store)
    undecided = results.verdicts[results.verdicts["outcome"] == "undecided"]
    open_step = next((step for step in undecided["next_step"] if step), "More runs may not decide more.")
    sentence = open_step if len(undecided) else "No further run is needed to decide."
    return f"{sentence} The best adapter, for use:", export
