"""The published scores of the survey (arXiv 2601.22708), their ranks and spans, and simulated seed noise.

`orchestrator/published/scores.csv` has 660 scores: twenty variants on four tasks, at each learning rate of
the task's grid, with one seed each. Scores are in points, 0 to 100; higher is better.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from orchestrator.study.config import SHIPPED_FOLDER
from orchestrator.util.errors import UsageError, suggest_nearest

SCORES_FILE = SHIPPED_FOLDER / "scores.csv"
REFERENCE = "LoRA"
"""Published name of the variant with which the others are compared."""
TASKS = {
    "gsm8k": (
        "gsm8k",
        "published-gsm8k-r8",
        "GSM8K",
        "Llama-3.1-8B on MetaMathQA, accuracy on GSM8K",
    ),
    "humaneval": (
        "humaneval",
        "published-humaneval",
        "HumanEval",
        "Llama-3.1-8B on CodeFeedback, pass@1 on HumanEval",
    ),
    "glue": (
        "glue_average",
        "published-glue",
        "GLUE",
        "RoBERTa-base on the nine GLUE tasks, average of their metrics",
    ),
    "images": (
        "image_average",
        "published-images",
        "Images",
        "CLIP ViT-B/16 on seven image tasks, average accuracy",
    ),
}
"""Name on the command line -> name in scores.csv, and `config`, `title` and `description` of `ScoreTable`."""
DRAWS = 20_000
"""Number of simulated repetitions of the study."""
REPEAT_QUANTILES = (0.05, 0.95)
"""Quantiles of LoRA's rank over the repetitions, the ends of `NoiseReference.reference_ranks`."""

Floats = npt.NDArray[np.float64]


def published_variants() -> dict[str, str]:
    """Return the variants of the survey: name in this project -> published name."""
    variants = tomllib.loads((SHIPPED_FOLDER / "variants.toml").read_text())
    return {own: title for title, own in variants.items()}


@dataclass(frozen=True)
class ScoreTable:
    """The published scores of one task."""

    task: str
    """The task's name on the command line."""
    config: str
    """The value of --config with the same protocol."""
    title: str
    description: str
    variants: tuple[str, ...]
    """The published names of the variants."""
    rates: tuple[float, ...]
    """The learning rates, ascending."""
    scores: Floats
    """Scores in points, shape (variants, rates)."""


@dataclass(frozen=True)
class PublishedCurve:
    """The published curve of one variant on one task."""

    variant: str
    best_score: float
    best_rates: tuple[float, ...]
    """The rate with the best score, or the rates if several have it."""
    rank: int
    """1 plus the number of variants whose best score is higher."""
    tied_with: tuple[str, ...]
    """The other variants with the same best score."""
    at_edge: bool
    """True if all best rates are ends of the grid, so that the optimum may lie beyond the grid."""
    range_over_rates: float
    """The best score minus the worst one, in points."""
    loss_at_reference_rate: float
    """The best score minus the score at LoRA's best rate, in points."""


@dataclass(frozen=True)
class RateWinner:
    """The best variant at one learning rate, or several that tie."""

    learning_rate: float
    winners: tuple[str, ...]
    score: float
    span: float
    """The best variant's score minus the worst variant's score at this rate."""


SEED_NOISE = {
    0.48: "pooled over five variants with three seeds each, GSM8K, in arXiv 2602.04998",
    1.0: "one configuration of PEFT's method comparison moved by 1.9 points when it was run again",
}
"""Assumed standard deviation of a score over seeds, in points -> its source, of other models."""


@dataclass(frozen=True)
class NoiseReference:
    """The effect of seed noise on ranks and spans (in points), from simulated repetitions of the study."""

    noise: float
    """Standard deviation of a score over seeds; assumed, because the survey has one seed."""
    reference_ranks: tuple[int, int]
    """The 5 % and the 95 % quantile of LoRA's rank."""
    equal_span: float
    """Expected span (highest minus lowest) of one score per variant if all variants had equal true scores."""
    equal_span_high: float
    """The 95 % quantile of that span."""
    equal_top_half_span: float
    """Expected span of the higher half of those scores."""
    equal_top_half_high: float
    """The 95 % quantile of that span."""


@dataclass(frozen=True)
class PublishedTask:
    """The published scores of one task and the statistics of them."""

    table: ScoreTable
    variants: tuple[PublishedCurve, ...]
    """The variants, best first."""
    winners: tuple[RateWinner, ...]
    """The best variants at each rate, by ascending rate."""
    span: float
    """The highest minus the lowest of the variants' best scores, in points."""
    top_half_span: float
    """The same span over the better half of the variants, in points."""
    reference_rate: float
    """LoRA's best rate."""
    noise: tuple[NoiseReference, ...]
    """One for each assumed noise."""

    def variant(self, name: str) -> PublishedCurve:
        """Return the entry of a variant."""
        return next(each for each in self.variants if each.variant == name)

    @property
    def reference(self) -> PublishedCurve:
        """The entry of LoRA."""
        return self.variant(REFERENCE)

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON types, with `scores` as variant -> scores by ascending rate."""
        data = asdict(self)
        table = data.pop("table")
        scores = dict(zip(self.table.variants, self.table.scores.tolist(), strict=True))
        return {**{k: table[k] for k in ("task", "title", "description", "rates")}, **data, "scores": scores}


@cache
def read_table(task: str) -> ScoreTable:
    """Return the published scores of a task.

    Args:
        task: One of `TASKS`.

    Raises:
        UsageError: The task has no published scores.
    """
    if task not in TASKS:
        raise UsageError(f"--task {task!r}: no published scores. {suggest_nearest(task, TASKS)}")
    name, config, title, description = TASKS[task]
    cells: dict[str, dict[float, float]] = {}
    with SCORES_FILE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["task"] == name:
                cells.setdefault(row["variant"], {})[float(row["learning_rate"])] = float(row["score"])
    rates = sorted(cells[REFERENCE])
    scores = np.array([[own[rate] for rate in rates] for own in cells.values()])
    scores.setflags(write=False)
    return ScoreTable(task, config, title, description, tuple(cells), tuple(rates), scores)


def summarize_task(table: ScoreTable, noise: Sequence[float] = tuple(SEED_NOISE)) -> PublishedTask:
    """Compute the statistics of one task's scores.

    Args:
        table: The scores.
        noise: Assumed standard deviations of a score over seeds, in points.
    """
    best = table.scores.max(axis=1)
    ranks = rank_scores(best)
    reference_column = table.rates.index(_best_rates(table, table.variants.index(REFERENCE))[0])
    variants = [
        PublishedCurve(
            variant=variant,
            best_score=float(best[row]),
            best_rates=_best_rates(table, row),
            rank=int(ranks[row]),
            tied_with=tuple(
                n for n, b in zip(table.variants, best, strict=True) if b == best[row] and n != variant
            ),
            at_edge=set(_best_rates(table, row)) <= {table.rates[0], table.rates[-1]},
            range_over_rates=_points(np.ptp(table.scores[row])),
            loss_at_reference_rate=_points(best[row] - table.scores[row, reference_column]),
        )
        for row, variant in enumerate(table.variants)
    ]
    variants.sort(key=lambda each: (each.rank, each.variant))
    half = len(variants) // 2
    return PublishedTask(
        table=table,
        variants=tuple(variants),
        winners=tuple(_winner(table, column) for column in range(len(table.rates))),
        span=_points(np.ptp(best)),
        top_half_span=_points(variants[0].best_score - variants[half - 1].best_score),
        reference_rate=table.rates[reference_column],
        noise=tuple(simulate_noise(table, each) for each in noise),
    )


def rank_scores(scores: Sequence[float] | Floats) -> npt.NDArray[np.int_]:
    """Return the rank of each score: 1 plus the number of higher scores. Equal scores have equal ranks."""
    ranks: npt.NDArray[np.int_] = rankdata(-np.asarray(scores), method="min").astype(int)
    return ranks


def simulate_noise(table: ScoreTable, noise: float) -> NoiseReference:
    """Simulate `DRAWS` repetitions of the study with other training seeds. The result is deterministic.

    For the ranks, independent normal noise is added to every score, and each variant's best rate is chosen
    again. For the spans of variants with equal true scores, one normal score per variant is drawn: the
    highest of several scores per variant would vary less, so their span would be narrower.

    Args:
        table: The scores.
        noise: Standard deviation of the noise, in points.
    """
    random = np.random.default_rng(0)
    row = table.variants.index(REFERENCE)
    best = (table.scores + random.normal(0, noise, (DRAWS, *table.scores.shape))).max(axis=2)
    ranks = 1 + (best > best[:, [row]]).sum(axis=1)
    low, high = np.quantile(ranks, REPEAT_QUANTILES, method="inverted_cdf")
    equal = np.sort(random.normal(0, noise, (DRAWS, len(table.variants))), axis=1)
    spans = equal[:, -1] - equal[:, 0]
    top_half = equal[:, -1] - equal[:, -(len(table.variants) // 2)]
    return NoiseReference(
        noise=noise,
        reference_ranks=(int(low), int(high)),
        equal_span=float(spans.mean()),
        equal_span_high=float(np.quantile(spans, 0.95)),
        equal_top_half_span=float(top_half.mean()),
        equal_top_half_high=float(np.quantile(top_half, 0.95)),
    )


def _best_rates(table: ScoreTable, row: int) -> tuple[float, ...]:
    own = table.scores[row]
    return tuple(rate for rate, score in zip(table.rates, own, strict=True) if score == own.max())


def _winner(table: ScoreTable, column: int) -> RateWinner:
    scores = table.scores[:, column]
    winners = tuple(n for n, score in zip(table.variants, scores, strict=True) if score == scores.max())
    return RateWinner(table.rates[column], winners, float(scores.max()), _points(np.ptp(scores)))


def _points(difference: Any) -> float:
    """Round a difference of scores to two decimals, which all published scores have."""
    return round(float(difference), 2)
