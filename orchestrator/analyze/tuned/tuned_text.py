"""Short texts on tuned variants, for the table in the terminal, the pictures and the report page."""

from __future__ import annotations

from orchestrator.analyze.formatting import points, rate
from orchestrator.analyze.statistics.usable import UsableShare
from orchestrator.analyze.tuned.tuned_results import VariantRow
from orchestrator.analyze.tuned.tunings import Tuning


def shown_name(variant: str) -> str:
    """Return the name of a variant as it is written in a sentence."""
    return "LoRA" if variant == "lora" else variant


def outcome_text(row: VariantRow) -> str:
    """Return the outcome of a row, or its role if it is the baseline or an unverified variant."""
    return row.role if row.role in ("baseline", "unverified") else row.outcome


def row_note(row: VariantRow) -> str:
    """Return why a row has no interval or how many replicates decide it; an empty text if neither applies."""
    if row.role in ("baseline", "unverified"):
        return ""
    if row.interval is None:
        return row.reason
    if row.outcome != "undecided" or row.replicates_to_decide is None:
        return ""
    return f"{row.replicates_to_decide} replicates decide at worst"


def share_text(share: UsableShare | None) -> str:
    """Return a share as two counts, for example 9/10; "-" for None."""
    return "-" if share is None else f"{share.usable}/{share.n}"


def chosen_rates_text(row: VariantRow) -> str:
    """Return the range of the chosen learning rates, for example 3.1e-3 to 1e-2; "-" without any."""
    rates = sorted(t.chosen.learning_rate for t in row.tunings if t.chosen is not None)
    if not rates:
        return "-"
    ends = dict.fromkeys((rate(rates[0]), rate(rates[-1])))
    return " to ".join(ends)


def width_text(row: VariantRow) -> str:
    """Return `PooledCurve.width`, or "not resolved" if it is None; "-" without a curve."""
    if row.curve is None:
        return "-"
    return "not resolved" if row.curve.width is None else f"{row.curve.width:.2f}"


def optimum_text(row: VariantRow) -> str:
    """Return the optimum of the pooled curve, marked if it is at an edge; "-" without a curve."""
    if row.curve is None:
        return "-"
    return rate(row.curve.best_rate) + (" (edge)" if row.curve.is_at_edge else "")


def resolvable_text(row: VariantRow) -> str:
    """Return `VariantRow.resolvable` in points."""
    return points(row.resolvable).lstrip("+")


def tuning_text(tuning: Tuning) -> str:
    """Return the rate of the chosen run, its scores, its label if it is not usable, and its edges."""
    if tuning.chosen is None:
        return "no run with a score"
    scores = ", ".join(
        f"{name} {value:.3f}"
        for name, value in (("validation", tuning.chosen.validation), ("test", tuning.chosen.test))
        if value is not None
    )
    reason = "nothing learnt" if tuning.nothing_learned else tuning.chosen.label
    label = "" if tuning.is_usable else f", {reason}"
    edge = f", at the edge: {', '.join(tuning.edges)}" if tuning.edges else ""
    return f"{rate(tuning.chosen.learning_rate)}: {scores}{label}{edge}"
