"""The verdict on a claim, in the words that the terminal, the report, MLflow and Python share.

The functions are those of the comparison on fresh seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.analyze import formatting
from orchestrator.analyze.comparison import ChosenPoint, TunedComparison
from orchestrator.analyze.panels import Value
from orchestrator.analyze.significance import Comparison, PairedComparison

VerdictOutcome = Literal["supported", "refuted", "undecided", "descriptive"]
"""The outcome for a claim. A descriptive verdict states what the data show and has no error rate."""


@dataclass(frozen=True)
class Verdict:
    """What a study says about one claim. Every text is plain and complete; nobody rephrases it."""

    claim: str
    """The claim in one sentence."""
    outcome: VerdictOutcome
    answer: str
    """What the data say in one to three sentences, with the deciding numbers and their intervals."""
    design: str
    """One sentence: tasks, models, variants, factors, seeds or replicates, and budget."""
    next_step: str = ""
    """One sentence that says what would narrow the answer; empty if nothing would."""
    next_command: str = ""
    """The command for `next_step`, or empty."""


OUTCOME_PHRASES = {
    "better": "better than",
    "worse": "worse than",
    "equivalent": "equivalent to",
    "not inferior": "not inferior to",
    "undecided": "undecided against",
}


def verdict_text(result: TunedComparison) -> str:
    """Return the verdict in two sentences.

    The first sentence says which variants differ from the tuned baseline, with task, model, seeds and budget.
    The second sentence says whether the baseline matches or beats most variants.
    """
    c = result.comparison
    groups = []
    for outcome, how in OUTCOME_PHRASES.items():
        who = [_variant_phrase(result, p) for p in c.pairs if p.outcome == outcome]
        if who:
            groups.append(f"{', '.join(who)} {'is' if len(who) == 1 else 'are'} {how} {c.baseline.label}")
    outcomes = "; ".join(groups) or "nothing to compare"
    where = f"{result.task} on {result.model}, {result.steps} steps, {_budget_text(result)}"
    return f"{where}: {outcomes}. {claim_text(result)}"


def _variant_phrase(result: TunedComparison, pair: PairedComparison) -> str:
    """Return the variant and its difference, for example "pissa (+0.030, not bracketed)"."""
    about = [] if pair.difference is None else [signed_number(pair.difference)]
    about += ["not bracketed"] if _is_at_edge(result, pair.label) else []
    return f"{pair.label} ({', '.join(about)})" if about else pair.label


def _is_at_edge(result: TunedComparison, label: str) -> bool:
    """Return whether the optimum may lie beyond the tried values."""
    return label in result.chosen and bool(result.chosen[label].edges)


def _budget_text(result: TunedComparison) -> str:
    """Return the budget of tuning and confirmation: 7 points x 3 seeds, 10 fresh seeds."""
    seeds = count_text(len(result.seeds), "fresh seed")
    if not result.chosen:
        return f"{seeds}, margin {result.comparison.margin:g}"
    each = sorted({(c.points, c.seeds) for c in result.chosen.values()})
    ends = each if len(each) < 2 else [each[0], each[-1]]
    tuned = " to ".join(f"{count_text(points, 'point')} x {count_text(n, 'seed')}" for points, n in ends)
    return f"each variant tuned with {tuned}, confirmed with {seeds}, margin {result.comparison.margin:g}"


def claim_text(result: TunedComparison) -> str:
    """Return a sentence: does the tuned baseline match or beat most variants, and how many of them?"""
    c = result.comparison
    if not c.counted:
        return ""
    low, high = c.baseline_not_inferior_to
    count = f"{low}" if low == high else f"{low} to {high}"
    name = "LoRA" if c.baseline.label == "lora" else c.baseline.label
    name += " (not bracketed)" if _is_at_edge(result, c.baseline.label) else ""
    why = f"it is not inferior to {count} of {c.counted}, {c.level:.0%} interval"
    return f"Tuned {name} matches or beats most variants: {c.claim} ({why})."


def signed_number(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign, +0.012, never as "-0.000"; "-" for None."""
    return "-" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"


def p_value(value: float | None) -> str:
    """Format a p value; "-" for None."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def count_text(count: int, what: str) -> str:
    """Return a count and a noun, in the plural unless the count is 1."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def undecided_text(pair: PairedComparison) -> str:
    """Return what would decide an undecided comparison; empty for a decided one."""
    if pair.outcome != "undecided":
        return ""
    if pair.interval is None:
        return pair.reason
    if pair.seeds_to_decide is None:
        return "over 1,000 seeds"
    return f"{pair.seeds_to_decide} seeds would decide"


def pairing_text(c: Comparison) -> str:
    """Return a sentence on whether pairing by seed reduced the error; empty if that is unknown."""
    if c.correlation is None or c.pairing_helps is None:
        return ""
    r = f"correlation of the scores over seeds {signed_number(c.correlation, 2)}"
    if not c.pairing_helps:
        return f"Pairing by seed gained nothing: {r}, seeds do not differ by more than the noise."
    return f"Pairing by seed helped: {r}."


def detectable_text(c: Comparison) -> str:
    """Return the smallest difference that the comparison could detect; empty if there is none."""
    sizes = [p.minimum_detectable_effect for p in c.pairs if p.minimum_detectable_effect is not None]
    if not sizes:
        return ""
    low, high = formatting.number(min(sizes)), formatting.number(max(sizes))
    size = low if low == high else f"{low} to {high}, by variant"
    return f"Smallest difference that is detected with probability 80 %: {size}."


def scope_text(c: Comparison) -> str:
    """Return a sentence on the runs that the intervals describe; empty without an interval."""
    arms = [a for a in (c.baseline, *c.arms) if not a.diverged and a.diverged_interval is not None]
    if not any(p.interval is not None for p in c.pairs):
        return ""
    high = max(a.diverged_interval.high for a in arms if a.diverged_interval is not None)
    return f"Intervals describe runs that do not diverge. Where none has so far, up to {high:.0%} still may."


def chosen_point_text(chosen: ChosenPoint | None, rate: float) -> str:
    """Return the settings of a point, for example "3e-3, rank 8 (edge)" at an edge of the tried values.

    Args:
        chosen: The point; None if it is not known.
        rate: The learning rate, shown if the point is not known.
    """
    if chosen is None:
        return formatting.rate(rate)
    return settings_text(chosen.settings) + (" (edge)" if chosen.edges else "")


def settings_text(settings: Mapping[str, Value]) -> str:
    """Format the settings in which a variant's points differ, for example "3e-3, rank 8"."""
    return ", ".join(
        formatting.rate(v)
        if k == "learning_rate" and isinstance(v, float)
        else f"{k.removeprefix('variant_')} {_value_text(v)}"
        for k, v in settings.items()
    )


def _value_text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def stability_text(chosen: ChosenPoint) -> str:
    """Return the shares of resampled sets of seeds that choose each point; empty with one seed."""
    frequencies = chosen.selection_frequencies[:3]
    return ", ".join(f"{settings_text(settings)} {share:.0%}" for settings, share in frequencies)
