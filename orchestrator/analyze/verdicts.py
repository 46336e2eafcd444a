"""Verdicts: whether a claim is supported, refuted or undecided, and the sentences that say so.

The tables of rules in this module make the whole decision. The facts of a panel are counts and confidence
limits from the frames of `Results`. The first rule of a table whose predicate is true for these facts
determines the outcome and the sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.analyze import formatting, stats
from orchestrator.analyze.formatting import count, number, points, points_estimate, rate
from orchestrator.study.grids import round_rate
from orchestrator.study.levels import MODEL

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.analyze.results import Results

VerdictOutcome = Literal["supported", "refuted", "undecided", "descriptive"]
"""The outcome of a claim. A descriptive verdict comes from no statistical test, so it has no error rate."""
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The answer of a study to one claim. Reports show all texts without further wording.

    Attributes:
        claim: The claim in one sentence.
        outcome: The outcome.
        answer: The result in a few sentences, with the deciding numbers and their intervals.
        design: The tasks, models, variants, factors, seeds or replicates, and budget.
        next_step: What would make the answer more precise; empty if nothing would.
        next_command: The command for `next_step`; empty if there is none.
        scope: The task or tasks to which the outcome applies, such as "digits".
        panel: The panel of the verdict; empty if the verdict is about several panels.
    """

    claim: str
    outcome: VerdictOutcome
    answer: str
    design: str
    next_step: str = ""
    next_command: str = ""
    scope: str = ""
    panel: str = ""

    @property
    def heading(self) -> str:
        """The claim with its scope, which stands beside the outcome."""
        return f"{self.claim.removesuffix('.')} ({self.scope})." if self.scope else self.claim


@dataclass(frozen=True)
class Rule:
    """One line of a table of rules.

    Attributes:
        applies: The predicate over the facts. Its argument has them as attributes.
        sentence: A template of the sentence, filled in with the facts.
        outcome: The outcome if the predicate is true.
        claim: A heading that replaces the claim; empty to keep the claim.
        command: A template of the command, if the sentence names a next step.
    """

    applies: Callable[[SimpleNamespace], object]
    sentence: str
    outcome: VerdictOutcome = "descriptive"
    claim: str = ""
    command: str = ""


def _otherwise(_: object) -> bool:
    return True


def decide(rules: Sequence[Rule], facts: Facts) -> tuple[Rule, str]:
    """Return the first rule whose predicate is true for the facts, and its sentence."""
    named = SimpleNamespace(**facts)
    rule = next(rule for rule in rules if rule.applies(named))
    return rule, rule.sentence.format(**facts)


RATE_MATTERS = "The learning rate matters more than any other hyperparameter."
RATE_MATTERS_RULES = (
    Rule(
        lambda f: f.refuted > f.judged - f.required,
        "It fails for at least {refuted} of {judged} variants; it may fail for {spare}.",
        "refuted",
    ),
    Rule(
        lambda f: not f.measured,
        "On {task} no factor but the learning rate has been measured yet.",
        "undecided",
    ),
    Rule(
        lambda f: f.missing,
        "It is shown for at least {supported} of {judged} variants ({required} needed), but some "
        "configurations have not ended.",
        "undecided",
    ),
    Rule(
        lambda f: f.supported >= f.required,
        "It is shown for at least {supported} of {judged} variants; {required} are needed.",
        "supported",
    ),
    Rule(
        _otherwise,
        "It is shown for at least {supported} of {judged} variants; {required} are needed.",
        "undecided",
    ),
)
"""The rules of claim 1. The claim is shown for a variant if, for every other factor h, A(rate) exceeds A(h)
by the margin and B(rate | h) exceeds B(h) by the margin. A is the loss if a factor is set blindly, and B is
the loss if the rate is then tuned again (see `effects`). The sentences count variants by lower confidence
bounds."""

REPLACES = "The learning rate could replace {title}."
REPLACES_RULES = (
    Rule(lambda f: f.against, "It could not for at least {against} of {judged} variants{found}.", "refuted"),
    Rule(lambda f: f.missing, "Some configurations have not ended{found}.", "undecided"),
    Rule(
        lambda f: f.shown == f.judged,
        "With the rate tuned again, no level of {title} changes the score by the margin{found}.",
        "supported",
    ),
    Rule(
        lambda f: f.unresolved,
        "The best rate may lie outside the rates that were tried ({unresolved}){found}.",
        "undecided",
    ),
    Rule(
        lambda f: f.hidden,
        "The rates are so far apart that they may hide a difference of the margin ({hidden}). More rates, as "
        "in --learning-rates LOW:HIGH:8, may show it{found}.",
        "undecided",
    ),
    Rule(_otherwise, "It stays open{found}.", "undecided"),
)
"""The rules for a factor that may act as a learning rate, such as alpha. The rate could replace it if the
best score over the rates is the same, within the margin, at every level (see `replacement`)."""

TUNED_WINS = "Tuned {name} matches or beats most variants."
TUNED_WINS_RULES = (
    Rule(lambda f: not f.counted, "On {task} there is no variant that the claim counts."),
    Rule(
        lambda f: 2 * f.holds_at_least > f.counted,
        "On {task} it holds for at least {holds_at_least} of {counted} variants ({needed} needed).",
        "supported",
    ),
    Rule(
        lambda f: 2 * f.beaten_at_least >= f.counted,
        "On {task} at least {beaten_at_least} of {counted} variants are better by more than the margin.",
        "refuted",
    ),
    Rule(
        _otherwise,
        "On {task} it is shown for at least {holds_at_least} of {counted} variants ({needed} needed).",
        "undecided",
    ),
)
"""The rules of claim 2. LoRA, or another baseline, matches or beats a variant if the true difference "variant
minus baseline" is below the margin. The numbers of variants are lower confidence bounds: `holds_at_least`
counts variants that the baseline matches or beats, and `beaten_at_least` counts variants that are better by
more than the margin."""

RATE_DECIDES = "At one fixed learning rate the winner is an artefact of the rate."
RATE_DECIDES_RULES = (
    Rule(lambda f: f.reversals, "{reversals}.", "supported"),
    Rule(
        lambda f: not f.open,
        "Between {name}'s best rate and a variant's own no variant changes its order with {name} by more "
        "than the margin.",
        "refuted",
        "At LoRA's best learning rate no variant changes its order with LoRA.",
    ),
    Rule(
        _otherwise,
        "It stays open whether a variant changes its order with {name} between their best rates.",
        "undecided",
        "Whether one fixed learning rate changes which variant wins stays open.",
    ),
)
"""The rules of claim 3. They compare a variant with LoRA, or another baseline, at two learning rates: the
best rate of the baseline and the best rate of the variant. The order of the two is reversed if the variant
loses by more than the margin at one of these rates and wins by more than the margin at the other.

The field `claim` of a rule is the heading for a grid of learning rates. A grid chooses the rates on the same
seeds that it compares. Its heading therefore describes the result and does not state the claim.
"""

BEST_RATES_RULES = (
    Rule(lambda f: not f.scored, "No learning rate of {panel} has a score yet."),
    Rule(
        lambda f: f.unlearned == f.scored,
        "Nothing was learnt on {panel}: no run of any variant is better than the untrained model or a "
        "constant answer.",
    ),
    Rule(lambda f: not f.peaked, "No variant of {panel} scores better inside the grid than at its ends."),
    Rule(lambda f: f.peaked == 1, "The best rate of {first} is {first_rates}."),
    Rule(
        lambda f: f.decades < 0.005 and not f.ties,
        "All {peaked} variants are best at one rate, {first_rates}.",
        claim="All variants are best at one learning rate.",
    ),
    Rule(
        lambda f: f.shared,
        "All {peaked} variants are best at {shared}.",
        claim="No variant needs a learning rate of its own.",
    ),
    Rule(
        _otherwise,
        "The best rates of {peaked} variants lie{at_least} {decades:.1f} decades apart ({first} "
        "{first_rates}, {last} {last_rates}).",
        claim="Each variant has a learning rate of its own at which it is best.",
    ),
)
"""The rules for what a grid shows about the best learning rates of a panel."""

NOT_ENDED = Rule(
    lambda f: f.missing,
    "Some configurations have not ended; the same command continues.",
    command="{command}",
)
NEXT_STEPS = (
    NOT_ENDED,
    Rule(lambda f: f.outcome != "undecided" or not f.open, ""),
    Rule(
        lambda f: f.without,
        "There is no interval for {without}; more replicates may give one.",
        command="{twice}",
    ),
    Rule(
        lambda f: f.hopeless,
        "For {hopeless} even 1,000 replicates may not decide; this needs a larger test split (--test-size) "
        "or a wider margin.",
    ),
    Rule(
        lambda f: f.needed <= f.replicates,
        "The margin lies in the interval of {open}; the number of replicates that excludes it depends on the "
        "true difference.",
    ),
    Rule(
        _otherwise,
        "About {needed} replicates decide every open comparison with probability 80 %, whatever the true "
        "differences are, if the spread stays. Fix the number first: who adds replicates until something is "
        "decided errs more often than stated.",
        command="{more}",
    ),
)
"""The rules for the next step of a replicated tuning (claim 2)."""

SENSITIVITY_STEPS = (
    NOT_ENDED,
    Rule(lambda f: f.outcome != "undecided", ""),
    Rule(
        lambda f: f.by_range,
        "For {by_range} the answer depends on how well the rate is known beforehand, which no further run "
        "can settle.",
    ),
    Rule(
        lambda f: not f.measured,
        "The levels of the factors have not been trained yet; the same command continues.",
        command="{command}",
    ),
    Rule(lambda f: f.have < 2, "Five seeds give intervals.", command="{more}"),
    Rule(
        lambda f: f.lacking,
        "There is no interval for {lacking}: fewer than two seeds have every score. This tries failed runs "
        "again.",
        command="{retry}",
    ),
    Rule(
        lambda f: f.equal,
        "For {equal} the loss differs from that of the learning rate by the same number for every seed, so "
        "there is no limit; more seeds may give one.",
        command="{more}",
    ),
    Rule(
        lambda f: f.hopeless,
        "The learning rate and the closest factor cost about the same; more seeds may not decide it.",
    ),
    Rule(
        lambda f: f.hidden,
        "The grid of rates leaves open whether the rate could replace {hidden}; its verdict says what helps.",
    ),
    Rule(
        _otherwise,
        "About {seeds} seeds decide it if the differences and their spread stay as they are.",
        command="{more}",
    ),
)
"""The rules for the next step of a sensitivity study (claim 1)."""

SEARCH_STEPS = (NOT_ENDED, Rule(_otherwise, ""))
"""The rules for the next step of a search."""


def shown_name(variant: str) -> str:
    """Return the name of a variant as it is written in a sentence."""
    return "LoRA" if variant == "lora" else variant


def find_verdicts(results: Results) -> list[Verdict]:
    """Return the verdicts of a study, the most important one first."""
    find = {"factors": _factors, "replicates": _tuned, "curve": _curves, "search": _searches}
    find["transfer"] = _transfer
    found = list(find[results.study.settings.kind](results))
    if results.study.settings.select == "published":
        mark = "Selected on the test set, as published (--select published)."
        found = [replace(verdict, design=f"{verdict.design} {mark}") for verdict in found]
    return found


def decide_step(rules: Sequence[Rule], facts: Facts) -> tuple[str, str]:
    """Return the sentence and the command of the next step. Both may be empty."""
    rule, sentence = decide(rules, facts)
    return sentence, rule.command.format(**facts)


def _rows(frame: pd.DataFrame, panel: str) -> list[dict[str, Any]]:
    """Return the rows of a panel in a frame that may be empty."""
    found: list[dict[str, Any]] = frame[frame["panel"] == panel].to_dict("records") if len(frame) else []
    return found


def _join(*texts: str) -> str:
    return " ".join(filter(None, texts))


def _range_text(low: object, high: object) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


# -- grids


def _curves(results: Results) -> Iterator[Verdict]:
    fixed = []
    for panel in results.panels.to_dict("records"):
        title, scope = panel["panel"], panel["panel"].replace(f" on {panel['model']}", "")
        best, runs = (each[each["panel"] == title] for each in (results.best, results.runs))
        rates = sorted(runs["learning_rate"].unique())
        seeds, number_of_rates = count(runs["seed"].nunique(), "seed"), count(len(rates), "learning rate")
        grid = f"{number_of_rates} from {rate(rates[0])} to {rate(rates[-1])}"
        if len(rates) == 1:
            grid = f"one learning rate, {rate(rates[0])}"
        rule, text = decide(BEST_RATES_RULES, best_rate_facts(panel, best))
        unlearned = best.loc[best["nothing_learned"], "curve"]
        if 0 < len(unlearned) < len(best):
            text += f" Nothing was learnt by {', '.join(unlearned)}."
        yield Verdict(
            rule.claim or "The learning rate at which each variant is best.",
            "descriptive",
            _join(text, _span_sentence(panel, best)),
            f"{title}: {count(len(best), 'variant')}, {grid}, {seeds}; {panel['metric'].replace('_', ' ')}.",
            scope=scope,
            panel=title,
        )
        if rows := _rows(results.fixed_rate, title):
            names = ", ".join([panel["reference"], *(row["variant"] for row in rows)])
            design = (
                f"{title}: {names}; {number_of_rates} with {seeds}. The rates are chosen on the same seeds, "
                "so this is descriptive."
            )
            chosen = best.set_index("curve")["rates"].to_dict()
            fixed.append(_fixed_rate(rows, panel["reference"], scope, design, chosen))
    yield from fixed


def best_rate_facts(panel: Facts, best: pd.DataFrame) -> dict[str, Any]:
    """Return the facts from which `BEST_RATES_RULES` decide.

    A curve has a best learning rate ("peaked") unless no rate has a score, nothing was learned, or both ends
    of the grid have the best score.
    """
    scored = best[best["learning_rate"].notna()]
    peaked = scored[~scored["nothing_learned"]]
    if "bracket" in best:
        peaked = peaked[peaked["bracket"] != "both edges"]
    rows = peaked.sort_values(["learning_rate", "curve"]).to_dict("records")
    equal = [set(row["rates"].split(" = ")) for row in rows]
    shared = sorted(set.intersection(*equal), key=float) if equal else []
    facts = {
        "panel": panel["panel"],
        "scored": len(scored),
        "unlearned": int(scored["nothing_learned"].sum()),
        "peaked": len(rows),
        "ties": any(len(own) > 1 for own in equal),
        "shared": formatting.join(shared) + (" alike" if len(shared) > 1 else ""),
        "at_least": "" if all(row.get("bracket") == "yes" for row in rows) else " at least",
    }
    if rows:
        first, last = rows[0], rows[-1]
        facts |= {"first": first["curve"], "first_rates": first["rates"]}
        facts |= {"last": last["curve"], "last_rates": last["rates"]}
        facts["decades"] = math.log10(last["learning_rate"] / first["learning_rate"])
    return facts


def _span_sentence(panel: Facts, best: pd.DataFrame) -> str:
    """Return the sentence on the spans of the test scores at the common rate and at the best rates."""
    own = best[~best["nothing_learned"] & best["test_at_common_rate"].notna() & best["test_score"].notna()]
    if len(own) < 2:
        return ""
    at_common = own.set_index("curve")["test_at_common_rate"].sort_values(kind="stable")
    low, high = at_common.iloc[0], at_common.iloc[-1]
    whose = "their test scores"
    if len(own) < len(best):
        whose = f"the test scores of {len(own)} of {len(best)} variants"
    return (
        f"At {panel['common_label']} ({rate(panel['common_rate'])}) {whose} span {number(high - low, 2)} "
        f"({at_common.index[0]} {number(low, 2)} to {at_common.index[-1]} {number(high, 2)}); each at its "
        f"own best rate, {number(own['test_score'].max() - own['test_score'].min(), 2)}."
    )


# -- claim 3


def _fixed_rate(
    rows: Sequence[Facts], baseline: str, scope: str, design: str, chosen: Mapping[str, str]
) -> Verdict:
    """Return the verdict on claim 3.

    Args:
        rows: The rows of `Results.fixed_rate` of one panel.
        baseline: The curve at whose best rate the others are compared.
        scope: The text for `Verdict.scope`.
        design: The text for `Verdict.design`.
        chosen: Curve of a grid -> its best rate as text. It is empty for a replicated tuning, whose
            replicates have different best rates.
    """
    name = shown_name(baseline)
    reversed_rows = [row for row in rows if row["reversal"] is True]
    clauses = [_reversal(row, baseline, chosen) for row in reversed_rows[:2]]
    if len(reversed_rows) > 2:
        clauses.append(f"so it is for {len(reversed_rows)} of {len(rows)} variants")
    facts = {
        "name": name,
        "open": any(row["reversal"] is None for row in rows),
        "reversals": "; ".join(clauses),
    }
    rule, text = decide(RATE_DECIDES_RULES, facts)
    worst = max(rows, key=lambda row: row["regret"])
    if round(100 * worst["regret"], 1) > 0:
        lost = points_estimate(worst, "regret")
        text += f" At {name}'s best rate {worst['variant']} loses most against its own: {lost} points."
    found = Verdict(RATE_DECIDES, rule.outcome, text, design, scope=scope, panel=rows[0]["panel"])
    return replace(found, claim=rule.claim or RATE_DECIDES, outcome="descriptive") if chosen else found


def _reversal(row: Facts, baseline: str, chosen: Mapping[str, str]) -> str:
    """Return the clause on a variant whose order with the baseline is reversed."""
    name, variant = shown_name(baseline), row["variant"]
    base_rate, own_rate = (f" ({chosen[each]})" if chosen else "" for each in (baseline, variant))
    at_base, at_own = row["at_baseline_rate"], row["at_own_rate"]
    winner, loser = (name, variant) if at_base < 0 else (variant, name)
    return (
        f"At {name}'s best rate{base_rate} {winner} beats {loser} by {points(abs(at_base), False)} points, "
        f"at {variant}'s own{own_rate} {loser} beats {winner} by {points(abs(at_own), False)}"
    )


# -- replicated tuning


def _tuned(results: Results) -> Iterator[Verdict]:
    settings, tasks = results.study.settings, results.tuned.to_dict("records")
    claim = TUNED_WINS.format(name=shown_name(settings.baseline))
    verdicts, fixed = [], []
    for task in tasks:
        panel, scope, rows = task["panel"], task["task"], _rows(results.comparison, task["panel"])
        rule, text = decide(TUNED_WINS_RULES, task | {"needed": task["counted"] // 2 + 1})
        answer = _join(text, _outcome_sentence(task, rows, settings.baseline), _noise(task))
        design = _tuned_design(task, rows, settings.margin)
        step, command = _next_step(results, task, rows, rule.outcome)
        verdicts.append(Verdict(claim, rule.outcome, answer, design, step, command, scope, panel))
        if compared := _rows(results.fixed_rate, panel):
            fixed.append(_fixed_rate(compared, settings.baseline, scope, design, {}))
    if len(tasks) > 1:
        yield _over_tasks(claim, tasks, verdicts)
    yield from verdicts
    yield from fixed


def _over_tasks(claim: str, tasks: Sequence[Facts], verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on whether claim 2 holds on more than half of the tasks, by Holm's procedure."""
    import numpy as np

    shown, against = (stats.count_shown(np.array([t[p] for t in tasks])) for p in ("p_claim", "p_against"))
    needed = len(tasks) // 2 + 1
    outcome: VerdictOutcome = (
        "supported" if shown >= needed else "refuted" if against >= needed else "undecided"
    )
    each = ", ".join(f"{verdict.scope} {verdict.outcome}" for verdict in verdicts)
    answer = f"It holds on at least {shown} of {len(tasks)} tasks ({needed} needed; {each})."
    return Verdict(claim, outcome, answer, " ".join(v.design for v in verdicts), scope=f"{len(tasks)} tasks")


def _tuned_design(task: Facts, rows: Sequence[Facts], margin: float) -> str:
    names = ", ".join(row["variant"] for row in rows)
    return (
        f"{task['panel']}, {task['steps']} steps: {names}; each tuned on validation over {task['points']} "
        f"points in {task['replicates']} replicates, the test score of the chosen run counts; margin "
        f"{round(100 * margin, 1):g} points, simultaneous 95 % intervals (paired t, Bonferroni)."
    )


def _outcome_sentence(task: Facts, rows: Sequence[Facts], baseline: str) -> str:
    """Return the sentence that lists the counted variants by outcome, with their differences in points."""
    counted = [row for row in rows if row["role"] == "variant"]
    groups = [
        f"{outcome}: {', '.join(own)}"
        for outcome in (*(name for name, _ in stats.OUTCOMES), "undecided")
        if (own := [_difference(row) for row in counted if row["outcome"] == outcome])
    ]
    where = "" if task["has_item_error"] else f" on these {task['test_size']} test items"
    found = "; ".join(groups)
    return f"Difference from tuned {shown_name(baseline)} in points{where}: {found}." if groups else ""


def _difference(row: Facts) -> str:
    """Return a variant with its difference and its interval, or the reason why it has no interval."""
    shown = "" if math.isnan(row["difference"]) else points_estimate(row, "difference", sign=True)
    why = missing_interval(row)
    return _join(row["variant"], shown, f"({why})" if why else "")


def missing_interval(row: Facts) -> str:
    """Return why a row of `Results.comparison` has no interval; empty if it has one or is the baseline."""
    if row["role"] == "baseline" or not math.isnan(row["difference_low"]):
        return ""
    if row["pairs"] < 2:
        usable = "replicate is" if row["pairs"] == 1 else "replicates are"
        return f"{row['pairs'] or 'no'} {usable} usable for both"
    return "the same difference in every replicate"


def _noise(task: Facts) -> str:
    if math.isnan(task["span"]) or math.isnan(task["expected_span"]):
        return ""
    span, noise = (points(task[name], sign=False) for name in ("span", "expected_span"))
    return f"The mean scores span {span} points; equal variants would span {noise} by noise alone."


def _next_step(results: Results, task: Facts, rows: Sequence[Facts], outcome: str) -> tuple[str, str]:
    """Return the sentence and the command of the next step in a replicated tuning; both may be empty."""
    opened = [row for row in rows if row["role"] == "variant" and row["counts"] == "open"]
    numbers = {row["variant"]: row["replicates_to_decide"] for row in opened}
    needed = int(max((n for n in numbers.values() if not math.isnan(n)), default=0))
    facts = {
        **task,
        "outcome": outcome,
        "open": ", ".join(numbers),
        "without": ", ".join(f"{r['variant']} ({why})" for r in opened if (why := missing_interval(r))),
        "hopeless": ", ".join(variant for variant, n in numbers.items() if math.isnan(n)),
        "needed": needed,
        "command": results.study.command,
        "twice": results.study.again("--replicates", str(max(5, 2 * task["replicates"]))),
        "more": results.study.again("--replicates", str(needed)),
    }
    return decide_step(NEXT_STEPS, facts)


# -- sensitivity


def _factors(results: Results) -> Iterator[Verdict]:
    from orchestrator.analyze.factors import count_claims

    for panel in results.panels.to_dict("records"):
        title, task = panel["panel"], panel["task"]
        claims, rows = (frame[frame["panel"] == title] for frame in (results.claims, results.factors))
        counted = claims[claims["counted"]]
        judged = rows[rows["variant"].isin(counted["variant"])]
        others = judged[~judged["alias"]]
        facts = {"task": task, "measured": len(others), "missing": results.missing, **count_claims(claims)}
        facts["spare"] = facts["judged"] - facts["required"]
        rule, text = decide(RATE_MATTERS_RULES, facts)
        claim_sentence = _claim_sentence(counted) if len(others) else ""
        answer = _join(_cost_sentence(panel, judged), claim_sentence, text)
        design = _factor_design(panel, claims, rows, results.study.settings.margin)
        step, command = _sensitivity_step(results, counted, others, rule.outcome)
        yield Verdict(RATE_MATTERS, rule.outcome, answer, design, step, command, task, title)
        for factor, tested in _of_counted(results.replacements, title).groupby("title", sort=False):
            facts |= _replacement_facts(str(factor), tested, int((judged["title"] == factor).sum()))
            rule, text = decide(REPLACES_RULES, facts)
            claim = REPLACES.format(title=factor)
            yield Verdict(claim, rule.outcome, text, design, scope=task, panel=title)


def _of_counted(frame: pd.DataFrame, panel: str) -> pd.DataFrame:
    if not len(frame):
        return frame.reindex(columns=["title"])
    return frame[(frame["panel"] == panel) & frame["counted"]]


def _replacement_facts(title: str, rows: pd.DataFrame, judged: int) -> dict[str, Any]:
    """Return the facts from which `REPLACES_RULES` decide.

    Args:
        title: The title of the factor.
        rows: The rows of `Results.replacements` of the factor and the counted variants.
        judged: The number of counted variants that have the factor.
    """
    each = rows.drop_duplicates("variant")
    levels = rows["variant"] + " " + title + " " + rows["level"]
    found = "; ".join(
        f"{variant} {replaced_text(own)}" for variant, own in rows.groupby("variant", sort=False)
    )
    return {
        "title": title,
        "judged": judged,
        "against": stats.count_shown(each["p_could_not"]),
        "shown": int((each["outcome"] == "could").sum()),
        "unresolved": ", ".join(levels[~rows["resolved"]]),
        "hidden": ", ".join(levels[rows["hidden"]]),
        "found": f": {found}",
    }


def replaced_text(rows: pd.DataFrame) -> str:
    """Return the differences and rates of the levels of one variant: "x 64 -0.1 [-0.4, 0.2] points"."""
    return ", ".join(
        f"x {row['times']:.3g} {points_estimate(row, 'difference', sign=True)} points"
        + (f" at the rate x {row['rate_ratio']:.2g}" if row["resolved"] else "")
        for row in rows.to_dict("records")
    )


def _cost_sentence(panel: Facts, rows: pd.DataFrame) -> str:
    """Return the sentence on the loss A of the learning rate and the largest A of the other factors.

    The sentence is empty if either loss is missing. Factors that the rate could replace are left out.
    """
    rates = rows.loc[rows["factor"] == "learning_rate", "misset"].dropna()
    others = rows[~rows["alias"] & rows["misset"].notna()]
    if not len(rates) or not len(others):
        return ""
    low, high = points(rates.min(), sign=False), points(rates.max(), sign=False)
    worst = others.loc[others["misset"].idxmax()]
    aliases = ", ".join(dict.fromkeys(rows.loc[rows["alias"] & (rows["factor"] != "learning_rate"), "title"]))
    return (
        f"On {panel['task']} the learning rate, set blindly, costs {_range_text(low, high)} points, and any "
        f"other hyperparameter{f' but {aliases}, which it could replace,' if aliases else ''} at most "
        f"{points(worst['misset'], sign=False)} ({worst['title']} for {worst['variant']})."
    )


def _claim_sentence(claims: pd.DataFrame) -> str:
    words = {
        "supported": "holds for",
        "refuted": "fails for",
        "undecided": "is undecided for",
        "undecided (range)": "changes with the range of the rate for",
    }
    named = {word: claims.loc[claims["outcome"] == outcome, "variant"] for outcome, word in words.items()}
    groups = " and ".join(f"{word} {', '.join(own)}" for word, own in named.items() if len(own))
    far = claims.loc[(claims["outcome"] == "supported") & claims["far_more"], "variant"]
    whom = "all" if len(far) == len(claims) else ", ".join(far)
    more = f"; for {whom} the rate costs more than three times what any other factor does" if len(far) else ""
    return f"The claim {groups}{more}."


def _factor_design(panel: Facts, claims: pd.DataFrame, rows: pd.DataFrame, margin: float) -> str:
    titles = ", ".join(dict.fromkeys(rows.loc[rows["factor"] != "learning_rate", "title"])) or "nothing"
    seeds = _range_text(claims["seeds"].min(), claims["seeds"].max())
    return (
        f"{panel['panel']}; variants {', '.join(claims['variant'])}; learning rate against {titles}; {seeds} "
        f"seeds; margin {points(margin, sign=False)} points; one-sided 95 % limits, at half, the measured "
        "and double range of the rate."
    )


def _sensitivity_step(
    results: Results, claims: pd.DataFrame, others: pd.DataFrame, outcome: str
) -> tuple[str, str]:
    """Return the sentence and the command of the next step in a sensitivity study; both may be empty.

    Args:
        results: The results.
        claims: The rows of `Results.claims` of the variants that the claim counts.
        others: The rows of `Results.factors` of these variants, without the rate and what it could replace.
        outcome: The outcome of the claim.
    """
    needed, limits = (
        [f"{loss}_{name}" for loss in ("misset", "retuned")] for name in ("seeds_to_decide", "contrast_low")
    )
    opened = claims[claims["outcome"] != "supported"]
    # A study without an arm has no such columns.
    columns = others.reindex(columns=["variant", "title", "misset_seeds", *needed, *limits])
    rows = columns[columns["variant"].isin(opened["variant"])]
    names = rows["title"] + " (" + rows["variant"] + ")"
    have = int(rows["misset_seeds"].fillna(0).max()) if len(rows) else 0
    tested = [r for r in results.replacements.to_dict("records") if r["panel"] in set(claims["panel"])]
    hidden = names.isin([f"{r['title']} ({r['variant']})" for r in tested if r["hidden"]])
    hopeless = rows[needed].isna().any(axis=1)
    seeds = 5 if have < 2 else max(have + 1, int(rows[needed].fillna(0).max(axis=None)))
    facts = {
        "missing": results.missing,
        "outcome": outcome,
        "by_range": ", ".join(opened.loc[opened["outcome"] == "undecided (range)", "variant"]),
        "measured": len(rows),
        "have": have,
        "lacking": ", ".join(names[rows["misset_seeds"] < 2]),
        "equal": ", ".join(names[rows[limits].isna().any(axis=1)]),
        "hidden": ", ".join(names[hopeless & hidden]),
        "hopeless": (hopeless & ~hidden).any(),
        "seeds": seeds,
        "command": results.study.command,
        "more": results.study.again("--seeds", str(seeds)),
        "retry": results.study.again("--retry-failed"),
    }
    return decide_step(SENSITIVITY_STEPS, facts)


# -- transfer of the learning rate

CARRIES = "The best learning rate carries over from one {title} to another."
CARRIES_RULES = (
    Rule(lambda f: f.missing, "Some configurations have not ended.", "undecided"),
    Rule(
        lambda f: not f.pairs,
        "Fewer than two levels have learned and have their best rate inside the grid.",
        "undecided",
    ),
    Rule(
        lambda f: f.p_carries <= stats.ALPHA and not f.left_out,
        "Every level loses less than {margin} points at the best rate of any other.",
        "supported",
    ),
    Rule(
        lambda f: f.p_moves <= stats.ALPHA,
        "A level loses more than {margin} points at the best rate of another ({worst_pair}: {lost}).",
        "refuted",
    ),
    Rule(_otherwise, "Most is lost from {worst_pair}: {lost} points.", "undecided"),
)
"""The rules for the score that is lost by carrying a rate over, see `transfer`."""

KEPT_SLOPE = math.log2(4 / 3)
"""The largest slope at which a rate is kept. Doubling the factor then moves the best one by half a step of a
grid of 4 rates a decade."""
SLOPE_RULES = (
    Rule(
        lambda f: math.isnan(f.slope),
        "There is no slope: it needs three levels with a number and a best rate inside the grid; "
        "{inside} have both.",
    ),
    Rule(
        lambda f: math.isnan(f.slope_low),
        "Twice the {title} has {times} times the best rate, without an interval.",
    ),
    Rule(
        lambda f: f.slope_low > 0 or f.slope_high < 0,
        "Multiply the rate by {times} [{times_low}, {times_high}] when the {title} doubles.",
    ),
    Rule(
        lambda f: max(-f.slope_low, f.slope_high) <= KEPT_SLOPE,
        "Keep the rate: doubling the {title} multiplies the best one by {times_low} to {times_high}.",
    ),
    Rule(
        _otherwise,
        "Whether the best rate moves is open: twice the {title} has {times_low} to {times_high} times it.",
    ),
)
"""The rules for the sentence on the rate at another level."""

WIDER = (0.5, 1.0)
"""The distances in decades of the rates by which a grid is widened."""
MOST_LEVELS = 6
"""The number of levels from which on no further level is advised."""

TRANSFER_STEPS = (
    NOT_ENDED,
    Rule(
        lambda f: "best at" in f.left_out,
        "A best rate is at an end of its grid; a wider grid shows the optimum.",
        command="{wider}",
    ),
    Rule(
        lambda f: f.seeds < 10 and (f.outcome == "undecided" or math.isnan(f.slope_low)),
        "More seeds narrow the intervals.",
        command="{more}",
    ),
    Rule(
        lambda f: f.next_rate,
        "Try {title} {next_level}: the best rate there is about {next_rate}.",
        command="{next}",
    ),
    Rule(_otherwise, ""),
)
"""The rules for the next step of a study of transfer."""


def _transfer(results: Results) -> Iterator[Verdict]:
    settings = results.study.settings
    for row in results.transfer.to_dict("records"):
        low, high = sorted(2 ** row[f"slope_{end}"] for end in ("low", "high"))
        seeds = row["seeds"]
        facts = row | {
            "missing": results.missing,
            "margin": points(settings.margin, sign=False),
            "lost": points_estimate(row, "worst"),
            "times": f"{2 ** row['slope']:.2f}",
            "times_low": f"{low:.2f}",
            "times_high": f"{high:.2f}",
            "command": results.study.command,
            "more": results.study.again("--seeds", str(max(5, 2 * seeds))),
            "wider": _wider(results, row["panel"]),
        }
        rule, text = decide(CARRIES_RULES, facts)
        slope = decide(SLOPE_RULES, facts)[1]
        if not math.isnan(row["slope"]):
            slope += f" Slope {formatting.estimate(row, 'slope', 2)}"
            if not math.isnan(row["known_slope"]):
                slope += f"; published {row['known_slope']:+.2f} ({row['known_source']})"
            slope += "."
        edge = f"Left out: {row['left_out']}." if row["left_out"] else ""
        facts |= _next_level(results, row)
        step, command = decide_step(TRANSFER_STEPS, facts | {"outcome": rule.outcome})
        yield Verdict(
            CARRIES.format(title=row["title"]),
            rule.outcome,
            _join(slope, text, edge),
            f"{row['panel']}: {row['curve']}; {row['title']} {row['levels']}; {count(seeds, 'seed')}; rates "
            f"chosen by validation {settings.by}; margin {facts['margin']} points; jackknife intervals.",
            step,
            command,
            row["curve"],
            row["panel"],
        )


def grid_words(rates: Iterable[float], more: Iterable[float] = ()) -> list[str]:
    """Return the option with the rates of a grid and some more."""
    return ["--learning-rates", *(f"{each:.12g}" for each in sorted({*rates, *more}))]


def _wider(results: Results, panel: str) -> str:
    """Return the command that adds rates beyond the ends at which levels have their best rate.

    It names all rates of all levels, so that the grid has no gap where the grid of one level was widened.
    """
    levels = results.transfer_levels[results.transfer_levels["panel"] == panel]
    rates = {each for own in levels["rates"] for each in own}
    ends = {"lowest": (min, -1), "highest": (max, 1)}
    more = {
        round_rate(end(own) * 10 ** (sign * far))
        for word, (end, sign) in ends.items()
        for own in levels.loc[levels["left_out"].str.contains(word), "rates"]
        for far in WIDER
    }
    tasks = results.panels.set_index("panel")["task"]
    words = results.study.option_of(tasks[panel]) if tasks.nunique() > 1 else ()
    return results.study.again(*words, *grid_words(rates, more))


def _next_level(results: Results, row: Facts) -> Facts:
    """Return the facts on a level at twice the highest one: its best rate, and the command that trains it.

    The rate is the best one of the highest level times 2 to the power of the slope. Its interval has the
    errors of both. There are no such facts without a slope, without a number for a level, and for a study
    that has `MOST_LEVELS`.
    """
    found = results.transfer_levels
    own = found[(found["panel"] == row["panel"]) & (found["curve"] == row["curve"])].dropna(subset="position")
    facts = {"next_level": "", "next_rate": "", "next": ""}
    has_number = row["factor"] != MODEL and not math.isnan(row["slope_low"])
    if not has_number or row["left_out"] or len(own) >= MOST_LEVELS:
        return facts
    last = own.sort_values("position").iloc[-1]
    moved, error = math.log10(2) * row["slope"], math.log10(2) * (row["slope_high"] - row["slope"])
    half = math.hypot(math.log10(last["best_rate_high"] / last["best_rate"]), error)
    low, best, high = (rate(last["best_rate"] * 10 ** (moved + d)) for d in (-half, 0.0, half))
    level = f"{2 * last['position']:g}"
    words = ("--levels", *row["levels"].split(", "), level)
    return {
        "next_level": level,
        "next_rate": f"{best} [{low}, {high}]",
        "next": results.study.again(*words),
    }


# -- searches


def _searches(results: Results) -> Iterator[Verdict]:
    step = decide_step(SEARCH_STEPS, {"missing": results.missing, "command": results.study.command})
    for panel in results.panels.to_dict("records"):
        rows = _rows(results.best, panel["panel"])
        found = "; ".join(_best_point(row) for row in rows if not math.isnan(row["learning_rate"]))
        fewest, most = (end(row["points"] for row in rows) for end in (min, max))
        tried = f"{_range_text(fewest, most)} point{'' if most == 1 else 's'} each"
        yield Verdict(
            "The search has found a best point for each variant.",
            "descriptive",
            f"Best by validation score: {found}." if found else "No point has a score yet.",
            f"{panel['panel']}: {count(len(rows), 'variant')}, {tried}, one seed a point; "
            f"{panel['metric'].replace('_', ' ')}. The best of many single runs scores too high.",
            *step,
            panel["task"],
            panel["panel"],
        )


def _best_point(row: Facts) -> str:
    if row["nothing_learned"]:
        return f"{row['curve']} has learnt nothing"
    scores = f"{number(row['validation_score'])} (test {number(row['test_score'])})"
    return f"{row['curve']} {scores} at {row['settings']}"
