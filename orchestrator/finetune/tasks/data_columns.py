"""The columns of a user's data by role (prompt, answer, text, label): named, or found by usual names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.study.data_options import parse_template
from orchestrator.util.errors import UsageError, suggest_nearest

Form = Literal["chat", "pair", "image", "classification", "generation"]
"""What a row consists of.

- chat: messages, of which the last one is the answer
- pair: two texts and a label
- image: an image and a label
- classification: a text and a label
- generation: a prompt and a completion
"""

ROLES_OF_FORM: Mapping[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "pair": ("text1", "text2", "label"),
    "image": ("image", "label"),
    "classification": ("text", "label"),
    "generation": ("prompt", "completion"),
}
"""The roles that each form needs. The first form whose columns are there is taken."""
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "image": ("image", "img", "image_path", "file_name"),
    "text": ("text", "sentence", "content", "review", "document"),
    "label": ("label", "labels", "class", "category"),
    "prompt": ("prompt", "question", "instruction", "query", "input", "source", "problem"),
    "completion": ("completion", "answer", "output", "response", "target", "solution"),
    "split": ("split",),
}
"""The names by which a role is found if --columns does not name it, the most usual first."""
USUAL_PAIRS = (
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("query", "passage"),
)
"""The names of two texts."""


@dataclass(frozen=True)
class ColumnMap:
    """The form of the rows, and the column of each role."""

    form: Form
    columns: Mapping[str, str]
    template: str | None = None
    context: str | None = None
    """Alpaca's column `input`, which follows `instruction` in the prompt where it is not empty."""


def find_columns(
    present: Sequence[str], named: Mapping[str, str], template: str | None, source: str
) -> ColumnMap:
    """Find the column of each role.

    Args:
        present: The columns of the data.
        named: The columns of --columns by their role.
        template: The template of the prompt; it replaces the column of the prompt or text.
        source: The name of the data, for error messages.

    Raises:
        UsageError: A named column or a placeholder does not exist, or the columns fit no form.
    """
    for role, column in named.items():
        if column not in present:
            hint = suggest_nearest(column, present)
            raise UsageError(f"--columns {role}={column}: {source} has no column {column!r}. {hint}")
    for column in parse_template(template) if template else ():
        if column not in present:
            hint = suggest_nearest(column, present)
            raise UsageError(f"--template {{{column}}}: {source} has no column {column!r}. {hint}")
    found = _find_roles(present, named)
    if template:
        if both := [role for role in named if role not in ("completion", "label", "split")]:
            raise UsageError(
                f"--columns {both[0]}={named[both[0]]} and --template both make the prompt; take one of the "
                "two away."
            )
        found = {role: c for role, c in found.items() if role in ("completion", "label", "split")}
        found |= {"prompt": "", "text": ""}  # the template makes them
        forms: tuple[Form, ...] = ("generation", "classification")
        if "label" in named:
            forms = forms[::-1]
    else:
        forms = tuple(form for form in ROLES_OF_FORM if set(named) - {"split"} <= set(ROLES_OF_FORM[form]))
    for form in forms:
        if all(role in found for role in ROLES_OF_FORM[form]):
            roles = {role: found[role] for role in (*ROLES_OF_FORM[form], "split") if found.get(role)}
            is_alpaca = roles.get("prompt") == "instruction" and "input" in present and "input" not in roles
            return ColumnMap(form, roles, template, "input" if is_alpaca else None)
    raise _no_form_error(present, named, template, source)


def _find_roles(present: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    by_lower = {column.lower(): column for column in reversed(present)}
    found = dict(named)
    for role, names in USUAL_NAMES.items():
        usual = next((by_lower[name] for name in names if name in by_lower), None)
        if usual is not None and usual not in found.values():
            found.setdefault(role, usual)
    pair = next((pair for pair in USUAL_PAIRS if all(name in by_lower for name in pair)), None)
    if pair is not None and not {"text1", "text2", "text"} & set(named):
        found |= {"text1": by_lower[pair[0]], "text2": by_lower[pair[1]]}
    return found


def _no_form_error(
    present: Sequence[str], named: Mapping[str, str], template: str | None, source: str
) -> UsageError:
    shown = ", ".join(present) or "no columns"
    if template:
        needs = "beside the --template a column completion (or answer, output, ...) or label"
        example = "completion"
    else:
        needs = "prompt and completion, messages, text and label, text1, text2 and label, or image and label"
        example = "text"
    usual = [name for names in USUAL_NAMES.values() for name in names]
    for column in present:
        near = difflib.get_close_matches(column.lower(), usual, n=1, cutoff=0.75)
        if near and column.lower() not in usual:
            role = next(role for role, names in USUAL_NAMES.items() if near[0] in names)
            hint = f"is {column!r} the {role}? Then add --columns {role}={column}"
            break
    else:
        hint = f"name them, for example --columns {example}={present[0] if present else 'body'}"
    also = f" with {', '.join(named)} named" if named else ""
    return UsageError(f"{source} has {shown}{also}; needs {needs}: {hint}.")
