"""Verdicts of a sensitivity study on claim 1, and its warnings, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analyze.factors.factor_results import FactorEffect, FactorStudy, TaskFactors, VariantFactors
from orchestrator.analyze.factors.rate_claim import Contrast, seeds_to_support
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.verdict import Verdict, VerdictOutcome
from orchestrator.record.study_file import StudyFile

CLAIM = "The learning rate matters more than any other hyperparameter."


def factor_verdicts(found: FactorStudy, study: StudyFile, missing: bool = False) -> list[Verdict]:
    """Return one verdict for each task and base model.

    Args:
        found: The results.
        study: The study, which makes the command of the next step.
        missing: True if configurations of the study have not ended. The claim is then not supported, because
            it is about all factors of the study.
    """
    return [_verdict(task, found.margin, study, missing) for task in found.tasks]


def _verdict(task: TaskFactors, margin: float, study: StudyFile, missing: bool) -> Verdict:
    outcome = _outcome(task)
    if missing and outcome == "supported":
        outcome = "undecided"
    sentences = (
        _cost_sentence(task),
        _count_sentence(task),
        _closest_sentence(task),
        _alias_sentence(task),
    )
    step, seeds = _next_step(task, margin) if outcome == "undecided" else ("", None)
    next_command = study.again("--seeds", str(seeds)) if seeds else ""
    if missing:
        step, next_command = "Some configurations have not ended; the same command continues.", study.command
    return Verdict(
        claim=CLAIM,
        outcome=outcome,
        answer=" ".join(filter(None, sentences)),
        design=_design_sentence(task, margin),
        next_step=step,
        next_command=next_command,
        scope=task.task,
    )


def _outcome(task: TaskFactors) -> VerdictOutcome:
    """Return the outcome over all variants that count.

    The claim is refuted if it fails for so many variants that the others are fewer than required.
    """
    if task.num_judged and task.num_supported >= task.num_required:
        return "supported"
    return "refuted" if task.num_refuted > task.num_judged - task.num_required else "undecided"


def _judged(task: TaskFactors) -> list[VariantFactors]:
    """Return the variants that count for the claim."""
    return [each for each in task.variants if each.variant not in task.uncounted]


def _comparisons(
    variants: Sequence[VariantFactors],
) -> list[tuple[VariantFactors, FactorEffect, Contrast]]:
    """Return the contrasts of A and of B with every factor outside the alias group."""
    return [
        (variant, factor, contrast)
        for variant in variants
        for factor in variant.factors
        if not factor.alias
        for contrast in (factor.misset_contrast, factor.retuned_contrast)
        if contrast is not None
    ]


def _cost_sentence(task: TaskFactors) -> str:
    """Return the sentence on A of the learning rate and the largest A of a factor; empty without factors."""
    judged = _judged(task)
    rates = [loss for each in judged if (loss := _mean(each.rate.misset)) is not None]
    others = [
        (loss, factor.title, each.variant)
        for each in judged
        for factor in each.factors
        if not factor.alias and (loss := _mean(factor.misset)) is not None
    ]
    if not rates or not others:
        return ""
    low, high = number(min(rates)), number(max(rates))
    loss, title, variant = max(others)
    cost = low if low == high else f"{low} to {high}"
    aliases = ", ".join(dict.fromkeys(f.title for each in judged for f in each.factors if f.alias))
    return (
        f"On {task.task} the learning rate, set blindly, costs {cost} points, and any other hyperparameter"
        f"{f' but {aliases}' if aliases else ''} at most {number(loss)} ({title} for {variant})."
    )


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean


def _count_sentence(task: TaskFactors) -> str:
    """Return the sentence on the variants for which the claim holds, fails or is undecided."""
    judged = _judged(task)
    if not any(f for each in judged for f in each.factors if not f.alias):
        return f"On {task.task} no factor but the learning rate has been measured yet."
    named = {
        word: [each.variant for each in judged if each.claim.outcome == outcome]
        for outcome, word in (
            ("supported", "holds for"),
            ("refuted", "fails for"),
            ("undecided", "is undecided for"),
            ("undecided (range)", "changes with the range of the rate for"),
        )
    }
    groups = " and ".join(f"{word} {', '.join(own)}" for word, own in named.items() if own)
    far = [each.variant for each in judged if each.claim.outcome == "supported" and each.far_more]
    whom = "all" if len(far) == len(judged) else ", ".join(far)
    more = f"; for {whom} the rate costs more than three times what any other factor does" if far else ""
    return (
        f"The claim {groups}{more}. With an error of 5 % for all variants together it is shown for at least "
        f"{task.num_supported} of {task.num_judged}; {task.num_required} are needed."
    )


def _closest_sentence(task: TaskFactors) -> str:
    """Return the sentence on the comparison with the smallest lower limit; empty if there is no limit."""
    limits = [
        (contrast.lower, variant, factor)
        for variant, factor, contrast in _comparisons(_judged(task))
        if contrast.lower is not None
    ]
    if not limits:
        return ""
    _, variant, factor = min(limits, key=lambda each: each[0])
    rate = variant.rate
    return (
        f"The closest case is {factor.title} for {variant.variant}: set blindly, the learning rate "
        f"costs {points(rate.misset)} points and {factor.title} {points(factor.misset)} (difference at least "
        f"{_limit(factor.misset_contrast)}); with the other one of the two tuned again, "
        f"{points(factor.rate_retuned)} and {points(factor.retuned)} (at least "
        f"{_limit(factor.retuned_contrast)})."
    )


def _alias_sentence(task: TaskFactors) -> str:
    """Return the sentence on one factor of the alias group; empty if none was measured."""
    # Alpha is preferred to a factor of one variant, such as LoRA+'s ratio.
    found = min(
        ((v, f) for v in _judged(task) for f in v.factors if f.alias),
        key=lambda each: "." in each[1].name,
        default=None,
    )
    if found is None:
        return ""
    variant, factor = found
    return (
        f"{factor.title[0].upper()}{factor.title[1:]} acts as a learning rate and is counted with it: for "
        f"{variant.variant} {points(factor.misset)} points blindly, "
        f"{points(factor.retuned)} with the rate tuned again."
    )


def _design_sentence(task: TaskFactors, margin: float) -> str:
    """Return the conditions under which the verdict holds, in one line."""
    titles = list(dict.fromkeys(f.title for each in task.variants for f in each.factors))
    seeds = sorted({each.seeds for each in task.variants})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{task.task} on {task.model}; variants {', '.join(each.variant for each in task.variants)}; "
        f"learning rate against {', '.join(titles) or 'nothing'}; {count} seeds; "
        f"margin {number(margin)} points; one-sided 95 % limits, "
        "at half, the measured and double range of the rate."
    )


def _next_step(task: TaskFactors, margin: float) -> tuple[str, int | None]:
    """Return the next step towards a decision.

    Args:
        task: The results of an undecided task.
        margin: Smallest difference of the score that matters.

    Returns:
        A sentence, and the number of seeds to train; None if more seeds may not decide the claim.
    """
    open_variants = [v for v in _judged(task) if v.claim.outcome != "supported"]
    by_range = [v.variant for v in open_variants if v.claim.outcome == "undecided (range)"]
    if by_range:
        return (
            f"For {', '.join(by_range)} the answer depends on how well the rate is known beforehand, which "
            "no further run can settle.",
            None,
        )
    contrasts = [contrast for _, _, contrast in _comparisons(open_variants)]
    if not contrasts:
        return "The levels of the factors have not been trained yet; the same command continues.", None
    have = max(contrast.seeds for contrast in contrasts)
    if have < 2:
        return "Five seeds give intervals.", 5
    if lacking := _without_interval(open_variants):
        return f"There is no interval for {', '.join(lacking)}: fewer than two seeds have every score.", None
    needed = [seeds_to_support(contrast, margin) for contrast in contrasts]
    if None in needed:
        return (
            "The learning rate and the closest factor cost about the same; more seeds may not decide it.",
            None,
        )
    seeds = max([have + 1, *(n for n in needed if n is not None)])
    return f"About {seeds} seeds decide it if the differences and their spread stay as they are.", seeds


def _without_interval(variants: Sequence[VariantFactors]) -> list[str]:
    """Return "factor (variant)" for each factor with fewer than two seeds that have all scores."""
    return [
        f"{factor.title} ({variant.variant})"
        for variant in variants
        for factor in variant.factors
        if not factor.alias and factor.misset_contrast is not None and factor.misset_contrast.seeds < 2
    ]


def points(estimate: Estimate | None) -> str:
    """Format a loss with its interval in points (0.01 of a score), for example 44.5 [43.0, 46.0]."""
    if estimate is None or estimate.mean is None:
        return "-"
    if estimate.interval is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} [{number(estimate.interval.low)}, {number(estimate.interval.high)}]"


def number(value: float | None) -> str:
    """Format a difference of scores in points with one decimal; "-" for None."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def _limit(contrast: Contrast | None) -> str:
    return "-" if contrast is None else number(contrast.lower)


def factor_warnings(study: FactorStudy, missing: bool = False) -> Sequence[str]:
    """Return the limitations of the results, one sentence each.

    Args:
        study: The results.
        missing: True if configurations of the study have not ended.
    """
    found = []
    if missing:
        found.append(
            "configurations have not ended, so factors and levels may be missing, and the claim cannot be "
            "supported yet."
        )
    for task in study.tasks:
        for v in task.variants:
            where = f"{v.variant} on {task.task}"
            if v.best_at_edge:
                found.append(f"{where}: the best learning rate lies on the edge of its curve; widen it.")
            edges = [f"{f.title} {', '.join(f.edge_levels)}" for f in v.factors if f.edge_levels]
            if edges:
                found.append(
                    f"{where}: the best of the rates tried again is the first or last for {'; '.join(edges)}"
                    ": the re-tuned loss there is an upper bound."
                )
            if v.num_outside:
                found.append(
                    f"{where}: {v.num_outside} runs differ from the default in more than one factor and "
                    "enter no figure."
                )
            if v.missing:
                found.append(f"{where}: without {', '.join(v.missing)} (not trained, or it has none).")
    return found
