r"""Grading of numbers and formulas in free text: GSM8K, MATH, MetaMathQA.

This module finds the answer in a text (`extract_answer`); math-verify decides whether two answers are equal.
Units are ignored, since GSM8K's references have none: "72", "72 apples", "$72.00" and "72%" are equal, and so
are 1/2, 0.5 and \frac12.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any

MAX_EXPRESSION_LENGTH = 200
"""The longest formula in characters. Of a longer one only a number in it is taken."""

MAX_TEXT_LENGTH, MAX_STATEMENTS = 4000, 8
"""The numbers of characters at the end of a text, and of statements in them, that are examined. They limit
the time for a text that repeats itself."""

MAX_POWER = 12
"""The largest product of the exponents of bracketed groups, such as (x + 1)^3, in a text with letters or
roots."""

_ARITHMETIC = re.compile(r"\\(?:[dt]?frac|cdot|times|left|right|displaystyle)(?![a-z])")
_STATED = re.compile(
    r"####"
    r"|\b(?:answer|result|solution)\b[^.\n:=#]{0,60}?(?:\bis\b(?:\s+equal\s+to\b)?|:|=)[:\s]*"
    r"|\b(?:answer|result)\s*[:=]\s*",
    re.IGNORECASE,
)
_FRACTION = r"\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)"
_SIMPLE_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))")
_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!)\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-\u2212\u2013]\s?)?(?:\\?[$\u20ac\u00a3\u00a5]\s?)?(?P<inner>-)?"
    rf"(?P<body>(?:{_DIGITS}\s*)?{_FRACTION}"
    rf"|{_DIGITS}\s+\d+\s?/\s?\d+"
    rf"|{_DIGITS}(?:\.\d+)?\s?/\s?{_DIGITS}(?:\.\d+)?"
    rf"|{_DIGITS}(?:\.\d+)?(?:[eE][-+]?\d+)?"
    rf"|\.\d+)"
)
_RANGE = re.compile(
    rf"^\D*\bbetween\s+[-$]*{_DIGITS}[^,;:\d]*\s+and\s+[-$]*{_DIGITS}[^,;:\d]*[,;:]", re.IGNORECASE
)
"""The part of a statement that is ignored if a number follows: in "between 10 and 20, so 15" the answer is
15."""
_NEXT_QUESTION = re.compile(r"^[#* \t]*(?:question|problem|q)\b[ \d*]*[:.]", re.IGNORECASE | re.MULTILINE)
_WITH_UNIT = re.compile(
    r"(\$?\s*[-\d.,]+)\s*(?:sq\.? |square |cubic )?(?:[a-zA-Z]{2,}| m)\s*\^\s*\{?[23]\}?\s*\$?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def grade(answer: str, reference: str) -> float:
    """Return 1.0 if the final answer of a text equals that of the reference, else 0.0.

    Args:
        answer: The generated text.
        reference: A value, or a worked solution that ends in "#### 72" or "The answer is: 72".
    """
    expected, actual = extract_answer(reference), extract_answer(answer)
    return float(bool(expected and actual) and _are_equal(expected, actual))


def extract_answer(text: str) -> str:
    r"""Return the answer in a text: a number or an expression, empty if there is none.

    The answer is the value in the last \boxed{...} or after the last "####" or "answer is", whichever comes
    later. Without such a value, the answer is the text itself if it is a formula, else its last number.
    If a model states an answer and then adds a question of its own, the text from the question on is ignored.

    Args:
        text: The text.
    """
    text = text.strip()
    for question in islice(_NEXT_QUESTION.finditer(text), MAX_STATEMENTS):
        if value := _extract_stated(text[: question.start()][-MAX_TEXT_LENGTH:]):
            return value
    text = text[-MAX_TEXT_LENGTH:]
    return _extract_stated(text) or _extract_value(text, first=False)


def _extract_stated(text: str) -> str:
    """Return the value of the last statement or box of a text; empty if there is none."""
    spans = boxes = _find_boxes(text)
    for match in list(_STATED.finditer(text))[-MAX_STATEMENTS:]:
        spans = [*spans, (match.end(), text[match.end() :].lstrip().partition("\n")[0])]
    for start, span in sorted(spans, reverse=True):
        if any(box < start < box + len(inner) for box, inner in boxes):
            continue  # a statement or a box inside a box
        boxed = next((inner for _, inner in _find_boxes(span)), None)
        value = _extract_value(span if boxed is None else boxed, first=True)
        if value:
            return value
    return ""


def _find_boxes(text: str) -> list[tuple[int, str]]:
    r"""Return (position, content) of the last \boxed{...} expressions."""
    found = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))[-MAX_STATEMENTS:]:
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append((match.start(), text[match.end() : end - 1 if not depth else end]))
    return found


def _extract_value(span: str, first: bool) -> str:
    """Return the expression or number in a span: the whole span if it is one, else its first or last number.

    Args:
        span: A part of a text.
        first: True to take the first number, and of an equation only the right-hand side; False to take the
            last number.
    """
    bare = _strip_markup(span)
    choices, _, rest = bare.rpartition("namely")
    if len(_NUMBER.findall(choices)) < 2:  # "4 pens, namely 3 red ones" is no choice
        rest = _RANGE.sub("", bare)
    if first and _NUMBER.search(rest):
        bare = _strip_markup(rest)
    if "=" in bare and first:
        bare = _strip_markup(bare.rsplit("=", 1)[1])
    if unit := _WITH_UNIT.fullmatch(bare):
        bare = unit.group(1)
    if _is_expression(bare):
        return bare
    numbers = list(_NUMBER.finditer(bare))
    if not numbers:
        return ""
    number = numbers[0] if first else numbers[-1]
    return _format_number(number, bare[number.end() :])


def _strip_markup(span: str) -> str:
    """Remove what LaTeX and Markdown put around a value."""
    span = re.sub(r"\\(?:text|mathrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1", span)
    span = re.sub(r"\\[()\[\]]|\*\*|__|`|\\(?:left|right|displaystyle)(?![a-z])", "", span)
    span = span.replace("\\%", "%").replace("\\$", "$").replace("^\\circ", "")
    span = re.sub(r"(?<!\\)\\ ", " ", span)
    return span.strip().strip("*~ ").rstrip(".,;:!?").strip()


def _is_expression(text: str) -> bool:
    """Return whether a text is a formula as in MATH (roots, powers, tuples, letters) and no single number."""
    text = text.strip("$ ")
    if not text or len(text) > MAX_EXPRESSION_LENGTH or _NUMBER.fullmatch(text):
        return False
    if re.search(
        r"\\(?:sqrt|pi|infty|cup|pm|begin|theta|cdot|times|alpha|log|sin|cos|tan)(?![a-z])|[\^_]", text
    ):
        return True
    return bool(re.fullmatch(r"[\s\da-zA-Z+\-*/().,\[\]{}]*", text)) and not re.search(
        r"[a-zA-Z]{2}|\d\s+\D\s*$", text
    )


def _format_number(match: re.Match[str], rest: str) -> str:
    """Return a number without separators, multiplied by the scale that follows it ("3 million")."""
    body = re.sub(r",(?=\d{3})|\{,\}|\\[,!]", "", match.group("body")).strip()
    negative = bool(match.group("sign")) != bool(match.group("inner"))
    word = re.match(r"\s*([a-z]*)", rest, re.IGNORECASE)
    scale = _SCALES.get(word[1].lower()) if word else None
    value = _parse_fraction(body) if scale else None
    if scale and value is not None:
        body = str(value * scale)
    return ("-" if negative else "") + body


def _are_equal(expected: str, actual: str) -> bool:
    if expected == actual:
        return True
    if not (_is_cheap_to_evaluate(expected) and _is_cheap_to_evaluate(actual)):
        return False
    import sympy
    from math_verify import verify

    # math-verify's time limits are alarms, which only the main thread can set, and a worker of Ray is another
    # thread. Instead, `_is_cheap_to_evaluate` excludes everything that takes long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected_values, actual_values = _parse(expected), _parse(actual)
    if _parse_fraction(expected) is not None and any(
        isinstance(value, sympy.Expr) and value.free_symbols for value in actual_values
    ):
        return False  # a formula with variables is no number, even if they cancel
    return bool(verify(expected_values, actual_values, timeout_seconds=None))


def _is_cheap_to_evaluate(text: str) -> bool:
    """Return whether an expression is small enough to be evaluated.

    Excluded are long texts, powers in exponents, large exponents and factorials, and high powers of a group
    in a text with letters or roots, which sympy would expand.
    """
    text = text.replace("**", "^")
    if len(text) > MAX_EXPRESSION_LENGTH or re.search(r"\d{4,}\s*!|[!)}]\s*!", text):
        return False
    is_expanded = re.search("[a-zA-Z]", _ARITHMETIC.sub("", text)) is not None
    size = height = 1
    for match in re.finditer(r"\^\s*", text):
        exponent = _exponent_group(text, match.end())
        power = max([1, *map(int, re.findall(r"\d+", exponent))])
        size *= power
        height *= power if text[: match.start()].rstrip()[-1:] in (")", "}", "]") else 1
        if "^" in exponent or "!" in exponent or text[match.end() + len(exponent) :].lstrip().startswith("^"):
            return False
        if is_expanded and height > MAX_POWER:
            return False
        if size > 100_000 or len(re.findall(r"\d+", exponent)) > 2:
            return False
    return True


def _exponent_group(text: str, start: int) -> str:
    """Return the group in brackets, or the word, that starts at a position."""
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(text[end], 0)
        if depth <= 0 and (end + 1 == len(text) or not text[end + 1].isalnum()):
            return text[start : end + 1]
    return text[start:]


@lru_cache(maxsize=1024)
def _parse(text: str) -> Any:
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    number = _parse_fraction(text)
    if number is not None:
        return [sympy.Rational(number.numerator, number.denominator)]
    settings = [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(f"${text.strip('$ ')}$", settings, parsing_timeout=None)


def _parse_fraction(text: str) -> Fraction | None:
    """Parse a number, a fraction or a mixed number (math-verify reads 3 1/2 as 3/2); None for other texts."""
    text = _SIMPLE_FRACTION.sub(r" \1\2/\3\4", text)
    parts = re.fullmatch(
        r"(-?)(?:(\d+)\s+)?(-?[\d.]+(?:[eE][-+]?\d{1,3})?)(?:\s?/\s?(-?[\d.]+))?", text.strip()
    )
    if not parts:
        return None
    try:
        value = Fraction(parts[2] or 0) + Fraction(parts[3]) / Fraction(parts[4] or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if parts[1] else value
