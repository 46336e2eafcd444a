"""What a tuned comparison says, in words; used by the table, the forest plot and the report."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.analyze import formatting
from orchestrator.analyze.comparison import Chosen, Confirmed
from orchestrator.analyze.panels import Value
from orchestrator.analyze.significance import Comparison, Pair

OUTCOMES = {
    "better": "better than",
    "worse": "worse than",
    "equivalent": "equivalent to",
    "not inferior": "not inferior to",
    "undecided": "undecided against",
}


def verdict(found: Confirmed) -> str:
    """Two sentences: which variants differ from the tuned baseline, and whether it matches or beats most of
    them. The task, model, variants, seeds and budget are named."""
    c = found.comparison
    groups = []
    for outcome, how in OUTCOMES.items():
        who = [_named(found, p) for p in c.pairs if p.outcome == outcome]
        if who:
            groups.append(f"{', '.join(who)} {'is' if len(who) == 1 else 'are'} {how} {c.baseline.label}")
    said = "; ".join(groups) or "nothing to compare"
    return f"{found.task} on {found.model}, {found.steps} steps, {_budget(found)}: {said}. {claim(found)}"


def _named(found: Confirmed, pair: Pair) -> str:
    """pissa (+0.030, not bracketed)."""
    about = [] if pair.difference is None else [signed(pair.difference)]
    about += ["not bracketed"] if _edges(found, pair.label) else []
    return f"{pair.label} ({', '.join(about)})" if about else pair.label


def _edges(found: Confirmed, label: str) -> bool:
    """Whether the optimum may lie beyond what was tried."""
    return label in found.chosen and bool(found.chosen[label].edges)


def _budget(found: Confirmed) -> str:
    """What was spent: 7 points x 3 seeds each to tune, 10 fresh seeds."""
    seeds = many(len(found.seeds), "fresh seed")
    if not found.chosen:
        return f"{seeds}, margin {found.comparison.margin:g}"
    each = sorted({(c.points, c.seeds) for c in found.chosen.values()})
    ends = each if len(each) < 2 else [each[0], each[-1]]
    tuned = " to ".join(f"{many(points, 'point')} x {many(n, 'seed')}" for points, n in ends)
    return f"each variant tuned with {tuned}, confirmed with {seeds}, margin {found.comparison.margin:g}"


def claim(found: Confirmed) -> str:
    """Whether the tuned baseline matches or beats most variants, with the interval on how many."""
    c = found.comparison
    if not c.counted:
        return ""
    low, high = c.baseline_holds
    count = f"{low}" if low == high else f"{low} to {high}"
    name = "LoRA" if c.baseline.label == "lora" else c.baseline.label
    name += " (not bracketed)" if _edges(found, c.baseline.label) else ""
    return (
        f"Tuned {name} matches or beats most variants: {c.claim} (it is not inferior to {count} of "
        f"{c.counted}, {c.level:.0%} interval)."
    )


def signed(value: float | None, digits: int = 3) -> str:
    """+0.012; never -0.000; a dash if there is none."""
    return "-" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"


def p_value(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def undecided(pair: Pair) -> str:
    """What an undecided pair needs; empty for the others."""
    if pair.outcome != "undecided":
        return ""
    if pair.interval is None:
        return pair.reason
    if pair.seeds_to_decide is None:
        return "over 1,000 seeds"
    return f"{pair.seeds_to_decide} seeds would decide"


def pairing(c: Comparison) -> str:
    """What the pairing by seed was worth."""
    if c.correlation is None or c.pairing_helps is None:
        return ""
    r = f"correlation of the scores over seeds {signed(c.correlation, 2)}"
    if not c.pairing_helps:
        return f"Pairing by seed gained nothing: {r}, seeds do not differ by more than the noise."
    return f"Pairing by seed helped: {r}."


def detectable(c: Comparison) -> str:
    sizes = [p.detectable for p in c.pairs if p.detectable is not None]
    if not sizes:
        return ""
    low, high = formatting.number(min(sizes)), formatting.number(max(sizes))
    size = low if low == high else f"{low} to {high}, by variant"
    return f"Smallest difference that had an 80 % chance to be found: {size}."


def scope(c: Comparison) -> str:
    """What the intervals are about: as long as nothing diverges."""
    arms = [a for a in (c.baseline, *c.arms) if not a.diverged and a.diverged_interval is not None]
    if not any(p.interval is not None for p in c.pairs):
        return ""
    high = max(a.diverged_interval.high for a in arms if a.diverged_interval is not None)
    return f"Intervals are of runs that do not diverge; without one so far, up to {high:.0%} still may."


def settings(chosen: Chosen | None, rate: float) -> str:
    """The point in short: 3e-3, rank 8; and whether it is at the edge of what was tried."""
    if chosen is None:
        return formatting.rate(rate)
    return point(chosen.settings) + (" (edge)" if chosen.edges else "")


def point(settings: Mapping[str, Value]) -> str:
    """All that a variant's points differ in: 3e-3, rank 8."""
    return ", ".join(
        formatting.rate(v)
        if k == "learning_rate" and isinstance(v, float)
        else f"{k.removeprefix('variant_')} {_value(v)}"
        for k, v in settings.items()
    )


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def stability(chosen: Chosen) -> str:
    """How often other seeds of the first stage would have chosen each point; empty with one seed."""
    return ", ".join(f"{point(settings)} {share:.0%}" for settings, share in chosen.otherwise[:3])
