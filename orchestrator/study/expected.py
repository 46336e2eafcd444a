"""The answer key of a study: published numbers with which its report compares what it measures.

The file of --config has them under `expected`, one mapping each:

    expected:
    - {quantity: score, variant: lora, rate: 2e-4, value: 0.66, tolerance: 0.012, source: arXiv 2602.04998}
    - {quantity: table, file: scores.csv, task: gsm8k, tolerance: 0.03, source: arXiv 2601.22708}

A table stands for the scores in a CSV file; its entries are made when the file is read.
"""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BeforeValidator, Field

from orchestrator.study.levels import LinkName
from orchestrator.study.option import broken_rule
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest
from variants.variant_settings import canonical_name

Quantity = Literal["score", "best_score", "best_rate", "order", "collapse", "ratio", "slope"]
_NEEDS: dict[str, tuple[str, ...]] = {
    "score": ("variant", "rate", "value", "tolerance", "source"),
    "best_score": ("variant", "value", "tolerance", "source"),
    "best_rate": ("variant", "value", "tolerance", "source"),
    "order": ("variant", "source"),
    "collapse": ("variant", "rate", "source"),
    "ratio": ("variant", "over", "value", "tolerance", "source"),
    "slope": ("variant", "factor", "value", "tolerance", "source"),
    "table": ("file", "task", "tolerance", "source"),
}
"""Quantity -> the keys that its entry must have."""
_MORE = {"order": ("tolerance",), "slope": ("link",), "table": ("within",)}
"""Quantity -> the keys that its entry may have."""
_Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """A published number, and how far from it a study may measure."""

    quantity: Quantity
    """What is measured:

    - score: the mean test score of `variant` at `rate`. Over several tasks, the mean over the tasks.
    - best_score, best_rate: the test score at the variant's best rate, and that rate.
    - order: `variant` names several, as in `lora > pissa`, in the order of their best rates, highest first.
      Without a tolerance, equal best rates do not test it.
    - collapse: whether more than half of the variant's runs at `rate` diverge or collapse.
    - ratio: the best rate of `variant` over that of `over`.
    - slope: the slope of log10 of the best rate of `variant` over log10 of `factor`, in a study of transfer
      with `link`.
    """
    variant: str
    source: str
    """Where the number was published, and where it was read."""
    value: _Finite | None = None
    tolerance: Annotated[_Finite, Field(ge=0)] = 0.0
    """The largest distance at which the number counts as reproduced: of a score in its own unit (0 to 1), of
    a slope in decades a decade, of all others in decades of the learning rate."""
    rate: Annotated[_Finite, Field(gt=0)] | None = None
    over: str = ""
    factor: str = ""
    link: LinkName = "none"
    untested: str = ""
    """Why the number does not apply to the study; empty if it does."""

    def __post_init__(self) -> None:
        names = [canonical_name(name.strip()) for name in self.variant.split(">")]
        object.__setattr__(self, "variant", " > ".join(names))
        object.__setattr__(self, "over", canonical_name(self.over) if self.over else "")

    def to_entry(self) -> dict[str, Any]:
        """Return the entry in a file: the values that differ from the defaults."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, usual) in values.items() if usual is MISSING or value != usual}


_convert = pydantic.TypeAdapter(Expectation).validate_python
_convert_within = pydantic.TypeAdapter(Annotated[_Finite, Field(ge=0)]).validate_python


def read_entry(entry: object, folder: Path = Path()) -> list[Expectation]:
    """Return the published numbers of an entry: one, or those of a table.

    Args:
        entry: A mapping, or its YAML text.
        folder: The folder of the file that has the entry; the path of a table starts there.

    Raises:
        UsageError: The entry has a wrong key or value, or its table cannot be read.
    """
    if isinstance(entry, Expectation):
        return [entry]
    if isinstance(entry, str):
        with suppress(yaml.YAMLError):  # such a text is refused below
            entry = yaml.safe_load(entry) or entry  # an error quotes an empty text as it is
    if not isinstance(entry, Mapping):
        example = "{quantity: best_rate, variant: lora, value: 2e-4, tolerance: 0.25, source: ...}"
        raise UsageError(f"expected: {quote_value(str(entry))}: must be a mapping, such as {example}.")
    quantity = str(entry.get("quantity", ""))
    if quantity not in _NEEDS:
        rule = f"must be one of {', '.join(_NEEDS)}. {suggest_nearest(quantity, _NEEDS, ' ')}".strip()
        raise UsageError(f"expected: quantity {quote_value(quantity)}: {rule}")
    allowed = ("quantity", *_NEEDS[quantity], *_MORE.get(quantity, ()), "untested")
    for key in entry:
        if key not in allowed:
            near = suggest_nearest(str(key), allowed, f"Take one of {', '.join(allowed)}.")
            raise UsageError(f"expected: {quote_value(str(key))} is no key of a {quantity}. {near}")
    if lacking := [key for key in _NEEDS[quantity] if entry.get(key) in (None, "")]:
        raise UsageError(f"expected: a {quantity} needs {', '.join(lacking)}; add it to the entry.")
    return _read_table(entry, folder) if quantity == "table" else [_checked(entry)]


def _checked(entry: Mapping[str, Any]) -> Expectation:
    """Make an expectation of an entry that has the right keys.

    Raises:
        UsageError: A value has a wrong type or breaks a bound.
    """
    try:
        found: Expectation = _convert(entry)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        given = f"{first['loc'][0]} {quote_value(str(first['input']))}"
        raise UsageError(f"expected: {given}: {broken_rule(first)}.") from None
    if found.quantity in ("best_rate", "ratio") and found.value is not None and found.value <= 0:
        raise UsageError(f"expected: value {found.value:g} of a {found.quantity}: must be above 0.")
    if found.quantity == "order" and ">" not in found.variant:
        raise UsageError(
            f"expected: an order of {quote_value(found.variant)}: name two, as in `lora > pissa`."
        )
    return found


def _read_entry_of_one(entry: object) -> Expectation:
    try:
        found = read_entry(entry)
    except UsageError as error:
        raise UsageError(f"--{error}") from None
    if len(found) != 1:
        raise UsageError("--expected: a table must be in the file of --config; name its scores one by one.")
    return found[0]


Expected = tuple[Annotated[Expectation, BeforeValidator(_read_entry_of_one)], ...]
"""The answer key of a study, as an option."""


def _read_table(entry: Mapping[str, Any], folder: Path) -> list[Expectation]:
    """Return the best score and the best rate of each variant in a table, and the scores of its cells.

    The CSV file has the columns task, variant, learning_rate and score in points (0 to 100). A file
    variants.toml beside it may translate names of variants. `within` leaves out cells whose score is farther
    below the variant's best one: where a curve is steep, a small difference of the protocol changes the score
    much. A best rate may be one rate of the table away.
    """
    path, task = folder / str(entry["file"]), str(entry["task"])
    common = {
        "tolerance": entry["tolerance"],
        "source": entry["source"],
        "untested": entry.get("untested", ""),
    }
    given = entry.get("within", 1)
    try:
        within = _convert_within(given)
    except pydantic.ValidationError as error:
        rule = broken_rule(error.errors()[0])
        raise UsageError(f"expected: within {quote_value(str(given))}: {rule}.") from None
    curves: dict[str, dict[float, float]] = {}
    try:
        translation = path.with_name("variants.toml")
        names = tomllib.loads(translation.read_text()) if translation.exists() else {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["task"] == task:
                    curve = curves.setdefault(names.get(row["variant"], row["variant"]), {})
                    rate, points = float(row["learning_rate"]), float(row["score"])
                    if not (rate > 0 and math.isfinite(rate + points)):
                        raise ValueError(f"learning rate {rate:g}, score {points:g} of {row['variant']}")
                    curve[rate] = round(points / 100, 6)
    except (OSError, KeyError, ValueError, TypeError) as error:  # TypeError: a row is too short
        rule = "must be a CSV file with the columns task, variant, learning_rate (above 0), score"
        raise UsageError(f"expected: file {quote_value(str(path))}: {rule} ({error}).") from None
    if not curves:
        raise UsageError(f"expected: task {quote_value(task)}: {path.name} has no score of it; take another.")
    found = []
    for variant, curve in curves.items():
        best, (center, reach) = max(curve.values()), _best_rates(curve)
        found += [{"quantity": "best_score", "variant": variant, "value": best}]
        found += [{"quantity": "best_rate", "variant": variant, "value": center, "tolerance": reach}]
        cells = {rate: score for rate, score in sorted(curve.items()) if score >= best - within}
        score = {"quantity": "score", "variant": variant}
        found += [{**score, "rate": rate, "value": value} for rate, value in cells.items()]
    return [_checked(common | each) for each in found]


def _best_rates(curve: Mapping[float, float]) -> tuple[float, float]:
    """Return the middle of the rates with the best score, and the decades to one rate of the table beyond."""
    rates, best = sorted(curve), max(curve.values())
    logs = [math.log10(rate) for rate in rates]
    ties = [place for place, rate in enumerate(rates) if curve[rate] == best]
    first, last = ties[0], ties[-1]
    center = (logs[first] + logs[last]) / 2
    ends = logs[max(first - 1, 0)], logs[min(last + 1, len(logs) - 1)]
    return float(f"{10**center:.4g}"), round(max(center - ends[0], ends[1] - center), 3)


def describe(expected: tuple[Expectation, ...]) -> str:
    """Return the number of published numbers of each kind, for a plan."""
    counts = {name: sum(each.quantity == name for each in expected) for name in get_args(Quantity)}
    shown = [f"{n} {name.replace('_', ' ')}{'s' * (n > 1)}" for name, n in counts.items() if n]
    untested = dict.fromkeys(each.untested for each in expected if each.untested)
    why = f"; not tested: {'; '.join(untested)}" if untested else ""
    return f"{len(expected)} published numbers ({', '.join(shown)}){why}"
