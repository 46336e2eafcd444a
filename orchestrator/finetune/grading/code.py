"""Grading of programs that a model wrote: they are run in a sandbox and have to pass their tests.

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
of the kernel is one of the sandbox; system calls that no program needs are refused (`sandbox/seccomp.py`),
others are not. Memory is limited per process, to `processes` times `memory_bytes` in total at worst; the
out-of-memory killer of the machine ends these processes first. A name that the tests use, and that neither
they nor Python define, is taken from the program.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from orchestrator.finetune.grading.program_text import ProgramWithTests
from orchestrator.finetune.grading.sandbox.run import (
    KILLED,
    TIMED_OUT,
    ProgramLimits,
    ProgramResult,
    run,
    sandbox_level,
)


def grade_programs(
    programs: Sequence[ProgramWithTests],
    limits: ProgramLimits = ProgramLimits(),  # noqa: B008 (frozen)
) -> list[ProgramResult]:
    """Run programs with their tests, as many at once as there are cores; return the results in their order.

    A program that starts many processes takes time and memory from those that run beside it. Therefore a
    program that exceeded the limit of wall-clock time, or was killed for another reason than its CPU time, is
    run again alone.

    Args:
        programs: Programs with their tests, from `human_eval_program` or `mbpp_program`.
        limits: The resources that each program may use.

    Raises:
        UsageError: This machine does not allow a sandbox, or a program has no tests.
        StudyError: Isolation failed this time, which says nothing about the program.
    """
    sandbox_level()  # computed and cached here, so that the threads do not all compute it
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda each: run(each.program, each.tests, limits), programs))
    return [
        run(each.program, each.tests, limits) if result.reason in (KILLED, TIMED_OUT) else result
        for each, result in zip(programs, results, strict=True)
    ]
