"""Does a program written by a model pass its tests? Found out in a sandbox.

**Walls** (`sandbox/isolation.py`; one test tries to break out of each): own namespaces of users, mounts,
processes, network, IPC and host name; user `nobody`, without capabilities and without a way to new ones;
no network at all, not even loopback or a hypervisor's; a root that shows the interpreter, its packages and
/usr for reading,
and an empty /tmp of limited size that goes with it; an environment of six fixed variables; limits on wall
clock, CPU, memory, processes, file size, files; output goes nowhere. When its first process ends, or this
one kills it, the kernel ends all that is in it. Where a machine lets no such walls be made `passes` refuses
in one line (`level()`), unless ORCHESTRATOR_WEAK_SANDBOX=1.

**A fake pass does not count.** The tests run in a process of another sandbox, which alone can speak the
verdict; the two share one socket. The program is asked for what its functions return, gets arguments, never
what is expected, and answers in plain values that are compared elsewhere (`sandbox/rpc.py`). So printing
"passed", ending early with exit code 0, overriding assert, check or isclose, tracing, reading frames or
memory, killing its parent, writing result files, or returning an object that is equal to everything gains
nothing. What it raises cannot end a loop of the tests. SystemExit, an exhausted stack and an early end are
never taken for an exception that a test expects: the program has failed then, even where a test catches
everything. The solutions in the package of an installed benchmark are hidden.

**What remains** (docs/grading.md has the whole list). It can answer rightly by other means than the intended
ones (a table of known answers); that is beyond any test. Arguments and answers are copies: the tests see
neither what a function does to its arguments in place nor whether it returns one of them. (If they saw
it, a function could make its arguments fit its answer.) Objects of classes of its own are equal to no plain
value and cannot call the tests' functions. The kernel is shared: a hole in it is a hole in this sandbox; the
system calls that no program needs are refused (`sandbox/seccomp.py`), the others are not. Memory is limited for
each process: `processes` times `memory` at worst, and the machine's out-of-memory killer takes these
processes first. A name that the tests use, and that neither they nor Python define, is the program's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from orchestrator.finetune.grading.program_text import (
    human_eval_program,
    join_tests,
    mbpp_program,
    split_tests,
)
from orchestrator.finetune.grading.sandbox.run import (
    KILLED,
    TIMED_OUT,
    ProgramLimits,
    ProgramResult,
    run,
    sandbox_level,
)

__all__ = [
    "ProgramLimits",
    "ProgramResult",
    "grade_program",
    "grade_programs",
    "human_eval_program",
    "join_tests",
    "mbpp_program",
    "sandbox_level",
]


def grade_program(program: str, limits: ProgramLimits = ProgramLimits()) -> ProgramResult:  # noqa: B008 (frozen)
    """The verdict on one program with its tests (`human_eval_program`, `mbpp_program`, `with_tests`). Raises
    BadInput where no sandbox can be made, Trouble when one could not be made this time; neither says
    anything of the program."""
    return run(*split_tests(program), limits)


def grade_programs(
    programs: Sequence[str],
    workers: int | None = None,
    limits: ProgramLimits = ProgramLimits(),  # noqa: B008 (frozen)
) -> list[ProgramResult]:
    """Return the verdicts in order.

    A program that starts many processes takes time and memory from those that run beside it. So one that
    exceeded the wall-clock limit, or was killed by something other than its CPU limit, is judged again alone.

    Args:
        programs: Programs with their tests, as `with_tests` joins them.
        workers: How many run at once; by default as many as this process has cores.
        limits: The limits of each program.
    """
    sandbox_level()  # once, before there are threads that would all ask
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(lambda program: grade_program(program, limits), programs))
    return [
        grade_program(program, limits) if verdict.reason in (KILLED, TIMED_OUT) else verdict
        for program, verdict in zip(programs, verdicts, strict=True)
    ]
