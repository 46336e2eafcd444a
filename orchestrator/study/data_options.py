"""The options for data of the user's own, in place of a task."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.study import bounds
from orchestrator.util.errors import UsageError, suggest_nearest

ROLES = ("prompt", "completion", "messages", "text", "text1", "text2", "label", "image", "split")
"""The roles of columns in --columns ROLE=COLUMN."""
METRICS = (
    "exact_match", "numeric", "token_f1",
    "accuracy", "f1", "macro_f1", "matthews",
    "pearson", "loss",
)  # fmt: skip
"""The values of --metric."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data of your own in place of a task: docs/own_data.md."""

    data: tuple[str, ...] | None = None
    """Data to fine-tune on, in place of --task: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of
    images with one subfolder per class, a folder with train, validation and test files, or a dataset of the
    hub (organization/name, organization/name:subset). With several, every variant is trained on each."""
    validation_data: str | None = None
    """File or folder with the validation rows. Default: a validation split in the data, else rows of the
    training data, chosen by a hash of their content."""
    test_data: str | None = None
    """File or folder with the test rows. Default: as for --validation-data."""
    columns: tuple[str, ...] = ()
    """Columns by their role, ROLE=COLUMN each, e.g. `text=body label=folder`. Roles: prompt completion
    messages text text1 text2 label image split. Default: found by the usual names."""
    template: str | None = None
    r"""Prompt of a row, with columns in braces and \n for a new line: `Question: {question}\nAnswer:`."""
    metric: str | None = None
    """Score of the answers: exact_match, numeric (the last number or formula of a generated text) or token_f1
    for prompts; accuracy, f1, macro_f1 or matthews for labels; pearson for numbers as labels; or loss, which
    is reported as inverse_perplexity, exp(-loss): higher is better. Default: accuracy, exact_match, or loss
    for long answers."""
    max_new_tokens: int | None = None
    """Longest generated answer in tokens, for numeric and token_f1. Default: by the longest answer."""

    def check_data(self) -> None:
        """Check the options of this group.

        Raises:
            UsageError: One of them is empty, malformed or unknown, or does not go with another.
        """
        if self.data is not None and not all(self.data or ("",)):
            raise UsageError("--data is empty; name a file, or leave it out.")
        for option, value in self._details().items():
            if value in (None, ()):
                continue
            if self.data is None:
                raise UsageError(f"{option} is for data of your own; add --data FILE, or leave it out.")
            if value == "":
                raise UsageError(f"{option} is empty; give a value, or leave it out.")
            if option.endswith("-data") and len(self.data) > 1:
                raise UsageError(f"{option} {value}: there are {len(self.data)} --data; give one of them.")
        if self.metric is not None and self.metric not in METRICS:
            raise UsageError(f"--metric {self.metric!r} is not one. {suggest_nearest(self.metric, METRICS)}")
        bounds.check_bound("--max-new-tokens", self.max_new_tokens, bounds.MAX_LENGTH)
        self.parse_columns()
        if self.template is not None:
            parse_template(self.template)

    def _details(self) -> dict[str, str | int | tuple[str, ...] | None]:
        return {
            "--validation-data": self.validation_data,
            "--test-data": self.test_data,
            "--columns": self.columns,
            "--template": self.template,
            "--metric": self.metric,
            "--max-new-tokens": self.max_new_tokens,
        }

    def parse_columns(self) -> Mapping[str, str]:
        """Return the columns of --columns by their role.

        Raises:
            UsageError: A word is not ROLE=COLUMN, or a role is unknown or named twice.
        """
        found: dict[str, str] = {}
        for word in self.columns:
            role, equals, column = word.partition("=")
            if not equals or not column:
                raise UsageError(f"--columns {word!r}: must be ROLE=COLUMN, for example text=body.")
            if role not in ROLES:
                raise UsageError(f"--columns {word!r}: no role {role!r}. {suggest_nearest(role, ROLES)}")
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
