"""Formatting of numbers, answers and commands for the table, the plots and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from orchestrator.analyze.intervals import CurveStatistic, Estimate
from orchestrator.analyze.number_format import rate as rate
from orchestrator.analyze.panels import Value
from orchestrator.analyze.results import Curve, Panel
from orchestrator.record.show import replace_options
from orchestrator.util import redaction

FEW_SEEDS_CAVEAT = "Descriptive: rates chosen on few seeds; a verdict needs fresh seeds."


def exact_rate(value: float) -> str:
    """Format a learning rate so that it reads back as the same number."""
    return rate(value) if float(rate(value)) == value else repr(value)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of digits, never as "-0.000"; "-" for None."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def estimate(value: Estimate, digits: int = 3) -> str:
    """Format an estimate with half of its interval's width, 0.967 ±0.052, or without an interval, 0.967."""
    if value.mean is None or value.interval is None:
        return number(value.mean, digits)
    return f"{number(value.mean, digits)} ±{number((value.interval.high - value.interval.low) / 2, digits)}"


def figure(value: CurveStatistic | None, digits: int = 2) -> str:
    """Format a statistic: 0.42, or ≥0.42 for a lower bound; "-" for None."""
    return "-" if value is None else f"{'≥' if value.is_lower_bound else ''}{number(value.value, digits)}"


def interval(value: Estimate | CurveStatistic | None, digits: int = 3) -> str:
    """Format an interval, [0.915, 1.019]; empty if there is none."""
    if value is None or value.interval is None:
        return ""
    return f"[{number(value.interval.low, digits)}, {number(value.interval.high, digits)}]"


def panel_title(panel: Panel) -> str:
    """Return task, model and the columns in which the panel differs from the other panels."""
    more = ", ".join(f"{k}={v}" for k, v in panel.varied.items())
    return f"{panel.task} on {panel.model}" + (f" ({more})" if more else "")


def best_rate_text(curve: Curve) -> str:
    """Return the best rate and whether the grid brackets it."""
    if curve.best_rate is None:
        return "no score yet"
    if curve.bracketed == "both edges":
        return "flat"
    return f"best at {rate(curve.best_rate)}" + ("" if curve.bracketed == "yes" else " (edge)")


def answer(panel: Panel) -> str:
    """Return the answer to a study's question in two sentences, with a caveat."""
    scored = [c for c in panel.curves if c.best_rate is not None]
    # A variant that scores the same at both ends of the grid has no best rate, for example a head with a
    # learning rate of its own.
    peaked = [c for c in scored if c.bracketed != "both edges"]
    ranked = sorted((c.best_rate, c.label) for c in peaked if c.best_rate is not None)
    if not scored:
        return f"No learning rate of {panel_title(panel)} has a score yet."
    if not ranked:
        title = panel_title(panel)
        return f"No variant of {title} scores better inside the grid than at its ends. {FEW_SEEDS_CAVEAT}"
    if len(ranked) == 1:
        text = f"The best rate of {ranked[0][1]} is {rate(ranked[0][0])}."
        return f"{text} {FEW_SEEDS_CAVEAT}"
    low, high = ranked[0], ranked[-1]
    decades = math.log10(high[0] / low[0])
    if decades < 0.005:
        text = f"All {len(ranked)} variants are best at one rate, {rate(low[0])}."
    else:
        edges = "" if all(c.bracketed == "yes" for c in peaked) else " at least"
        ends = f"({low[1]} {rate(low[0])}, {high[1]} {rate(high[0])})"
        text = f"The best rates of {len(ranked)} variants lie{edges} {decades:.1f} decades apart {ends}."
    common, own = panel.spread_at_common, panel.spread_at_best
    if common is not None and own is not None and panel.common_rate is not None:
        # Early stopping leaves some variants without a score at a rate that is not their best.
        whose = "their test scores"
        if common.variants < len(scored):
            whose = f"the test scores of {common.variants} of {len(scored)} variants"
        where = f"At {panel.common_rate_label} ({rate(panel.common_rate)})"
        ends = f"({common.worst} {number(common.low, 2)} to {common.best} {number(common.high, 2)})"
        spans = f"{number(common.size, 2)} {ends}; each at its own best rate, {number(own.size, 2)}"
        text += f" {where} {whose} span {spans}."
    return f"{text} {FEW_SEEDS_CAVEAT}"


def settings_text(settings: Mapping[str, Value]) -> str:
    """Format the settings in which a variant's points differ, for example "3e-3, rank 8"."""
    return ", ".join(
        rate(v)
        if k == "learning_rate" and isinstance(v, float)
        else f"{k.removeprefix('variant_')} {f'{v:.3g}' if isinstance(v, float) else v}"
        for k, v in settings.items()
    )


# The option of a study's command that sets a column of its records.
_OPTION_OF_COLUMN = {
    **{name: f"--{name}" for name in ("rank", "alpha", "dropout", "task", "model")},
    "base_dropout": "--base-dropout",
    "head_learning_rate": "--head-learning-rate",
    "steps_horizon": "--steps",
}


def narrow_command(command: str, variant: str, rates: Sequence[float], varied: Mapping[str, object]) -> str:
    """Narrow a study's command to one variant and some learning rates.

    Args:
        command: The command of the study.
        variant: The variant to train.
        rates: The learning rates to train it at.
        varied: Other columns of the configurations and their values; those without an option are ignored.
    """
    values = {"--variants": [variant], "--learning-rates": [exact_rate(r) for r in rates]}
    for column, option in _OPTION_OF_COLUMN.items():
        if varied.get(column) is not None:
            values[option] = [str(varied[column])]
    return replace_options(command, values)


def redact_secrets(text: str) -> str:
    """Remove secrets from a text, and the user from every URI in it."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", redaction.redact_secrets(text))
