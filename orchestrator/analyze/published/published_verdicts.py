"""Verdicts on the claims of the published study, from its own scores, for the terminal and the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from orchestrator.analyze.published.published_scores import REFERENCE, SEED_NOISE, PublishedTask
from orchestrator.analyze.verdict import Verdict
from orchestrator.util.graceful_interrupts import PROGRAM

SOURCE = "arXiv 2601.22708"


def published_verdicts(tasks: Sequence[PublishedTask]) -> tuple[Verdict, ...]:
    """Return the verdicts, that on the paper's main claim first.

    All are descriptive: a score from one seed has no interval, and the rates were selected by the reported
    test scores. No test of an own study uses them.

    Args:
        tasks: The tasks, at least one, with the same variants and the same assumed noise.
    """
    design = _design(tasks)
    return (
        Verdict(
            "Tuned LoRA matches or beats most variants.",
            "descriptive",
            _ranks(tasks),
            design,
            "Replicated tuning of the same protocol gives an interval:",
            f"{PROGRAM} tuned --config {tasks[0].table.config}",
        ),
        Verdict(
            "At one fixed learning rate the winner depends on the rate.",
            "descriptive",
            _winners(tasks),
            design,
        ),
        Verdict("The tuned variants differ by more than noise.", "descriptive", _spans(tasks), design),
        Verdict("The grid contains every optimum.", "descriptive", _edges(tasks), design),
        Verdict(
            "The learning rate matters more than other hyperparameters.",
            "descriptive",
            _range_over_rates(tasks),
            design,
            "This study varies the rate and other hyperparameters alike:",
            f"{PROGRAM} sensitivity",
        ),
    )


def _design(tasks: Sequence[PublishedTask]) -> str:
    grids = ", ".join(f"{task.table.title} {len(task.table.rates)} rates" for task in tasks)
    scores = sum(task.table.scores.size for task in tasks)
    return (
        f"{SOURCE}: {len(tasks[0].variants)} variants, {grids}; {scores} scores, one seed each, rates chosen "
        "on the test set."
    )


def _ranks(tasks: Sequence[PublishedTask]) -> str:
    ranks = [
        f"{_ordinal(own.rank)}{f' (tied with {_join(own.tied_with)})' if own.tied_with else ''} of "
        f"{len(task.variants)} on {task.table.title}"
        for task in tasks
        for own in [task.reference]
    ]
    repeats = []
    for number, noise in enumerate(tasks[0].noise):
        places = [task.noise[number].reference_ranks for task in tasks]
        repeats.append(f"{_join([f'{low} to {high}' for low, high in places])} at {_points(noise.noise)}")
    return (
        f"With every variant at its best rate, {REFERENCE} ranks {_join(ranks)}. Nine of ten repeats of the "
        f"study with other seeds would rank it {'; '.join(repeats)} of noise (one standard deviation, "
        "assumed); ranks of variants that are about equal are noise."
    )


def _winners(tasks: Sequence[PublishedTask]) -> str:
    parts = []
    for task in tasks:
        names = {name for each in task.winners for name in each.winners}
        parts.append(f"{len(names)} variants on {task.table.title}")
    losses = [
        each.loss_at_reference_rate for task in tasks for each in task.variants if each.variant != REFERENCE
    ]
    return (
        f"Over the grid of rates the best variant is one of {_join(parts)}. Trained at {REFERENCE}'s best "
        f"rate instead of its own, a variant loses {statistics.median(losses):.1f} points in the median and "
        f"up to {max(losses):.1f}."
    )


def _spans(tasks: Sequence[PublishedTask]) -> str:
    count = len(tasks[0].variants)
    spans = _join([f"{task.span:.2f} ({task.table.title})" for task in tasks])
    halves = _join([f"{task.top_half_span:.2f}" for task in tasks])
    text = f"The best scores of {count} variants span {spans} points; those of the better half {halves}."
    for number, noise in enumerate(tasks[0].noise):
        every = [task.table.title for task in tasks if task.span > task.noise[number].equal_span_high]
        half = [t.table.title for t in tasks if t.top_half_span > t.noise[number].equal_top_half_high]
        source = f" ({SEED_NOISE[noise.noise]})" if noise.noise in SEED_NOISE else ""
        text += (
            f" With noise of {_points(noise.noise)}{source} {count} equal variants span "
            f"{noise.equal_span:.1f} points, in one of twenty studies more than {noise.equal_span_high:.1f}, "
            f"and their better half {noise.equal_top_half_span:.1f} and {noise.equal_top_half_high:.1f}: all "
            f"variants differ by more than noise on {_join(every) if every else 'no task'}, the better half "
            f"on {_join(half) if half else 'no task'}."
        )
    return text


def _edges(tasks: Sequence[PublishedTask]) -> str:
    parts = [
        f"{task.table.title}: {', '.join(names)}"
        for task in tasks
        if (names := [each.variant for each in task.variants if each.at_edge])
    ]
    if not parts:
        return "Every variant is best inside the grid."
    return (
        f"Not for all. Best at an end of the grid, so perhaps better beyond it, are {'; '.join(parts)}. "
        "The other variants are best inside the grid."
    )


def _range_over_rates(tasks: Sequence[PublishedTask]) -> str:
    parts = [
        f"{statistics.median(each.range_over_rates for each in task.variants):.0f} on {task.table.title}"
        for task in tasks
    ]
    return (
        f"Between its best and its worst rate a variant's score changes by {_join(parts)} points (median "
        "over variants). The paper varied other hyperparameters one at a time at the fixed rate 5e-5, on "
        "GSM8K, as lines in a figure without numbers; so these scores cannot compare them."
    )


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 <= number % 100 <= 20 else endings.get(number % 10, 'th')}"


def _join(words: Sequence[str]) -> str:
    """Join words, at least one, with commas and a last "and"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
