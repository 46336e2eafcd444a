"""Replicated tuning: comparisons of all variants with the tuned baseline, and at fixed learning rates.

A tuning consists of all runs of one variant with one seed. Replicate k consists of the tunings of all
variants with seed k. In each tuning, validation chooses one run. The test scores of the chosen runs are
compared in pairs: variant minus baseline in the same replicate.

A tuning is usable if its chosen run has a test score, neither diverged nor collapsed, and is better than the
untrained base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import curves, formatting, stats
from orchestrator.record.study_file import AnalysisSettings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

CONTROLS = ("full", "head_only")
"""Full fine-tuning, and training of the head alone. Both are compared with the baseline. They are not
variants of LoRA, so claims and spans do not count them."""
OUTLYING, MIN_FOR_OUTLIERS = 8.0, 8
"""An outlier lies more than `OUTLYING` standard deviations from the median. With fewer than
`MIN_FOR_OUTLIERS` replicates there is no outlier."""
BINS_PER_DECADE = 4
"""The number of bins per decade of the learning rate. The runs of all replicates in a bin are averaged."""

_DIFFERENCES = ("difference", "forgetting_difference")
_RUN_COLUMNS = (
    *("group", "variant", "seed", "fingerprint", "learning_rate", "label", "state", "test_items"),
    *("validation_score", "test_score", "task_title", "steps_horizon", "task_test_size"),
)
"""The columns of runs that the comparison reads."""


def compare_tuned(
    runs: pd.DataFrame,
    best: pd.DataFrame,
    settings: AnalysisSettings,
    items: Mapping[str, NDArray[np.float64]],
    missing: bool,
) -> dict[str, pd.DataFrame]:
    """Compare the variants of every panel in which the baseline was tuned.

    Args:
        runs: The runs, from `run_frame`.
        best: The chosen run of every tuning, from `best_of_groups`.
        settings: The baseline, the margin, and the variants without a verdict.
        items: Fingerprint -> the result on each test item, for runs whose test score is the mean of these
            results.
        missing: True if configurations of the study have no record.

    Returns:
        The frames comparison, tuned, pooled, fixed_rate and winners, see `Results`.
    """
    import pandas as pd

    frames: dict[str, list[Any]] = {n: [] for n in ("comparison", "tuned", "pooled", "fixed_rate", "winners")}
    for panel, own in runs[[*_RUN_COLUMNS, "panel"]].groupby("panel"):
        task = _Task(own, best[best["panel"] == panel], settings, missing)
        for name, rows in task.frames(items).items():
            frames[name] += [{"panel": panel, **row} for row in rows]
    return {name: pd.DataFrame(rows) for name, rows in frames.items()}


class _Task:
    """The comparison on one task and base model.

    A tuning is whole if it has as many runs as the largest tuning of its variant. While configurations of the
    study have no record, it must have as many runs as the largest tuning of any variant.

    Attributes:
        chosen: The chosen run of each whole tuning. The columns are those of `best`, whether the tuning is
            usable (`is_usable`), and whether at least one run of the tuning did not fail (`has_result`).
        tried: The runs of the whole tunings.
        names: The variants with a whole tuning, the baseline first.
        others: The variants besides the baseline, sorted by name.
        by_replicate: Column of `chosen` -> its values, as a frame with one row for each replicate and one
            column for each variant.
        test, forgetting: The values of the usable tunings, in the form of `by_replicate`; NaN for the others.
        pooled: Variant -> its curve over the runs of all replicates, see `_pool`.
    """

    def __init__(
        self, runs: pd.DataFrame, best: pd.DataFrame, settings: AnalysisSettings, missing: bool
    ) -> None:
        self.settings = settings
        label = best["point"].map(runs.set_index("fingerprint")["label"])
        has_result = best["group"].map((runs["label"] != "failed").groupby(runs["group"]).any())
        is_usable = best["test_score"].notna() & (label == "finished") & ~best["nothing_learned"]
        chosen = best.assign(has_result=has_result, is_usable=is_usable)
        # Failed runs count as runs of a tuning. While configurations have no record, all tunings of one
        # variant may lack runs, so the largest tuning of any variant is the measure.
        largest = chosen.groupby("variant")["points"].transform("max")
        whole = chosen["points"] == (chosen["points"].max() if missing else largest)
        self.chosen = chosen[whole]
        counts = self.chosen["variant"].value_counts()
        self.missing = missing or not whole.all() or counts.nunique() > 1
        self.others = sorted(set(counts.index) - {settings.baseline})
        self.names = [settings.baseline, *self.others] if settings.baseline in counts else self.others
        self.tried = runs[runs["group"].isin(self.chosen["group"])].sort_values(
            ["learning_rate", "fingerprint"]
        )
        self.by_replicate = {
            column: self.chosen.pivot(index="replicate", columns="variant", values=column)[self.names]
            for column in ("point", "test_score", "forgetting", "is_usable", "has_result")
        }
        self.test = self.by_replicate["test_score"].where(self.by_replicate["is_usable"].eq(True))
        self.forgetting = self.by_replicate["forgetting"].where(self.by_replicate["is_usable"].eq(True))
        self.pooled = {name: _pool(self.tried[self.tried["variant"] == name]) for name in self.names}

    def frames(self, items: Mapping[str, NDArray[np.float64]]) -> dict[str, list[dict[str, Any]]]:
        """Return frame -> its rows for this task; empty if the baseline has no whole tuning.

        Args:
            items: As for `compare_tuned`.
        """
        import numpy as np

        base, margin = self.settings.baseline, self.settings.margin
        if base not in self.names:
            return {}
        at_base = self.by_replicate["point"][base].notna()
        differences = self.test[self.others].sub(self.test[base], axis=0)[at_base]
        errors = [self._item_error(name, differences[name], items) for name in self.others]
        known_errors = np.nan_to_num(errors)
        found = stats.compare(differences.to_numpy(float), known_errors)
        forgotten = self.forgetting[self.others].sub(self.forgetting[base], axis=0)[at_base]
        found_forgotten = stats.compare(forgotten.to_numpy(float), bounds=stats.UNBOUNDED)
        share_p = [self._share_p(name) for name in self.others]
        adjusted, not_superior_p = stats.holm(share_p), stats.not_superior_p(found, margin)
        baseline = self._describe(base, "baseline")
        rows, counted, claim_p = [], [base], []
        for i, name in enumerate(self.others):
            row = self._describe(name, self._role(name)) | {"usable_p": adjusted[i], "item_error": errors[i]}
            row |= _difference_fields(found, i, margin, known_errors[i])
            for end, part in (("", "mean"), ("_low", "low"), ("_high", "high")):
                row[f"forgetting_difference{end}"] = float(getattr(found_forgotten, part)[i])
            row["skewed"] = _outliers(differences[name].dropna(), margin)
            rows.append(_decide_by_share(row, baseline))
            if row["role"] == "variant":
                counted.append(name)
                claim_p.append(_claim_p(row, baseline, not_superior_p[i], share_p[i]))
        rows.sort(key=lambda row: np.nan_to_num(-row["difference"], nan=math.inf))
        fixed, winners = self._fixed_rate(counted)
        pooled = [
            {"variant": name, **point}
            for name, curve in self.pooled.items()
            for point in curve.to_dict("records")
        ]
        return {
            "comparison": [baseline, *rows],
            "tuned": [self._task_fields(counted, errors) | _claim_fields(claim_p)],
            "pooled": pooled,
            "fixed_rate": fixed,
            "winners": winners,
        }

    def _role(self, name: str) -> str:
        if name in CONTROLS:
            return "control"
        return "unverified" if name in self.settings.unverified else "variant"

    def _item_error(
        self, name: str, differences: pd.Series, items: Mapping[str, NDArray[np.float64]]
    ) -> float:
        """Return the standard error of a variant's mean difference over the test items; NaN if it is unknown.

        All runs of a study are scored on the same items in the same order.
        """
        import numpy as np

        pairs = self.by_replicate["point"].loc[differences.dropna().index, [name, self.settings.baseline]]
        known = [
            (items[own], items[base]) for own, base in pairs.to_numpy() if own in items and base in items
        ]
        if len(known) < len(pairs) or len({len(each) for pair in known for each in pair}) != 1:
            return math.nan
        return stats.item_error(np.array([own - base for own, base in known]))

    def _share_p(self, name: str) -> float:
        """Return the p value of "variant and baseline are usable equally often", without correction."""
        pair = [name, self.settings.baseline]
        usable, known = (
            self.by_replicate[column][pair].eq(True).to_numpy() for column in ("is_usable", "has_result")
        )
        own, base = usable[known.all(axis=1)].T
        return stats.paired_share_p(int((own & ~base).sum()), int((base & ~own).sum()))

    def _describe(self, name: str, role: str) -> dict[str, Any]:
        """Return the fields of a row of `Results.comparison` that describe the tunings of one variant."""
        own = self.chosen[self.chosen["variant"] == name]
        runs = self.tried[self.tried["variant"] == name]
        # The smallest number of items of all finished runs of the panel counts.
        items = self.tried.loc[self.tried["state"] == "finished", "test_items"].min()
        is_finished = (runs["state"] == "finished").any()
        forgetting = stats.mean_interval(self.forgetting[name].dropna())
        test = stats.score_interval(self.test[name].dropna().to_list(), int(items) if is_finished else 0)
        ended = own[own["has_result"]]
        usable, labels = int(ended["is_usable"].sum()), runs["label"]
        share = stats.wilson(usable, len(ended))
        rates = sorted(own["learning_rate"].dropna())
        ends = dict.fromkeys(map(formatting.rate, rates[:1] + rates[-1:]))
        return {
            "variant": name,
            "role": role,
            "replicates": len(own),
            "test_score": test.mean,
            "test_score_low": test.low,
            "test_score_high": test.high,
            "forgetting": forgetting.mean,
            "forgetting_low": forgetting.low,
            "forgetting_high": forgetting.high,
            "usable": usable,
            "tunings": len(ended),
            "usable_low": share.low,
            "usable_high": share.high,
            "usable_runs": int((labels == "finished").sum()),
            "ended_runs": int(labels.isin(["finished", "collapsed", "diverged"]).sum()),
            "failed_runs": int((labels == "failed").sum()),
            "edge_choices": int((own["edges"] != "").sum()),
            "chosen": " to ".join(ends),
            "outcome": "undecided",
            "counts": "not counted",
            "pairs": 0,
            **{f"{name}{end}": math.nan for name in _DIFFERENCES for end in ("", "_low", "_high")},
            "seed_error": math.nan,
            "replicates_to_decide": math.nan,
            **_optimum(self.pooled[name], self.settings.margin),
        }

    def _task_fields(self, counted: Sequence[str], errors: Sequence[float]) -> dict[str, Any]:
        """Return the fields of a row of `Results.tuned` that describe the comparison as a whole.

        Args:
            counted: The baseline, and the variants that count for claim 2.
            errors: The standard error of each variant's difference over the test items.
        """
        first, test = self.tried.iloc[0], self.test[[*counted]]
        means = test.mean().dropna()
        return {
            "task": first["task_title"],
            "steps": first["steps_horizon"],
            "test_size": first["task_test_size"],
            "replicates": int((self.chosen["variant"] == self.settings.baseline).sum()),
            "points": int(self.chosen["points"].max()),
            "has_item_error": not any(map(math.isnan, errors)),
            "missing": self.missing,
            "counted": len(counted) - 1,
            "span": float(means.max() - means.min()) if len(means) > 1 else math.nan,
            "expected_span": _noise_span(test.dropna(axis=1, how="all").dropna()),
        }

    def _fixed_rate(self, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Compare variants at the baseline's best rate and at their own best rates.

        Args:
            names: The baseline, and the variants that are compared with it.

        Returns:
            The rows of `fixed_rate` and of `winners`. Both are empty if fewer than two replicates have the
            same rates for all of these variants, or if these replicates have different numbers of rates.
        """
        import numpy as np

        tunings = dict(iter(self.tried.groupby(["seed", "variant"])))
        rates = {key: tuple(own["learning_rate"]) for key, own in tunings.items()}
        shared = {}
        for seed in sorted(self.tried["seed"].unique()):
            own_rates = {rates.get((seed, name)) for name in names}
            if len(own_rates) == 1 and (found := own_rates.pop()):
                shared[seed] = found
        if len(shared) < 2 or len(set(map(len, shared.values()))) > 1:
            return [], []
        scores, chosen = {}, {}
        for name in names:
            own = [tunings[seed, name] for seed in shared]
            scores[name] = np.array([each["test_score"].to_numpy(float) for each in own])
            is_chosen = np.array([each["fingerprint"].isin(self.chosen["point"]) for each in own])
            chosen[name] = np.where(is_chosen.any(axis=1), is_chosen.argmax(axis=1), -1)
        centers = np.exp(np.log(np.array(list(shared.values()))).mean(axis=0))
        return compare_at_fixed_rate(centers, scores, chosen, self.settings.baseline, self.settings.margin)


def _pool(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the curve of a variant over the runs of all replicates, averaged in bins of the rate.

    Each replicate shifts its grid by another offset. All grids together are therefore finer than one grid.

    Returns:
        One row for each bin, with the columns learning_rate (the geometric mean of the rates in the bin),
        validation_score (the mean score) and runs (the number of runs).
    """
    import numpy as np

    runs = runs[runs["validation_score"].notna()]
    x = np.log10(runs["learning_rate"])
    grouped = runs.assign(x=x).groupby(np.floor(x * BINS_PER_DECADE + 1e-6).to_numpy())
    pooled = grouped.agg(
        learning_rate=("x", "mean"), validation_score=("validation_score", "mean"), runs=("x", "size")
    )
    return pooled.assign(learning_rate=10 ** pooled["learning_rate"])


def _optimum(pooled: pd.DataFrame, margin: float) -> dict[str, Any]:
    """Return the best rate and the width of a variant's pooled curve; NaN where they are undefined.

    The width is that of the range around the best bin in which the score is at most the margin below the
    best score. If the curve ends within this range, the width is only a lower bound (`width_is_bound`). Any
    other width below the largest distance between neighboring bins is not resolved, so it is NaN.
    """
    import numpy as np

    found = {"best_rate": math.nan, "best_rate_at_edge": False, "width": math.nan, "width_is_bound": False}
    if pooled.empty:
        return found
    x = np.log10(pooled["learning_rate"].to_numpy())
    y, n = (pooled[name].to_numpy(float) for name in ("validation_score", "runs"))
    peak, best = stats.find_peak(x, y, n), int(np.argmax(y))
    reach, is_bound = curves.width(x, y, best, float(y[best]) - margin)
    found |= {"best_rate": 10**peak.log10_rate, "best_rate_at_edge": peak.at_edge}
    if len(x) > 1 and (is_bound or reach >= np.diff(x).max() - 1e-6):
        found |= {"width": reach, "width_is_bound": is_bound}
    return found


def _difference_fields(found: stats.Comparison, i: int, margin: float, item_error: float) -> dict[str, Any]:
    """Return the fields of a row of `Results.comparison` that follow from the interval in column `i`."""
    low, high, std, count = float(found.low[i]), float(found.high[i]), float(found.std[i]), int(found.n[i])
    outcome, counts = stats.classify(low, high, margin), stats.counts_for_baseline(low, high, margin)
    fields: dict[str, Any] = {
        "pairs": count,
        "difference": float(found.mean[i]),
        "difference_low": low,
        "difference_high": high,
        "outcome": outcome,
        "counts": counts,
    }
    if not math.isnan(low):
        fields["seed_error"] = std / math.sqrt(count)
        if outcome == "undecided" or counts == "open":
            needed = stats.replicates_to_decide(std, margin, len(found.n), item_error)
            fields["replicates_to_decide"] = math.nan if needed is None else needed
    return fields


def _decide_by_share(row: dict[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Correct `outcome` and `counts` of a row by the shares of usable tunings.

    `outcome` compares the variant with the baseline. `counts` is "yes" if the baseline matches or beats the
    variant, "no" if it does not, and "open" if this is undecided. On entry, both follow from the interval of
    the difference of the scores. They are corrected as follows:

    - If the variant is a control or unverified, `counts` is always "not counted".
    - If the baseline is usable significantly less often than the variant, `counts` is "no", whatever the
      scores are.
    - If the shares differ significantly and the difference has no interval, the variant with the higher share
      is better: `outcome` and `counts` follow from the shares alone.

    In all other cases the row stays as it is.
    """
    if row["role"] != "variant":
        row["counts"] = "not counted"
    if not (row["tunings"] and baseline["tunings"]) or not row["usable_p"] <= stats.ALPHA:
        return row
    is_worse = row["usable"] / row["tunings"] < baseline["usable"] / baseline["tunings"]
    has_interval = not math.isnan(row["difference_low"])
    if not has_interval:
        row["outcome"] = "worse" if is_worse else "better"
    if row["counts"] != "not counted" and not (is_worse and has_interval):
        row["counts"] = "yes" if is_worse else "no"
    return row


def _claim_p(
    row: Mapping[str, Any], baseline: Mapping[str, Any], not_superior_p: float, share_p: float
) -> tuple[float, float]:
    """Return the p values that one variant adds to the test of claim 2.

    Args:
        row: The row of the variant in `Results.comparison`.
        baseline: The row of the baseline.
        not_superior_p: The p value of "the variant is better than the baseline by at least the margin".
        share_p: The p value of "both are usable equally often".

    Returns:
        The p value for "the baseline matches or beats the variant", and the p value for "the variant is
        better than the baseline by more than the margin".
    """
    has_interval = not math.isnan(row["difference_low"])
    holds, beaten = (not_superior_p, 1.0 - not_superior_p) if has_interval else (1.0, 1.0)
    if row["usable_p"] <= stats.ALPHA:  # the shares differ significantly, see `_decide_by_share`
        if row["usable"] * baseline["tunings"] >= baseline["usable"] * row["tunings"]:
            return 1.0, min(beaten, share_p)
        if not has_interval:
            holds = share_p
    return holds, beaten


def _claim_fields(p_values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the fields of a row of `Results.tuned` that test claim 2 (`TUNED_WINS` in `verdicts`).

    Args:
        p_values: The p values of each variant that counts for the claim, from `_claim_p`.

    Returns:
        - holds_at_least, beaten_at_least: lower 95 % confidence bounds of the number of variants that the
          baseline matches or beats, and of the number of variants that are better than the baseline by more
          than the margin. Each is the number of hypotheses that Holm's procedure rejects.
        - p_claim: the p value for "the baseline matches or beats more than half of the variants".
        - p_against: the p value for "at least half of the variants are better than the baseline".
    """
    holds, beaten = zip(*p_values, strict=True) if p_values else ((), ())
    count = len(p_values)
    return {
        "holds_at_least": stats.count_shown(holds),
        "beaten_at_least": stats.count_shown(beaten),
        "p_claim": float(sorted(stats.holm(holds))[count // 2]) if count else 1.0,
        "p_against": float(sorted(stats.holm(beaten))[(count - 1) // 2]) if count else 1.0,
    }


def _outliers(differences: pd.Series, margin: float) -> list[tuple[int, float]]:
    """Return the replicates whose difference from the baseline lies far from the other replicates.

    A replicate lies far if its distance from the median of the others is larger than the margin and larger
    than `OUTLYING` standard deviations. The standard deviation is estimated as 1.4826 times the median
    absolute deviation. With fewer than `MIN_FOR_OUTLIERS` replicates none is returned, because normal noise
    would exceed these limits too often.

    Args:
        differences: Replicate -> variant minus baseline.
        margin: The smallest difference that matters.

    Returns:
        (replicate, difference) of each outlier.
    """
    found = []
    for replicate, value in differences.items() if len(differences) >= MIN_FOR_OUTLIERS else ():
        others = differences.drop(replicate)
        spread = 1.4826 * (others - others.median()).abs().median()
        if abs(value - others.median()) > max(margin, OUTLYING * spread):
            found.append((int(str(replicate)), float(value)))
    return found


def _noise_span(test: pd.DataFrame) -> float:
    """Return the expected span of the mean test scores if all variants have the same true score.

    Noise that all V variants of a replicate share does not change the span. The mean of each replicate over
    the variants is therefore subtracted before the standard errors are computed. This subtraction removes 1 /
    V of the variance, so the variances are multiplied by V / (V - 1).

    Args:
        test: Test scores, a frame of replicates x variants without a missing score.

    Returns:
        The span; NaN with fewer than two variants or two replicates.
    """
    import numpy as np

    n, count = test.shape
    if n < 2 or count < 2:
        return math.nan
    residuals = test.to_numpy(float) - test.to_numpy(float).mean(axis=0)
    residuals -= residuals.mean(axis=1, keepdims=True)
    variance = (residuals**2).sum(axis=0) / (n - 1) * count / (count - 1)
    return stats.expected_span(np.sqrt(variance / n))


# -- claim 3: the winner at one fixed learning rate is an artefact of the rate


def compare_at_fixed_rate(
    rates: Sequence[float] | NDArray[np.float64],
    scores: Mapping[str, NDArray[np.float64]],
    chosen: Mapping[str, NDArray[np.int64]],
    baseline: str,
    margin: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare each variant with the baseline at the baseline's best rate and at the variant's own best rate.

    In each replicate, validation chooses both rates. The order of the variant and the baseline is reversed if
    the variant loses by more than the margin at one of the two rates and wins by more than the margin at the
    other. The scores of diverged and collapsed runs count as they are, because a user who trains at one fixed
    rate gets these scores. All intervals are simultaneous.

    Args:
        rates: The learning rates, ascending. If the replicates have shifted grids, each rate is the geometric
            mean over the replicates.
        scores: Variant -> test scores, shape (replicates, rates), NaN if missing.
        chosen: Variant -> index of the rate that validation chose in each replicate; -1 for none.
        baseline: The variant that the others are compared with.
        margin: The smallest difference that matters.

    Returns:
        The rows of `fixed_rate`, the largest regret first, and the rows of `winners`, the best variant at
        each rate. A rate has no winner if the baseline has no score at this rate, or if all variants have the
        same mean.
    """
    import numpy as np

    others = [name for name in scores if name != baseline]
    if not others:
        return [], []

    def at(name: str, whose: str) -> NDArray[np.float64]:
        index = chosen[whose]
        return np.where(index >= 0, scores[name][np.arange(len(index)), np.maximum(index, 0)], np.nan)

    fields = ("regret", "at_baseline_rate", "at_own_rate")
    differences = []
    for name in others:
        differences += [
            at(name, name) - at(name, baseline),
            at(name, baseline) - at(baseline, baseline),
            at(name, name) - at(baseline, name),
        ]
    found = stats.compare(np.array(differences).T)
    ends = {"": found.mean, "_low": found.low, "_high": found.high}
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(others):
        columns = zip(fields, range(3 * i, 3 * i + 3), strict=True)
        row = {f"{field}{end}": float(each[k]) for field, k in columns for end, each in ends.items()}
        if not any(math.isnan(row[field]) for field in fields):
            rows.append({"variant": name, **row, "reversal": _is_reversed(row, margin)})
    rows.sort(key=lambda row: (-row["regret"], row["variant"]))
    return rows, _winners(rates, scores, baseline) if rows else []


def _is_reversed(row: Mapping[str, float], margin: float) -> bool | None:
    """Return whether the order is reversed; None if the intervals neither show nor exclude it."""
    ends = [(row[f"{field}_low"], row[f"{field}_high"]) for field in ("at_baseline_rate", "at_own_rate")]
    both_orders = (ends, ends[::-1])
    if any(loses[1] < -margin and wins[0] > margin for loses, wins in both_orders):
        return True
    # A comparison with NaN is false.
    is_excluded = all(loses[0] > -margin or wins[1] < margin for loses, wins in both_orders)
    return False if is_excluded else None


def _winners(
    rates: Sequence[float] | NDArray[np.float64], scores: Mapping[str, NDArray[np.float64]], baseline: str
) -> list[dict[str, Any]]:
    """Return the variant with the highest mean test score at each rate. The baseline wins a tie."""
    import pandas as pd

    names = [baseline, *(name for name in scores if name != baseline)]
    means = pd.DataFrame({name: pd.DataFrame(scores[name]).mean() for name in names}).set_axis(list(rates))
    differ = means[means[baseline].notna() & (means.nunique(axis=1) > 1)]
    return [
        {"learning_rate": rate, "winner": own.idxmax(), "score": own.max(), "baseline_score": own[baseline]}
        for rate, own in differ.iterrows()
    ]


def compare_curves_at_fixed_rate(
    runs: pd.DataFrame, best: pd.DataFrame, reference: str, margin: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare the curves of one panel of a grid at fixed rates, paired by seed.

    Controls are left out, and so are curves on which nothing was learned.

    Args:
        runs: The runs of the panel, from `run_frame`.
        best: The rows of `Results.best` of the panel.
        reference: The label of LoRA's curve; empty if there is none.
        margin: The smallest difference that matters.

    Returns:
        As for `compare_at_fixed_rate`. Both lists are empty if there is no LoRA curve or no second curve, if
        the curves share fewer than two rates, or if the best rate of a curve is not among the shared rates.
    """
    import numpy as np

    is_compared = best["learning_rate"].notna() & ~best["nothing_learned"] & ~best["variant"].isin(CONTROLS)
    rate_of = best[is_compared].set_index("curve")["learning_rate"]
    if reference not in rate_of or len(rate_of) < 2:
        return [], []
    own = runs[runs["curve"].isin(rate_of.index)]
    curves_at = own.groupby("learning_rate")["curve"].nunique()
    rates = list(curves_at.index[curves_at == len(rate_of)])
    if len(rates) < 2 or not set(rate_of) <= set(rates):
        return [], []
    table = own.pivot(index="seed", columns=["curve", "learning_rate"], values="test_score")
    scores = {str(name): table[name][rates].to_numpy(float) for name in sorted(rate_of.index)}
    chosen = {name: np.full(len(table), rates.index(rate_of[name])) for name in scores}
    return compare_at_fixed_rate(rates, scores, chosen, reference, margin)
