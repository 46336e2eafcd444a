"""Comparisons with a baseline: values computed by hand, SciPy, simulations and invariances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.analyze import power
from orchestrator.analyze.power import dunnett_critical_value, minimum_detectable_effect
from orchestrator.analyze.significance import Comparison, PairedComparison, SeedScore, compare_to_baseline

Table = Mapping[str, Sequence[float | None]]


def compared(table: Table, margin: float = 0.01, **more: object) -> Comparison:
    """Compare with "lora".

    `table` has the scores of seeds 0, 1, ... by label. None stands for a seed that failed.
    """
    scores = {
        label: {s: SeedScore(v) for s, v in enumerate(row) if v is not None} for label, row in table.items()
    }
    return compare_to_baseline(scores, "lora", margin, **more)  # type: ignore[arg-type]


def pair(found: Comparison, label: str) -> PairedComparison:
    return next(p for p in found.pairs if p.label == label)


# --- one variant by hand


def test_one_variant_is_the_paired_t_test_of_scipy() -> None:
    table = {"lora": [0.80, 0.82, 0.79, 0.84, 0.81], "dora": [0.83, 0.84, 0.83, 0.86, 0.83]}
    found = compared(table)
    (dora,) = found.pairs
    expected = stats.ttest_rel(table["dora"], table["lora"])
    low, high = expected.confidence_interval(0.95)
    assert dora.difference == pytest.approx(0.026)
    assert dora.interval is not None
    assert (dora.interval.low, dora.interval.high) == pytest.approx((low, high))
    assert dora.p_differs == pytest.approx(expected.pvalue)
    d = np.subtract(table["dora"], table["lora"])
    above = stats.ttest_1samp(d, -0.01, alternative="greater")
    assert dora.p_not_inferior == pytest.approx(above.pvalue)
    assert dora.outcome == "better"
    assert dora.seeds_to_decide is None


def test_the_variance_is_pooled_over_variants_with_the_degrees_of_the_shared_baseline() -> None:
    table = {
        "lora": [0.50, 0.52, 0.48, 0.50],
        "a": [0.51, 0.54, 0.47, 0.52],  # d: .01 .02 -.01 .02, with the sum of squares .0006
        "b": [0.53, 0.52, 0.50, 0.51],  # d: .03 .00 .02 .01, with the sum of squares .0005
    }
    found = compared(table)
    spread = math.sqrt((0.0006 + 0.0005) / 6)
    assert found.difference_std == pytest.approx(spread)
    half = dunnett_critical_value(2, 6 * 4 / 5) * spread / 2
    for label, mean in (("a", 0.01), ("b", 0.015)):
        interval = pair(found, label).interval
        assert interval is not None
        assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half))
    assert [p.label for p in found.pairs] == ["b", "a"]


NOISE = (0.002, -0.002, 0.001, -0.001, 0.003, -0.003, 0.0, 0.001, -0.001, 0.0)


def moved(by: float, spread: float = 1.0) -> list[float]:
    return [0.8 + by + spread * NOISE[(3 * s + 1) % 10] for s in range(10)]


def test_the_five_outcomes() -> None:
    table = {
        "lora": [0.8] * 10,
        "better": moved(0.05),
        "worse": moved(-0.05),
        "equivalent": moved(0.0),
        "same but told apart": moved(0.005),
        "not inferior": moved(0.008, 8.0),
        "undecided": moved(-0.006, 8.0),
    }
    found = {p.label: p for p in compared(table).pairs}
    # Variants with large variances are not pooled with the others, so their tests do not use the small
    # variances.
    assert {v: p.outcome for v, p in found.items()} == {
        "better": "better",
        "worse": "worse",
        "equivalent": "equivalent",
        "same but told apart": "equivalent",
        "not inferior": "not inferior",
        "undecided": "undecided",
    }
    assert (found["same but told apart"].p_differs or 1) < 0.05
    assert "vary more" in found["undecided"].reason
    assert found["undecided"].seeds_to_decide is not None
    assert found["undecided"].seeds_to_decide > 10


# --- missing and diverged seeds


def test_a_seed_that_is_missing_in_either_is_dropped_from_that_pair() -> None:
    table = {
        "lora": [0.80, 0.82, None, 0.84, 0.81, 0.80],
        "a": [0.81, None, 0.99, 0.85, 0.83, 0.81],
        "b": [0.80, 0.81, 0.99, 0.83, 0.81, 0.79],
    }
    found = compared(table)
    assert pair(found, "a").seeds == (0, 3, 4, 5)
    assert pair(found, "a").dropped == (1, 2)
    assert pair(found, "a").difference == pytest.approx(np.mean([0.01, 0.01, 0.02, 0.01]))
    assert pair(found, "b").seeds == (0, 1, 3, 4, 5)
    alone = compared({"lora": [0.8], "a": [0.9]})
    assert alone.pairs[0].outcome == "undecided"
    assert alone.pairs[0].reason == "1 seed with a score of both"
    assert compared({"lora": [0.8], "a": [None]}).pairs[0].difference is None


def test_a_diverged_seed_leaves_no_interval_but_a_share_and_the_mean_of_the_rest() -> None:
    def row(diverged: int) -> dict[int, SeedScore]:
        return {s: SeedScore(0.0, True) if s < diverged else SeedScore(0.7 + NOISE[s]) for s in range(9)}

    for diverged, judged in ((0, True), (1, False), (3, False)):
        found = compare_to_baseline({"lora": row(0), "a": row(diverged)}, "lora", 0.01)
        (a,) = found.pairs
        (arm,) = found.arms
        assert (a.interval is not None) == judged
        assert (arm.test.interval is not None) == judged
        assert arm.test.mean == pytest.approx(sum(s.value for s in row(diverged).values()) / 9)
        assert arm.without_diverged.mean == pytest.approx(np.mean([0.7 + x for x in NOISE[diverged:9]]))
        wilson = stats.binomtest(diverged, 9).proportion_ci(method="wilson")
        assert arm.diverged_interval is not None
        assert arm.diverged_interval.high == pytest.approx(wilson.high)
    assert (a.outcome, a.reason) == ("undecided", "3 of 9 seeds diverged")
    unsure = compare_to_baseline({"lora": row(3), "a": row(0), "b": row(0)}, "lora", 0.01)
    assert {p.reason for p in unsure.pairs} == {"3 of 9 seeds of lora diverged"}
    assert unsure.claim == "undecided"
    # A variant that diverges once counts as unknown in the claim, however well LoRA does on the other seeds.
    once = compare_to_baseline({"lora": row(0), "a": row(1)}, "lora", 0.01)
    assert (once.counted, once.baseline_not_inferior_to, once.claim) == (1, (0, 1), "undecided")


def test_scores_without_noise_are_either_equal_or_different() -> None:
    found = compared({"lora": [1.0] * 3, "same": [1.0] * 3, "lower": [0.5] * 3})
    assert pair(found, "same").outcome == "equivalent"
    assert pair(found, "lower").outcome == "worse"
    assert found.correlation is None


# --- the claim, the pairing


def test_the_claim_counts_variants_with_an_interval() -> None:
    lower, higher = moved(-0.05), moved(0.05)
    lora = [0.8] * 10
    found = compared({"lora": lora, "a": lower, "b": moved(0.0), "c": higher})
    assert (found.counted, found.baseline_not_inferior_to, found.claim) == (3, (2, 2), "supported")
    found = compared({"lora": lora, "a": lower, "b": higher, "c": higher})
    assert (found.baseline_not_inferior_to, found.claim) == ((1, 1), "refuted")
    found = compared({"lora": lora, "a": lower, "b": higher})
    assert found.claim == "refuted", "half of them is not most"
    found = compared({"lora": lora, "a": lower, "b": moved(0.01)})
    assert (found.baseline_not_inferior_to, found.claim) == ((1, 2), "undecided")
    found = compared({"lora": lora, "a": lower, "full": higher}, controls=("full",))
    assert (found.counted, found.claim) == (1, "supported")
    assert compared({"lora": lora}).claim == "undecided"


def test_a_variant_that_cannot_be_compared_counts_as_unknown() -> None:
    table = {"lora": [0.8] * 10, "a": moved(-0.05), "b": moved(0.05)}
    found = compared({k: v for k, v in table.items() if k != "b"}, expected=("c", "d"))
    assert (found.counted, found.baseline_not_inferior_to, found.claim) == (3, (1, 3), "undecided")
    assert found.not_compared == ("c", "d")
    found = compared(table, expected=("full", "b"), controls=("full",))
    assert (found.counted, found.baseline_not_inferior_to) == (2, (1, 1)), (
        "a control and one that is there do not count"
    )


def test_pairing_helps_where_seeds_differ_by_more_than_the_noise() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.05, 10)
    paired = compared({v: list(0.8 + seeds + rng.normal(0, 0.01, 10)) for v in ("lora", "a", "b")})
    assert paired.pairing_helps
    assert (paired.correlation or 0) > 0.8
    single = compared({v: list(0.8 + rng.normal(0, 0.01, 10)) for v in ("lora", "a", "b")})
    assert single.pairing_helps is False


# --- simulations with a fixed generator. The bounds are four binomial standard errors wide.


@pytest.fixture
def no_seeds_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip `seeds_to_decide`, which takes most of a comparison's time and is not simulated."""
    monkeypatch.setattr(power, "seeds_needed", lambda *_: None)


def simulated(draws: int, n: int, spreads: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Simulate studies without any true difference.

    Returns:
        The share of studies that declare any variant better or worse, the share in which all simultaneous
        intervals contain the true difference, and the share that declare any variant at the margin
        equivalent.
    """
    rng = np.random.default_rng(seed)
    false = held = equal = 0
    for _ in range(draws):
        both = rng.normal(0, 0.02, n)
        scores = 0.8 + both + rng.normal(0, 1, (len(spreads), n)) * np.array(spreads)[:, None]
        table = {f"v{i}" if i else "lora": list(map(float, row)) for i, row in enumerate(scores)}
        found = compared(table, margin=1e-9)
        false += any((p.p_differs or 0.0) < 0.05 for p in found.pairs)
        held += all(p.interval is not None and p.interval.low <= 0 <= p.interval.high for p in found.pairs)
        equal += any(p.outcome == "equivalent" for p in found.pairs)
    return false / draws, held / draws, equal / draws


@pytest.mark.usefixtures("no_seeds_to_decide")
@pytest.mark.parametrize(
    ("n", "spreads", "allowed"),
    [
        (10, (0.02,) * 5, 0.0),
        (3, (0.02,) * 4, 0.0),
        (10, (0.06, 0.02, 0.02, 0.02), 0.0),
        (10, (0.02, 0.08, 0.02, 0.02), 0.015),
    ],
    ids=["equal", "three seeds", "a wide baseline", "a wide variant"],
)
def test_false_findings_and_coverage_are_near_nominal(
    n: int, spreads: tuple[float, ...], allowed: float
) -> None:
    """Pooling of unequal variances may reduce the coverage by `allowed`."""
    draws = 400
    false, held, equal = simulated(draws, n, spreads, 11)
    slack = 4 * math.sqrt(0.05 * 0.95 / draws)
    assert false <= 0.05 + allowed + slack
    assert held >= 0.95 - allowed - slack
    assert equal <= 0.05 + slack


@pytest.mark.usefixtures("no_seeds_to_decide")
def test_a_true_difference_of_the_detectable_size_is_detected_four_times_in_five() -> None:
    rng, n, draws = np.random.default_rng(5), 10, 300
    degrees, error = 3 * 9 * 4 / 6, 0.02 * math.sqrt(2 / n)
    shift = error * minimum_detectable_effect(dunnett_critical_value(3, degrees), degrees)
    found = 0
    for _ in range(draws):
        scores = 0.8 + rng.normal(0, 0.02, (4, n))
        scores[1] += shift
        c = compared({f"v{i}" if i else "lora": list(map(float, row)) for i, row in enumerate(scores)})
        interval = pair(c, "v1").interval
        found += interval is not None and interval.low > 0
    assert abs(found / draws - 0.8) < 4 * math.sqrt(0.8 * 0.2 / draws) + 0.03


@pytest.mark.usefixtures("no_seeds_to_decide")
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_occasional_divergence_breaks_no_interval_of_the_runs_that_do_not_diverge(share: float) -> None:
    """Four variants equal LoRA, but the runs of one of them diverge with probability `share`."""
    rng, draws, n = np.random.default_rng(2), 400, 10
    held = 0
    for _ in range(draws):
        values, bad = 0.8 + rng.normal(0, 0.02, (5, n)), rng.random(n) < share
        scores = {
            f"v{i}" if i else "lora": {
                s: SeedScore(0.0, True) if i == 1 and bad[s] else SeedScore(float(row[s])) for s in range(n)
            }
            for i, row in enumerate(values)
        }
        pairs = compare_to_baseline(scores, "lora", 0.01).pairs
        assert all((p.interval is None) == (p.label == "v1" and bool(bad.any())) for p in pairs)
        held += all(p.interval is None or p.interval.low <= 0 <= p.interval.high for p in pairs)
    assert held / draws >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / draws)


# --- invariances

tables = st.integers(3, 8).flatmap(
    lambda n: st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]),
        st.lists(st.integers(0, 100).map(lambda k: k / 100), min_size=n, max_size=n),
        min_size=1,
    ).flatmap(
        lambda rows: st.lists(st.integers(0, 100).map(lambda k: k / 100), min_size=n, max_size=n).map(
            lambda lora: {"lora": lora, **rows}
        )
    )
)


def told(found: Comparison) -> list[tuple[str, float, float]]:
    return [(p.label, p.difference or 0.0, p.interval.high if p.interval else math.inf) for p in found.pairs]


def nearly(found: Comparison) -> list[tuple[str, object, object]]:
    return [
        (label, pytest.approx(mean, abs=1e-9), pytest.approx(high, abs=1e-7))
        for label, mean, high in sorted(told(found))
    ]


@given(tables, st.data())
def test_a_shift_that_all_variants_share_changes_nothing(
    table: dict[str, list[float]], data: st.DataObject
) -> None:
    n = len(table["lora"])
    shifts = data.draw(st.lists(st.integers(-50, 50).map(lambda k: k / 64), min_size=n, max_size=n))
    shifted = {v: [x + by for x, by in zip(row, shifts, strict=True)] for v, row in table.items()}
    before, after = compared(table), compared(shifted)
    assert sorted(told(after)) == nearly(before)


@given(tables, st.randoms())
def test_neither_the_order_of_variants_nor_of_seeds_matters(
    table: dict[str, list[float]], random: object
) -> None:
    order = list(table)
    random.shuffle(order)  # type: ignore[attr-defined]
    seeds = list(range(len(table["lora"])))
    random.shuffle(seeds)  # type: ignore[attr-defined]
    mixed = {v: [table[v][s] for s in seeds] for v in order}
    assert sorted(told(compared(mixed))) == nearly(compared(table))


@given(tables, st.sampled_from([0.01, 0.05, 0.2]))
def test_the_outcome_is_what_the_interval_shows(table: dict[str, list[float]], margin: float) -> None:
    for p in compared(table, margin).pairs:
        assert p.interval is not None
        low, high = p.interval.low, p.interval.high
        assert {
            "better": low > 0 and high >= margin,
            "worse": high < 0 and low <= -margin,
            "equivalent": -margin < low and high < margin,
            "not inferior": -margin < low <= 0 and high >= margin,
            "undecided": low <= -margin and high >= 0,
        }[p.outcome]
