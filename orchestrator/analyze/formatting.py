"""Numbers and answers as people read them; used by the table, the plots and the report."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence

from orchestrator.analyze.intervals import CurveStatistic, Estimate
from orchestrator.analyze.results import Curve, Panel

FEW_SEEDS_CAVEAT = "Descriptive: rates chosen on few seeds; a verdict needs fresh seeds."


def rate(value: float | None) -> str:
    """A learning rate in short, 3e-4; three digits at most, for reading (`exact` is for commands)."""
    if value is None:
        return "-"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def exact_rate(value: float) -> str:
    """A learning rate that reads back as the very same number."""
    return rate(value) if float(rate(value)) == value else repr(value)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with fixed digits; never "-0.000"; a dash if there is none."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def estimate(value: Estimate, digits: int = 3) -> str:
    """0.967 ±0.052, or without the interval where one seed gives none."""
    if value.mean is None or value.interval is None:
        return number(value.mean, digits)
    return f"{number(value.mean, digits)} ±{number((value.interval.high - value.interval.low) / 2, digits)}"


def figure(value: CurveStatistic | None, digits: int = 2) -> str:
    """0.42, ≥0.42 for a bound, a dash if unknown."""
    return "-" if value is None else f"{'≥' if value.at_least else ''}{number(value.value, digits)}"


def interval(value: Estimate | CurveStatistic | None, digits: int = 3) -> str:
    """[0.915, 1.019], empty where there is none."""
    if value is None or value.interval is None:
        return ""
    return f"[{number(value.interval.low, digits)}, {number(value.interval.high, digits)}]"


def varied_text(varied: Mapping[str, object]) -> str:
    """What tells a panel from its neighbours: "rank=8, steps_horizon=60"."""
    return ", ".join(f"{k}={v}" for k, v in varied.items())


def panel_title(panel: Panel) -> str:
    more = varied_text(panel.varied)
    return f"{panel.task} on {panel.model}" + (f" ({more})" if more else "")


def best_rate_text(curve: Curve) -> str:
    if curve.best_rate is None:
        return "no score yet"
    if curve.bracketed == "both edges":
        return "flat"
    return f"best at {rate(curve.best_rate)}" + ("" if curve.bracketed == "yes" else " (edge)")


def answer(panel: Panel) -> str:
    """The study's question answered in two sentences from the numbers alone, and how far to trust them."""
    scored = [c for c in panel.curves if c.best_rate is not None]
    # One that scores the same at both ends of the grid, as a head behind its own rate, has no best rate.
    peaked = [c for c in scored if c.bracketed != "both edges"]
    ranked = sorted((c.best_rate, c.label) for c in peaked if c.best_rate is not None)
    if not scored:
        return f"No learning rate of {panel_title(panel)} has a score yet."
    if not ranked:
        return f"No variant of {panel_title(panel)} scores better inside the grid than at its ends. {FEW_SEEDS_CAVEAT}"
    if len(ranked) == 1:
        text = f"The best rate of {ranked[0][1]} is {rate(ranked[0][0])}."
        return f"{text} {FEW_SEEDS_CAVEAT}"
    low, high = ranked[0], ranked[-1]
    decades = math.log10(high[0] / low[0])
    if decades < 0.005:
        text = f"All {len(ranked)} variants are best at one rate, {rate(low[0])}."
    else:
        edges = "" if all(c.bracketed == "yes" for c in peaked) else " at least"
        text = (
            f"The best rates of {len(ranked)} variants lie{edges} {decades:.1f} decades apart "
            f"({low[1]} {rate(low[0])}, {high[1]} {rate(high[0])})."
        )
    common, own = panel.spread_at_common, panel.spread_at_best
    if common is not None and own is not None and panel.common_rate is not None:
        # Where early stopping has ended runs, some have no score at a rate that is not their own.
        few = common.variants < len(scored)
        whose = (
            f"the test scores of {common.variants} of {len(scored)} variants" if few else "their test scores"
        )
        text += (
            f" At {panel.common_name} ({rate(panel.common_rate)}) {whose} span "
            f"{number(common.size, 2)} ({common.worst} {number(common.low, 2)} to {common.best} "
            f"{number(common.high, 2)}); each at its own best rate, {number(own.size, 2)}."
        )
    return f"{text} {FEW_SEEDS_CAVEAT}"


# Columns of a record that a study's command has an option for.
_OPTION_OF_COLUMN = {
    "rank": "--rank",
    "alpha": "--alpha",
    "dropout": "--dropout",
    "base_dropout": "--base-dropout",
    "steps_horizon": "--steps",
    "head_learning_rate": "--head-learning-rate",
    "task": "--task",
    "model": "--model",
}
# A script of two stages keeps its choice and refuses to choose among fewer; the plain one trains any part.
_TWO_STAGE_OPTIONS = ("--confirm-seeds", "--margin")


def narrow_command(command: str, variant: str, rates: Sequence[float], varied: Mapping[str, object]) -> str:
    """The study's command cut down to one variant and some rates (and a panel's own rank, steps, ...)."""
    options = {"--variants": [variant], "--learning-rates": [exact_rate(r) for r in rates]}
    options |= {
        _OPTION_OF_COLUMN[k]: [str(v)] for k, v in varied.items() if k in _OPTION_OF_COLUMN and v is not None
    }
    words: list[str] = []
    dropping = False
    for word in shlex.split(command):
        if word.startswith("--"):
            dropping = word.split("=")[0] in (*options, *_TWO_STAGE_OPTIONS)
        if not dropping:
            words.append(re.sub(r"(tuned_comparison|early_stopping)\.py$", "lr_sensitivity.py", word))
    return shlex.join([*words, *(w for name, values in options.items() for w in (name, *values))])


def redact_secrets(text: str) -> str:
    """A URI or command without the user and password that a tracking URI may carry."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", text)
