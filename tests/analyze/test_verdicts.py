"""Verdicts and limits: for each rule of each table, a study that leads to the rule, and its sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from configurations import template
from star_records import ALIAS, RATES, SURFACE, Surface, analyze_star, make_record, star_records, star_study
from star_records import COMMAND as SENSITIVITY
from synthetic import RATES as GRID
from synthetic import analyze_curves, record, study
from tuned_records import COMMAND, Truth, compare, is_of, study_of, tuned_records

from orchestrator.analyze import limits, sections, verdicts
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.space import apply_values

PANEL = "letters on letters-base"


def each(table: Sequence[Any], cases: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the rules of a table, each with the case of a study that leads to the rule."""
    return pytest.mark.parametrize(("rule", "case"), list(zip(table, cases, strict=True)), ids=lambda _: "")


def grid(seeds: int = 3, **curves: Sequence[float | None]) -> list[Record]:
    """Return runs of each curve at the rates 1e-3, 1e-2 and so on. A score of None is a failed run.

    Args:
        seeds: The number of seeds. In all curves but the first one, scores above 0 differ slightly between
            seeds.
        **curves: Variant -> score at each rate.
    """
    found = []
    for power, (variant, scores) in enumerate(curves.items()):
        for (i, score), seed in product(enumerate(scores), range(seeds)):
            value = score + 0.001 * seed**power if score else score
            state: Any = "failed" if score is None else "finished"
            found.append(record(variant, 10 ** (i - 3), seed, value, state=state))
    return found


def first(results: Results) -> dict[str, Any]:
    return {str(k): v for k, v in results.verdicts.iloc[0].items()}


# -- grids

ONE, OWN = "The learning rate at which each variant is best.", "Each variant has a learning rate of its own"
OF_RATES = (
    ({"lora": (None, None)}, ONE, f"No learning rate of {PANEL} has a score yet."),
    ({"lora": (0.0, 0.0)}, ONE, f"Nothing was learnt on {PANEL}: no run of any variant is better than"),
    ({"lora": (0.4, 0.4, 0.4)}, ONE, f"No variant of {PANEL} scores better inside the grid than at its"),
    (
        {"lora": (0.1, 0.9, 0.1), "hira": (0.0, 0.0, 0.0)}, ONE,
        "The best rate of lora is 1e-2. Nothing was learnt by hira.",
    ),
    (
        {"lora": (0.1, 0.9, 0.1), "hira": (0.1, 0.8, 0.2)}, "All variants are best at one learning rate.",
        "All 2 variants are best at one rate, 1e-2. At LoRA's best rate (1e-2) their test scores span 0.10 "
        "(hira 0.80 to lora 0.90); each at its own best rate, 0.10.",
    ),
    (
        {"lora": (0.1, 0.9, 0.9, 0.1), "hira": (0.1, 0.8, 0.2, 0.1)},
        "No variant needs a learning rate of its own.", "All 2 variants are best at 1e-2.",
    ),
    (
        {"lora": (0.1, 0.9, 0.1), "hira": (0.9, 0.6, 0.1), "pissa": (0.0, 0.0, 0.0)}, OWN,
        "The best rates of 2 variants lie at least 1.0 decades apart (hira 1e-3, lora 1e-2). Nothing was "
        "learnt by pissa. At LoRA's best rate (1e-2) the test scores of 2 of 3 variants span 0.30 (hira 0.60 "
        "to lora 0.90); each at its own best rate, 0.00.",
    ),
)  # fmt: skip
"""Variant -> score at each rate; the beginning of the heading; the beginning of the answer."""


@each(verdicts.BEST_RATES_RULES, OF_RATES)
def test_best_rates(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    scores, heading, answer = case
    verdict = first(analyze_curves(grid(1, **scores)))
    assert verdict["claim"].startswith(heading)
    assert verdict["answer"].startswith(answer)
    assert verdict["outcome"] == rule.outcome == "descriptive"
    assert verdict["design"].startswith(f"{PANEL}: {len(scores)} variant")


AT_ONE_RATE = (
    (
        3, (0.8, 0.6, 0.1), verdicts.RATE_DECIDES,
        "At LoRA's best rate (1e-2) LoRA beats hira by 30.0 points, at hira's own (1e-3) hira beats LoRA by "
        "30.0. At LoRA's best rate hira loses most against its own: 20.0 points.",
    ),
    (
        3, (0.3, 0.8, 0.1), "At LoRA's best learning rate no variant changes its order with LoRA.",
        "Between LoRA's best rate and a variant's own no variant changes its order with LoRA by more than "
        "the margin.",
    ),
    (
        1, (0.3, 0.8, 0.1), "Whether one fixed learning rate changes which variant wins stays open.",
        "It stays open whether a variant changes its order with LoRA between their best rates.",
    ),
)  # fmt: skip
"""The number of seeds, HiRA's score at each rate, the heading and the answer of a grid."""


@each(verdicts.RATE_DECIDES_RULES, AT_ONE_RATE)
def test_one_fixed_rate_on_a_grid(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    seeds, hira, heading, answer = case
    verdict = analyze_curves(grid(seeds, lora=(0.5, 0.9, 0.1), hira=hira)).verdicts.iloc[1]
    assert (verdict["claim"], verdict["answer"]) == (heading, answer)
    assert verdict["outcome"] == "descriptive", "the rates are chosen on the same seeds"
    assert len(analyze_curves(grid(seeds, lora=(0.5, 0.9, 0.1))).verdicts) == 1, "one variant has no order"


def test_a_variant_that_scores_the_same_at_both_ends_has_no_best_rate() -> None:
    flat = [record("head_only", r, seed, 0.4) for r in GRID for seed in range(2)]
    found = analyze_curves([*study(), *flat])
    assert "2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in first(found)["answer"]
    (row,) = found.best[found.best["curve"] == "head_only"].to_dict("records")
    assert "flat" in sections.best_rate_text(row)
    assert any("head_only" in limit for limit in found.warnings)


def test_a_width_below_the_spacing_of_the_grid_is_not_resolved() -> None:
    def text(*scores: float) -> tuple[float, str]:
        found = analyze_curves([record("lora", r, 0, s) for r, s in zip(GRID, scores, strict=False)])
        (row,) = found.best.to_dict("records")
        return row["width"], sections.width_text(row, found.points)

    peaked, wide = text(0.1, 0.9, 0.1), text(0.1, *[0.9] * 5, 0.1)
    assert (peaked[0] < 0.1, peaked[1]) == (True, "not resolved")
    assert wide[1] == f"{wide[0]:.2f}"
    assert text(0.9, 0.9, 0.9)[1].startswith("≥")


def test_a_search_names_the_best_point_of_each_variant() -> None:
    file = StudyFile("s", "", "python x.py", settings=AnalysisSettings(kind="search"))
    runs = [record("lora", r, 0, s, extra={"batch_size": 4}) for r, s in ((1e-3, 0.5), (1e-2, 0.8))]
    verdict = first(analyze(file, [*runs, record("hira", 1e-2, 0, 0.0)]))
    assert (
        verdict["answer"]
        == "Best by validation score: lora 0.800 (test 0.800) at 1e-2; hira has learnt nothing."
    )
    assert (verdict["outcome"], "1 to 2 points each" in verdict["design"]) == ("descriptive", True)
    failed = first(analyze(file, [record(state="failed")]))
    assert failed["answer"] == "No point has a score yet."


# -- replicated tuning

EQUAL = {v: Truth(optimum=x) for v, x in (("lora", -2.0), ("pissa", -2.6), ("hira", -1.0))}
TWO = {"lora": Truth(), "pissa": Truth()}
OF_TUNED = (
    ({"lora": Truth(), "full": Truth(0.95)}, 0.004, "On letters there is no variant that the claim counts."),
    (EQUAL, 0.002, "On letters it holds for at least 2 of 2 variants (2 needed)."),
    (
        {"lora": Truth(), "pissa": Truth(0.96), "hira": Truth(0.96)}, 0.004,
        "On letters at least 2 of 2 variants are better by more than the margin.",
    ),
    (EQUAL, 0.04, "On letters it is shown for at least 0 of 2 variants (2 needed)."),
)  # fmt: skip
"""Variant -> its true curve; the standard deviation of the noise; the beginning of the answer."""


@each(verdicts.TUNED_WINS_RULES, OF_TUNED)
def test_tuned_lora_wins(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    truths, noise, answer = case
    verdict = first(compare(tuned_records(truths, noise=noise)))
    assert verdict["claim"] == "Tuned LoRA matches or beats most variants."
    assert verdict["outcome"] == rule.outcome
    assert verdict["answer"].startswith(answer)
    listed = {name for name in truths if f" {name} " in verdict["answer"].partition("in points")[2]}
    assert listed == (set(truths) - {"lora", "full"}), "each variant has its number, whatever its outcome"


@pytest.mark.parametrize(
    ("truths", "noise", "outcome"),
    [
        (EQUAL, 0.002, "supported"),
        ({**TWO, "pissa": Truth(0.8)}, 0.002, "refuted"),
        (TWO, 0.04, "undecided"),
    ],
)
def test_one_fixed_rate_in_replicates(truths: dict[str, Truth], noise: float, outcome: str) -> None:
    verdict = compare(tuned_records(truths, noise=noise)).verdicts.iloc[1]
    assert (verdict["claim"], verdict["outcome"]) == (verdicts.RATE_DECIDES, outcome)


def with_missing(records: Sequence[Record]) -> Results:
    file = study_of(records)
    return analyze(replace(file, configurations=("missing", *file.configurations)), records)


WIDE = [
    record(v, 1e-2, s, x)
    for v, own in (("lora", (0.5, 0.5)), ("pissa", (0.9, 0.1)))
    for s, x in enumerate(own)
]
STEPS = (
    (lambda: with_missing(tuned_records(TWO, 3)), "Some configurations have not ended", COMMAND),
    (lambda: compare(tuned_records(TWO, noise=0.001)), "", ""),
    (
        lambda: compare(tuned_records(TWO, 1)),
        "There is no interval for pissa (1 replicate is usable for both); more replicates may give one.",
        "lora-orchestrator tuned --config results/t/study.yaml --replicates 5",
    ),
    (lambda: compare(WIDE), "For pissa even 1,000 replicates may not decide", ""),
    (
        lambda: compare(tuned_records({**TWO, "pissa": Truth(0.91)}, noise=0.0003)),
        "The margin lies in the interval of pissa; the number of replicates", "",
    ),
    (
        lambda: compare(tuned_records({**TWO, "pissa": Truth(0.9, -2.4)}, 5, noise=0.01)),
        "About {needed} replicates decide every open comparison with probability 80 %",
        "lora-orchestrator tuned --config results/t/study.yaml --replicates {needed}",
    ),
)  # fmt: skip
"""A function that returns a study, the beginning of the next step, and the command."""


@each(verdicts.NEXT_STEPS, STEPS)
def test_the_next_step(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    make, sentence, command = case
    results = make()
    verdict, needed = first(results), results.comparison["replicates_to_decide"].max()
    if "{needed}" in sentence:
        assert results.tuned["replicates"][0] < needed < 1000
        sentence, command = (text.format(needed=int(needed)) for text in (sentence, command))
    assert verdict["next_step"].startswith(sentence)
    assert verdict["next_command"] == command
    assert verdict["next_step"].startswith(rule.sentence.partition("{")[0])
    assert bool(verdict["next_step"]) == bool(rule.sentence)


# -- sensitivity

FLAT = Surface(width=6.0, cliff=9.0, aliases=(), costs={("rank", 2): 0.8, ("rank", 32): 0.8})
SMALL = ("rank", "dropout")


def star(surface: Surface, names: Sequence[str] = SMALL, **more: Any) -> Results:
    return analyze_star(star_records(surface, names=names, **more))


def without_rank_32(surface: Surface, rank: int = 32) -> Results:
    records = star_records(surface, names=SMALL)
    return analyze(star_study(records), [r for r in records if r.configuration.variant.rank != rank])


OF_FACTORS = (
    (lambda: star(FLAT), "It fails for at least 1 of 1 variants; it may fail for 0."),
    (lambda: star(SURFACE, ()), "On letters no factor but the learning rate has been measured yet."),
    (
        lambda: without_rank_32(SURFACE),
        "It is shown for at least 1 of 1 variants (1 needed), but some configurations have not ended.",
    ),
    (lambda: star(SURFACE), "It is shown for at least 1 of 1 variants; 1 are needed."),
    (lambda: star(SURFACE, seeds=1), "It is shown for at least 0 of 1 variants; 1 are needed."),
)
"""A function that returns a study, and a sentence of the answer."""


@each(verdicts.RATE_MATTERS_RULES, OF_FACTORS)
def test_the_rate_matters_most(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    make, sentence = case
    results = make()
    (verdict,) = results.verdicts.to_dict("records")
    assert (verdict["claim"], verdict["outcome"]) == (verdicts.RATE_MATTERS, rule.outcome)
    assert sentence in verdict["answer"]
    assert verdict["next_command"] == SENSITIVITY or not results.missing


def test_an_unfinished_study_supports_nothing_and_names_its_command() -> None:
    """An unfinished study may refute the claim, because one factor is enough for a refutation."""
    supported, refuted = without_rank_32(SURFACE), without_rank_32(FLAT, rank=2)
    assert supported.claims["outcome"].tolist() == ["supported"], "by what has ended"
    assert [first(each)["outcome"] for each in (supported, refuted)] == ["undecided", "refuted"]
    assert first(supported)["next_command"] == SENSITIVITY
    assert any("have no record yet" in limit for limit in supported.warnings)


def test_the_answer_has_the_cost_of_the_rate_and_of_the_worst_other_factor() -> None:
    results = analyze_star(star_records(ALIAS, noise=0.001))
    rate, *others = results.factors.to_dict("records")
    worst = max(row["misset"] for row in others if not row["alias"])
    assert first(results)["answer"].startswith(
        f"On letters the learning rate, set blindly, costs {100 * rate['misset']:.1f} points, and any "
        f"other hyperparameter but alpha, which it could replace, at most {100 * worst:.1f} (batch size for "
        "lora). "
    )


NO_ALIAS = replace(SURFACE, aliases=())


def alpha(surface: Surface, noise: float = 0.001, lost: float = 0.0, seeds: int = 5) -> Results:
    """Return a study of alpha and rank without the runs of alpha 4 at this rate."""
    records = star_records(surface, names=("alpha", "rank"), noise=noise, seeds=seeds)
    kept = [
        r
        for r in records
        if (r.configuration.variant.alpha, r.configuration.optimizer.learning_rate) != (4.0, lost)
    ]
    return analyze(star_study(records), kept)


OF_REPLACEMENT = (
    (
        lambda: alpha(replace(ALIAS, costs={("alpha", 1024.0): 0.05})),
        "It could not for at least 1 of 1 variants: lora x 0.25 +0.1 [-0.2, +0.3] points at the rate x 4",
    ),
    (lambda: alpha(ALIAS, lost=1e-2), "Some configurations have not ended: lora x 0.25"),
    (lambda: alpha(ALIAS), "With the rate tuned again, no level of alpha changes the score by the margin: "),
    (lambda: alpha(NO_ALIAS), "The best rate may lie outside the rates that were tried (lora alpha 4, lora "),
    (
        lambda: alpha(SURFACE),
        "The rates are so far apart that they may hide a difference of the margin (lora",
    ),
    (lambda: alpha(ALIAS, seeds=1), "It stays open: lora x 0.25"),
)
"""A function that returns a study, and the beginning of the answer."""


@each(verdicts.REPLACES_RULES, OF_REPLACEMENT)
def test_the_rate_could_replace_alpha(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    make, sentence = case
    verdict = make().verdicts.iloc[1]
    assert verdict["claim"] == "The learning rate could replace alpha."
    assert verdict["outcome"] == rule.outcome
    assert verdict["answer"].startswith(sentence)


def failing(*seeds: int) -> Results:
    """Return a study in which the runs of rank 32 with these seeds failed."""
    records = star_records(SURFACE, names=SMALL, seeds=3)
    fails = [r.configuration.variant.rank == 32 and r.configuration.seed in seeds for r in records]
    lost = [replace(r, state="failed", evaluations=()) for r in records]
    return analyze_star([b if fail else a for a, b, fail in zip(records, lost, fails, strict=True)])


NARROW = Surface(width=1.2, cliff=9.0, aliases=(), costs={("rank", 2): 0.26, ("rank", 32): 0.26})
SENSITIVITY_STEPS = (
    (lambda: without_rank_32(SURFACE), "Some configurations have not ended", SENSITIVITY),
    (lambda: star(SURFACE), "", ""),
    (lambda: star(NARROW, ("rank",)), "For lora the answer depends on how well the rate is known", ""),
    (lambda: star(SURFACE, ()), "The levels of the factors have not been trained yet", SENSITIVITY),
    (lambda: star(SURFACE, seeds=1), "Five seeds give intervals.", "--seeds 5"),
    (lambda: failing(1, 2), "There is no interval for rank (lora)", "--retry-failed"),
    (lambda: star(SURFACE, ("rank",), noise=0.0), "For rank (lora) the loss differs", "--seeds 6"),
    (lambda: star(replace(FLAT, costs={})), "The learning rate and the closest factor cost", ""),
    (
        lambda: alpha(replace(ALIAS, width=1.1)),
        "The grid of rates leaves open whether the rate could replace alpha",
        "",
    ),
    (
        lambda: star(Surface(width=3.0, cliff=9.0, aliases=()), ("rank",), seeds=2, noise=0.04),
        "About {needed} seeds decide it if the differences and their spread stay as they are.",
        "--seeds {needed}",
    ),
)
"""A function that returns a study, the beginning of the next step, and the end of its command."""


@each(verdicts.SENSITIVITY_STEPS, SENSITIVITY_STEPS)
def test_the_next_step_of_a_sensitivity_study(rule: verdicts.Rule, case: tuple[Any, ...]) -> None:
    make, sentence, command = case
    results = make()
    verdict = first(results)
    if "{needed}" in sentence:
        columns = ["misset_seeds_to_decide", "retuned_seeds_to_decide"]
        needed = int(results.factors[columns].max(axis=None))
        sentence, command = (text.format(needed=needed) for text in (sentence, command))
    assert verdict["next_step"].startswith(sentence)
    assert verdict["next_command"].endswith(command)
    assert verdict["next_step"].startswith(rule.sentence.partition("{")[0])
    assert bool(verdict["next_step"]) == bool(rule.sentence)
    assert bool(verdict["next_command"]) == bool(command)


# -- limits


def sentences(table: limits.Limits) -> list[str]:
    return [text.partition(": ")[0] for text in table.values()]


def seeds_at(*rates: Sequence[float | str | None]) -> list[Record]:
    """Return runs of one curve at the rates 1e-3, 1e-2 and so on.

    Args:
        *rates: For each rate, the score of each seed. None is a diverged run, and a text is the state of a
            run.
    """
    found = []
    for i, scores in enumerate(rates):
        for seed, score in enumerate(scores):
            value, state = (0.5, score) if isinstance(score, str) else (score, None)
            found.append(record("lora", 10 ** (i - 3), seed, value, state=state))  # type: ignore[arg-type]
    return found


OF_BEST = (
    (grid(lora=(None,)), "lora"),
    (grid(lora=(0.0, 0.0)), "lora"),
    (grid(1, lora=(0.4, 0.4)), "lora"),
    (grid(lora=(0.9, 0.1)), "lora (low edge)"),
    (grid(1, lora=(0.1, 0.9)), "lora (learning_rate (high edge))"),
    (grid(1, lora=(0.1, 0.9, 0.1)), "lora"),
    (seeds_at((0.1, 0.1), (0.9, 0.9), (0.1, 0.1)), "lora"),
    (seeds_at((0.1, 0.1), (0.9, 0.5), (0.5, 0.8), (0.1, 0.1)), "lora"),
    (seeds_at((0.1, 0.1, 0.1), (0.9, 0.8, None), (0.1, 0.1, 0.1)), "lora (1 of 3)"),
    (seeds_at((0.1, 0.1, 0.1), (0.9, 0.8, "stopped"), (0.1, 0.1, 0.1)), "lora"),
    (seeds_at((0.9, 0.9, 0.8), (0.95, "stopped", "stopped"), (0.1, 0.1, 0.1)), "lora at 0.01"),
    (seeds_at((0.1, 0.1), (0.9, 0.8), (0.1,)), "lora"),
)
"""The records of a study, and the label of the curve in the warning."""


@each(sentences(limits.BEST_LIMITS), OF_BEST)
def test_a_limit_of_the_best_point(rule: str, case: tuple[list[Record], str]) -> None:
    records, label = case
    kind: Any = "search" if "bracketed" in rule else "curve"
    results = analyze(StudyFile("s", "", "x", settings=AnalysisSettings(kind=kind)), records)
    assert f"{PANEL}: {rule}: {label}." in results.warnings


def lose(records: Sequence[Record], state: Any) -> list[Record]:
    """Return the records, with the runs of pissa's replicate 0 in the given state."""
    return [replace(r, state=state) if is_of(r, "pissa", 0) else r for r in records]


PLAIN = tuned_records(TWO, 10, noise=0.005)
OUTLIER = tuned_records({"pissa": Truth(0.75)}, 1, noise=0.005)
OF_COMPARISON = (
    (
        [record(v, r, s, x + s / 100) for v in TWO for s in range(4) for r, x in ((1e-3, 0.5), (1e-2, 0.8))],
        "lora 4 of 4, pissa 4 of 4",
    ),
    (lose(PLAIN, "failed"), "pissa 9"),
    ([r for r in PLAIN if not is_of(r, "pissa", 0)] + OUTLIER, "pissa (replicate 0: -15."),
    (PLAIN, "pissa"),
    (lose(PLAIN, "diverged"), "pissa 9 of 10"),
)
"""The records of a study, and the beginning of the list of variants in the warning."""


@each(sentences(limits.COMPARISON_LIMITS), OF_COMPARISON)
def test_a_limit_of_a_comparison(rule: str, case: tuple[list[Record], str]) -> None:
    records, label = case
    results = compare(records, unverified=("pissa",) if "no other implementation" in rule else ())
    (found,) = (each for each in results.warnings if rule in each)
    assert found.startswith(f"{PANEL}: {rule}: {label}")


RANK = star_records(SURFACE, names=("rank",), seeds=2)
OUTSIDE = apply_values(RANK[0].configuration, {"rank": 4, "dropout": 0.1})
RANK_IS_ALIAS = replace(SURFACE, aliases=("rank",))
OF_CLAIM = (
    (star_records(Surface(optimum=-0.9), names=("rank",), seeds=2, center=0.1), "lora"),
    (star_records(RANK_IS_ALIAS, names=("rank",), seeds=2, rates=RATES[4:]), "lora (rank "),
    ([*RANK, make_record(OUTSIDE, 0.5)], "lora (1)"),
    (RANK + star_records(SURFACE, template("rslora"), ("dropout",), 2), "lora (dropout), rslora (rank)"),
)
"""The records of a study, and the beginning of the list of variants in the warning."""


@each(sentences(limits.CLAIM_LIMITS), OF_CLAIM)
def test_a_limit_of_the_claim(rule: str, case: tuple[list[Record], str]) -> None:
    records, label = case
    (found,) = (each for each in analyze_star(records).warnings if rule in each)
    assert found.startswith(f"{PANEL}: {rule}: {label}")


def test_searches_with_different_numbers_of_points_are_named() -> None:
    file = StudyFile("s", "", "x", settings=AnalysisSettings(kind="search"))
    runs = [record("lora", r, 0, 0.5) for r in (1e-3, 1e-2)] + [record("hira", 1e-2, 0, 0.5)]
    expected = f"{PANEL}: variants have different numbers of points (hira 1, lora 2)."
    assert expected in analyze(file, runs).warnings


def test_a_study_with_none_of_them_has_no_limit() -> None:
    assert compare(PLAIN).warnings == []
    assert analyze_star(RANK).warnings == []
    assert analyze_curves(seeds_at((0.1, 0.11), (0.9, 0.91), (0.1, 0.11))).warnings == []
