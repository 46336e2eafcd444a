"""The verdicts on claims 2 and 3 and the warnings of a replicated tuning, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.analyze.formatting import percent, points, points_interval, rate
from orchestrator.analyze.intervals import Interval
from orchestrator.analyze.tuned.tuned_results import (
    FixedRateComparison,
    FixedRateRow,
    TaskComparison,
    TunedComparison,
    VariantRow,
)
from orchestrator.analyze.tuned.tuned_text import shown_name
from orchestrator.analyze.tuned.variant_tunings import outlying_differences
from orchestrator.analyze.verdict import Verdict, VerdictOutcome
from orchestrator.record.study_file import StudyFile

FIXED_RATE_CLAIM = "At one fixed learning rate the winner is an artefact of the rate."
OUTCOME_ORDER = ("better", "worse", "equivalent", "not inferior", "undecided")


def tuned_verdicts(found: TunedComparison, study: StudyFile) -> list[Verdict]:
    """Return the verdicts of a replicated tuning, the most important first.

    Args:
        found: The comparison.
        study: The study, from whose command the next command is made.
    """
    verdicts = [_over_tasks(found)] if len(found.tasks) > 1 else []
    verdicts += [_tuned_verdict(task, study) for task in found.tasks]
    shared = [task for task in found.tasks if task.fixed_rate is not None]
    if len(shared) == 1:
        (task,) = shared
        assert task.fixed_rate is not None
        verdicts.append(fixed_rate_verdict(task.fixed_rate, task.baseline, task.task, _design(task)))
    elif shared:
        verdicts.append(_fixed_rate_over_tasks(found))
    return verdicts


def _claim(task: TaskComparison) -> str:
    return f"Tuned {shown_name(task.baseline)} matches or beats most variants."


def _tuned_verdict(task: TaskComparison, study: StudyFile) -> Verdict:
    step, command = next_step(task, study)
    return Verdict(
        claim=_claim(task),
        outcome=task.outcome,
        answer=" ".join(filter(None, (_count_sentence(task), _outcome_sentence(task), _span_sentence(task)))),
        design=_design(task),
        next_step=step,
        next_command=command,
        scope=task.task,
    )


def _count_sentence(task: TaskComparison) -> str:
    """Return the sentence on the number of variants that the baseline matches or beats."""
    if not task.counted:
        return f"On {task.task} there is no variant that the claim counts."
    needed = task.counted // 2 + 1
    text = (
        f"On {task.task} it holds for at least {task.holds_at_least} of {task.counted} variants "
        f"({needed} needed)"
    )
    if task.beaten_at_least:
        verb = "is" if task.beaten_at_least == 1 else "are"
        text += f"; at least {task.beaten_at_least} {verb} better by more than the margin"
    return f"{text}."


def _outcome_sentence(task: TaskComparison) -> str:
    """Return the sentence that lists the variants by outcome, with differences and intervals in points."""
    counted = [row for row in task.rows if row.role == "variant"]
    groups = []
    for outcome in OUTCOME_ORDER:
        own = [_row_phrase(row) for row in counted if row.outcome == outcome]
        if own:
            groups.append(f"{outcome}: {', '.join(own)}")
    if not groups:
        return ""
    where = "" if task.has_question_noise else f" on these {task.test_items} test items"
    difference = f"Difference from tuned {shown_name(task.baseline)} in points{where}"
    return f"{difference}: {'; '.join(groups)}."


def _row_phrase(row: VariantRow) -> str:
    parts = [row.variant, *([points(row.difference)] if row.difference is not None else [])]
    parts += [points_interval(row.interval)] if row.interval is not None else [f"({row.reason})"]
    return " ".join(parts)


def _span_sentence(task: TaskComparison) -> str:
    if task.span is None or task.expected_span is None:
        return ""
    span, noise = (f"{round(100 * value, 1):.1f}" for value in (task.span, task.expected_span))
    return f"The mean scores span {span} points; equal variants would span {noise} by noise alone."


def _design(task: TaskComparison) -> str:
    names = ", ".join(row.variant for row in task.rows)
    look = f", look {len(task.looks)}" if len(task.looks) > 1 else ""
    plan = f" of at most {task.planned} planned" if task.planned != task.replicates else ""
    return (
        f"{task.title}, {task.steps} steps: {names}; each tuned on validation over {task.points} points in "
        f"{task.replicates} replicates{plan}{look}, the test score of the chosen run counts; margin "
        f"{round(100 * task.margin, 1):g} points, simultaneous {percent(1 - task.alpha)} intervals."
    )


def next_step(task: TaskComparison, study: StudyFile) -> tuple[str, str]:
    """Return the sentence and the command of the next step.

    Both are empty if claim 2 is decided or no comparison is open. The command alone is empty if no command is
    known to decide the open comparisons.
    """
    if task.missing:
        return "Some configurations have not ended; the same command continues.", study.command
    open_rows = [row for row in task.rows if row.role == "variant" and row.counts == "open"]
    if task.outcome != "undecided" or not open_rows:
        return "", ""
    if task.alpha <= 0:
        return "No error is left for another verdict in this study; a new study may plan more replicates.", ""
    without = [f"{row.variant} ({row.reason})" for row in open_rows if row.interval is None]
    if without:
        return f"There is no interval for {', '.join(without)}; more replicates may give one.", ""
    unresolved = [row.variant for row in open_rows if row.replicates_to_decide is None]
    if unresolved:
        names = ", ".join(unresolved)
        return (
            f"For {names} even 1,000 replicates may not decide; this needs a larger test split (--test-size) "
            "or a wider margin.",
            "",
        )
    replicates = max(row.replicates_to_decide or 0 for row in open_rows)
    if replicates <= task.replicates:  # The outcomes are decided, but the intervals contain the margin.
        names = ", ".join(row.variant for row in open_rows)
        return (
            f"The margin lies in the interval of {names}; the number of replicates that excludes it depends "
            "on the true difference.",
            "",
        )
    text = (
        f"At most {replicates} replicates decide every open comparison with probability 80 %, whatever the "
        "true differences are, if the spread stays."
    )
    options = ["--replicates", str(replicates)]
    if replicates > task.planned:
        text += f" That is beyond the {task.planned} planned ones, so it is a study of its own."
        options += ["--max-replicates", str(replicates), "--study", f"{study.name}-{replicates}"]
    return text, study.again(*options)


def _over_tasks(found: TunedComparison) -> Verdict:
    tasks, first = found.tasks, found.tasks[0]
    needed = len(tasks) // 2 + 1
    outcome: VerdictOutcome = "undecided"
    if found.tasks_supported_at_least >= needed:
        outcome = "supported"
    elif found.tasks_refuted_at_least >= needed:
        outcome = "refuted"
    each = ", ".join(f"{task.task} {task.outcome}" for task in tasks)
    holds = found.tasks_supported_at_least
    answer = f"It holds on at least {holds} of {len(tasks)} tasks ({needed} needed; {each})."
    return Verdict(
        claim=_claim(first),
        outcome=outcome,
        answer=answer,
        design=_design_over_tasks(found),
        scope=f"{len(tasks)} tasks",
    )


def _design_over_tasks(found: TunedComparison) -> str:
    tasks = found.tasks
    names = dict.fromkeys(row.variant for task in tasks for row in task.rows)
    counts = sorted({task.replicates for task in tasks})
    replicates = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{len(tasks)} tasks ({', '.join(task.title for task in tasks)}): {', '.join(names)}; {replicates} "
        f"replicates of each tuning; margin {round(100 * tasks[0].margin, 1):g} points."
    )


def fixed_rate_verdict(found: FixedRateComparison, baseline: str, task: str, design: str) -> Verdict:
    """Return the verdict on claim 3 for one task.

    Args:
        found: The comparison at fixed rates.
        baseline: The variant at whose rate the others are compared.
        task: The name of the task.
        design: The text for `Verdict.design`.
    """
    answer = (
        f"On {task}, {_change_phrase(found, baseline)}. {_regret_sentence(found.rows, baseline)} "
        f"{_winner_sentence(found)}"
    )
    return Verdict(FIXED_RATE_CLAIM, found.outcome, answer.rstrip(), design, scope=task)


def _winner_sentence(found: FixedRateComparison) -> str:
    """Return the sentence on the best variant at each rate; empty if no rate has a score."""
    if not found.winners:
        return "At each rate all variants have the same mean test score." if found.equal_rates else ""
    winners = ", ".join(f"{rate(w.learning_rate)} {w.winner}" for w in found.winners)
    where = {0: "", 1: "; at the other rate all are equal"}.get(
        found.equal_rates, f"; at the other {found.equal_rates} rates all are equal"
    )
    return f"Best mean test score at each rate: {winners}{where}."


def _fixed_rate_over_tasks(found: TunedComparison) -> Verdict:
    """Return the verdict on claim 3 over several tasks: their common outcome, or else "undecided"."""
    results = [(task, task.fixed_rate) for task in found.tasks if task.fixed_rate is not None]
    outcomes = {result.outcome for _, result in results}
    sentences = [
        f"On {task.task}, {_change_phrase(result, task.baseline)}; "
        f"{_largest_loss(result.rows, task.baseline)}."
        for task, result in results
    ]
    return Verdict(
        claim=FIXED_RATE_CLAIM,
        outcome=outcomes.pop() if len(outcomes) == 1 else "undecided",
        answer=" ".join(sentences),
        design=_design_over_tasks(found),
        scope=f"{len(results)} tasks",
    )


def _change_phrase(found: FixedRateComparison, baseline: str) -> str:
    """Return the clause on the variants whose order with the baseline is reversed."""
    name = shown_name(baseline)
    where = f"between {name}'s best rate and a variant's own best rate"
    flipped = [row.variant for row in found.rows if row.reversal]
    if flipped:
        return f"{where} the order with {name} changes for {', '.join(flipped)}"
    if found.outcome == "refuted":
        return f"{where} no variant changes its order with {name} by more than the margin"
    return f"{where} it stays open whether a variant changes its order with {name}"


def _largest_loss(rows: Sequence[FixedRateRow], baseline: str) -> str:
    losing = _losing(rows)
    where = f"at {shown_name(baseline)}'s best rate"
    if not losing:
        return f"{where} no variant loses against its own"
    row = losing[0]
    lost = " ".join([points(-row.regret), "points", *_negated(row.regret_interval)])
    return f"{where} {row.variant} loses most against its own: {lost}"


def _regret_sentence(rows: Sequence[FixedRateRow], baseline: str) -> str:
    losing = _losing(rows)
    where = f"At {shown_name(baseline)}'s best rate"
    if not losing:
        return f"{where} no variant loses against its own."
    lost = ", ".join(
        " ".join([row.variant, points(-row.regret), *_negated(row.regret_interval)]) for row in losing[:3]
    )
    return f"{where} the variants that lose most against their own are, in points: {lost}."


def _losing(rows: Sequence[FixedRateRow]) -> list[FixedRateRow]:
    """Return the variants that lose at least 0.1 points, as shown, at the baseline's best rate."""
    return [row for row in rows if round(100 * row.regret, 1) > 0]


def _negated(interval: Interval | None) -> list[str]:
    return [] if interval is None else [points_interval(Interval(-interval.high, -interval.low))]


def tuned_warnings(found: TunedComparison) -> list[str]:
    """Return the warnings on the comparison, one line each."""
    return [f"{task.title}: {warning}" for task in found.tasks for warning in _task_warnings(task)]


def _task_warnings(task: TaskComparison) -> Iterator[str]:
    if task.missing:
        yield "configurations have not ended, so this is not the planned look, and only whole tunings count."
    if task.alpha <= 0:
        yield (
            f"no error is left for a verdict at {task.replicates} replicates: the plan was at most "
            f"{task.planned}, with five looks."
        )
    edges = [
        f"{row.variant} {row.edge_choices} of {len(row.tunings)}"
        for row in task.rows
        if row.edge_choices > len(row.tunings) / 4
    ]
    if edges:
        yield f"the choice lies often at the edge of the tried values, widen them: {', '.join(edges)}."
    failed = {row.variant: sum(t.count_runs("failed") for t in row.tunings) for row in task.rows}
    if named := [f"{variant} {count}" for variant, count in failed.items() if count]:
        yield f"failed runs are missing, which narrows a tuning: {', '.join(named)}."
    skewed = [
        f"{row.variant} (replicate {replicate}: {points(difference)})"
        for row in task.rows[1:]
        for replicate, difference in outlying_differences(row, task.rows[0], task.margin).items()
    ]
    if skewed:
        yield (
            f"one replicate lies far from the others, in points: {', '.join(skewed)}. Rare low tunings are "
            "skewed noise, with which the intervals err more often than stated."
        )
    unverified = [row.variant for row in task.rows if row.role == "unverified"]
    if unverified:
        yield f"compared with no other implementation, so without a verdict: {', '.join(unverified)}."
    unusable = [
        f"{row.variant} {row.usable.usable} of {row.usable.n}"
        for row in task.rows
        if row.usable is not None and row.usable.usable < row.usable.n
    ]
    if unusable:
        yield f"chosen runs that neither diverged nor collapsed: {', '.join(unusable)}."
