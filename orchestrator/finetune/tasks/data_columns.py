"""The columns of a user's data by role (prompt, answer, text, label): named, or found by usual names."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
"""The usual names of the two texts of a pair, the most usual first."""


@dataclass(frozen=True)
class ColumnMap:
    """The form of the rows, and the column of each role.

    A role that the template makes, the prompt or the text, has no column.
    """

    form: Form
    columns: Mapping[str, str]
    """Role -> column, for the roles of the form and for `split`."""
    template: str | None = None
    context: str | None = None
    """The column `input` of Alpaca: where it is not empty, it follows `instruction` in the prompt."""


def find_columns(
    present: Sequence[str], named: Mapping[str, str], template: str | None, source: str
) -> ColumnMap:
    """Find the form of the rows and the column of each role.

    Args:
        present: The columns of the data.
        named: The columns of --columns by their role.
        template: The template of the prompt; it replaces the column of the prompt or text.
        source: The name of the data, for error messages.

    Raises:
        UsageError: A named column or a placeholder does not exist, a column has two roles, or the columns fit
            no form.
    """
    _check_named(present, named, template, source)
    found = _find_roles(present, named)
    asked = set(named) - {"split"}
    if template:
        found = {role: c for role, c in found.items() if role in ("completion", "label", "split")}
        found |= {"prompt": "", "text": ""}  # the template makes them
        forms: list[Form] = ["generation", "classification"]
    else:
        forms = list(ROLES_OF_FORM)
    forms = [form for form in forms if asked <= set(ROLES_OF_FORM[form])]
    form = next((form for form in forms if all(role in found for role in ROLES_OF_FORM[form])), None)
    if form is None:
        raise UsageError(_describe_misfit(present, named, template, source, forms, found))
    roles = {role: found[role] for role in (*ROLES_OF_FORM[form], "split") if found.get(role)}
    answer = roles.get("label", roles.get("completion"))
    if template and answer in parse_template(template):
        raise UsageError(f"--template {{{answer}}}: that column is the answer, which no prompt may contain.")
    by_lower = {column.lower(): column for column in reversed(present)}
    context = by_lower.get("input") if roles.get("prompt", "").lower() == "instruction" else None
    return ColumnMap(form, roles, template, None if context in roles.values() else context)


def _check_named(present: Sequence[str], named: Mapping[str, str], template: str | None, source: str) -> None:
    """Check that the columns of --columns and --template exist and have one role each; see `find_columns`."""
    role_of: dict[str, str] = {}
    for role, column in named.items():
        if column not in present:
            hint = suggest_nearest(column, present)
            raise UsageError(f"--columns {role}={column}: {source} has no column {column!r}. {hint}")
        if (other := role_of.setdefault(column, role)) != role:
            raise UsageError(f"--columns {other}={column} {role}={column}: a column has one role only.")
    for column in parse_template(template) if template else ():
        if column not in present:
            hint = suggest_nearest(column, present)
            raise UsageError(f"--template {{{column}}}: {source} has no column {column!r}. {hint}")
    both = [role for role in named if role not in ("completion", "label", "split")]
    if template and both:
        raise UsageError(
            f"--columns {both[0]}={named[both[0]]} and --template both make the prompt; take one of the "
            "two away."
        )


def _find_roles(present: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    """Return the columns by their role: those that are named, and others that have usual names."""
    by_lower = {column.lower(): column for column in reversed(present)}
    found = dict(named)
    for role, names in USUAL_NAMES.items():
        usual = [by_lower[name] for name in names if name in by_lower]
        usual = [column for column in usual if column not in found.values()]
        if usual:
            found.setdefault(role, usual[0])
    pair = next((pair for pair in USUAL_PAIRS if all(name in by_lower for name in pair)), None)
    if pair is not None and not {"text1", "text2", "text"} & set(named):
        found |= {"text1": by_lower[pair[0]], "text2": by_lower[pair[1]]}
    return found


def _describe_misfit(
    present: Sequence[str],
    named: Mapping[str, str],
    template: str | None,
    source: str,
    forms: Sequence[Form],
    found: Mapping[str, str],
) -> str:
    """Return the line for columns that fit no form.

    Args:
        present: The columns of the data.
        named: The columns of --columns by their role.
        template: The template of the prompt.
        source: The name of the data.
        forms: The forms that have all named roles.
        found: The columns by their role, named or found.
    """
    shown = ", ".join(present) or "no columns"
    also = f" with {', '.join(named)} named" if named else ""
    if template:
        needs = "beside the --template a column completion (or answer, output, ...) or label"
    else:
        needs = "prompt and completion, messages, text and label, text1, text2 and label, or image and label"
    text, label = [*map(shlex.quote, present), "COLUMN", "COLUMN"][:2]
    hint = f"name them, for example --columns text={text} label={label}"
    if not forms:
        hint = "no form has all of the named roles; take one of them away"
    else:
        needed = [ROLES_OF_FORM[form] for form in forms if len(ROLES_OF_FORM[form]) > 1]
        missing = [[role for role in roles if role not in found] for roles in needed]
        if last := [f"{roles[0]}=COLUMN" for roles in missing if len(roles) == 1]:
            hint = f"add --columns {' or '.join(last)}"
    return f"{source} has {shown}{also}; needs {needs}: {hint}."


def parse_columns(words: Sequence[str]) -> Mapping[str, str]:
    """Return the columns of --columns by their role.

    Raises:
        UsageError: A word is not ROLE=COLUMN, or a role is unknown or named twice.
    """
    roles = {role for own in ROLES_OF_FORM.values() for role in own} | {"split"}
    found: dict[str, str] = {}
    for word in words:
        role, equals, column = word.partition("=")
        if not equals or not column:
            raise UsageError(f"--columns {word!r}: must be ROLE=COLUMN, for example text=body.")
        if role not in roles:
            raise UsageError(f"--columns {word!r}: no role {role!r}. {suggest_nearest(role, roles)}")
        if role in found:
            raise UsageError(f"--columns {word!r}: {role} is {found[role]!r} already; name it once.")
        found[role] = column
    return found


def parse_template(template: str) -> tuple[str, ...]:
    """Return the columns that a template names in braces.

    Raises:
        UsageError: The braces do not match, or the template names no column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        problem = f"{error}; write {{{{ and }}}} for braces of the text"
        raise UsageError(f"--template {template!r}: {problem}.") from None
    names = tuple(name for _, name, _, _ in parts if name is not None)
    if not names:
        raise UsageError(f"--template {template!r}: names no column; for example 'Question: {{question}}'.")
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise UsageError(f"--template {template!r}: must have names of columns alone in braces.")
    return names


def fill_template(template: str, cells: Mapping[str, str]) -> str:
    r"""Return a template with `\n` and `\t` replaced by a line break and a tab, and columns by their cells.

    Args:
        template: The template.
        cells: The text of each column that it names.
    """
    filled = []
    for text, name, _, _ in string.Formatter().parse(template):
        filled.append(text.replace("\\n", "\n").replace("\\t", "\t"))
        filled.append("" if name is None else cells[name])
    return "".join(filled)
