"""The system calls that the sandbox refuses."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest

from orchestrator.finetune.grading.sandbox.run import ProgramLimits, run
from orchestrator.finetune.grading.sandbox.seccomp import REFUSED_SYSCALLS, syscall_number

WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
MACHINE = os.uname().machine
COLUMN = ("x86_64", "aarch64").index(MACHINE)
HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
"""The kernel's headers with the system call numbers of each architecture."""

REQUIRED = {
    *(
        "add_key",
        "request_key",
        "keyctl",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "io_uring_setup",
        "ptrace",
    ),
    *(
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_getfd",
        "kcmp",
        "kexec_load",
        "kexec_file_load",
        "mount",
    ),
    *("umount2", "pivot_root", "move_mount", "fsopen", "setns", "unshare", "open_by_handle_at", "syslog"),
    *("name_to_handle_at", "init_module", "finit_module", "memfd_create"),
}

PRELUDE = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return 0 if result >= 0 else ctypes.get_errno()
"""


def assert_in_sandbox(expression: str, body: str = "") -> None:
    """Assert that `expression` is true in the sandbox, after `PRELUDE` and `body` have run."""
    result = run(PRELUDE + body, f"assert {expression}", WIDE)
    assert result.passed, result.reason


def test_the_list_contains_the_calls_that_affect_more_than_the_program() -> None:
    assert set(REFUSED_SYSCALLS) >= REQUIRED


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_the_numbers_agree_with_the_kernels_headers(column: int) -> None:
    header = Path(HEADERS[column])
    if not header.is_file():
        pytest.skip(f"no {header} here")
    defined = re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())
    kernels = {name: int(number) for name, number in defined}
    refused = {name: numbers[column] for name, numbers in REFUSED_SYSCALLS.items() if numbers[column] >= 0}
    assert {name: kernels[name] for name in refused if name in kernels} == {
        name: number for name, number in refused.items() if name in kernels
    }
    assert {"keyctl", "bpf", "mount", "userfaultfd"} <= kernels.keys()


def test_each_call_is_refused_by_its_number() -> None:
    numbers = {name: number for name in REFUSED_SYSCALLS if (number := syscall_number(name)) >= 0}
    body = f"""
def allowed():
    got = {{name: call(number, *[-1] * 6) for name, number in {numbers!r}.items()}}
    return {{name: errno.errorcode.get(code, code) for name, code in got.items() if code != errno.EACCES}}
"""
    assert_in_sandbox("allowed() == {}, allowed()", body)


def test_no_way_of_making_a_process_gives_a_new_namespace() -> None:
    """A filter cannot read the flags of `clone3`, so it fails with ENOSYS and the C library uses `clone`."""
    clone, clone3 = ((56, 435), (220, 435))[COLUMN]
    flags = {
        "mount": 0x20000, "cgroup": 0x2000000, "host": 0x4000000, "ipc": 0x8000000,
        "user": 0x10000000, "pid": 0x20000000, "network": 0x40000000,
    }  # fmt: skip
    body = f"""
def clone(flag):
    code = call({clone}, flag | 17, 0, 0, 0, 0)
    return errno.errorcode.get(code, code)
def clone3():
    return errno.errorcode.get(call({clone3}, 0, 0))
"""
    expected = dict.fromkeys(flags, "EACCES")
    assert_in_sandbox(f"{{name: clone(flag) for name, flag in {flags!r}.items()}} == {expected!r}", body)
    assert_in_sandbox("clone3() == 'ENOSYS', clone3()", body)


def test_calls_newer_than_the_filter_are_unknown() -> None:
    """The calls are `open_tree_attr` (467), `listns` (470) and an x32 call of x86-64."""
    for number in (467, 470, 0x40000000 + 250):
        assert_in_sandbox(f"call({number}, -1, -1, -1, -1, -1) == 38, call({number}, -1, -1, -1, -1, -1)")


def test_only_unix_socket_pairs_are_allowed() -> None:
    """A pair of TIPC sockets would load a module into the kernel."""
    socketpair = (53, 199)[COLUMN]
    body = f"""
def pair(family):
    two = (ctypes.c_int * 2)()
    return call({socketpair}, family, 1, 0, ctypes.addressof(two))
"""
    assert_in_sandbox("[pair(family) for family in (1, 30, 16)] == [0, 13, 13]", body)


def test_keys_of_the_caller_are_neither_readable_nor_listed() -> None:
    """Without the filter a program of the same user could read the keys of the session."""
    libc = ctypes.CDLL(None, use_errno=True)
    add_key, keyctl = syscall_number("add_key"), syscall_number("keyctl")
    name, session = f"sandbox-test-{os.getpid()}".encode(), ctypes.c_long(-3)
    made = (
        libc.syscall(keyctl, 1, None) >= 0
        and libc.syscall(add_key, b"user", name, b"secret", 6, session) >= 0
    )
    if not made:
        pytest.skip(f"this machine lets no key be made: {os.strerror(ctypes.get_errno())}")
    body = f"""
name, kind = ctypes.create_string_buffer({name!r}), ctypes.create_string_buffer(b"user")
found = ctypes.create_string_buffer(100)
def read():
    key = libc.syscall(ctypes.c_long({keyctl}), ctypes.c_long(10), ctypes.c_long(-3), kind, name, 0)
    libc.syscall(ctypes.c_long({keyctl}), ctypes.c_long(11), ctypes.c_long(key), found, ctypes.c_long(100))
    return found.value
def names():
    return open('/proc/keys').read() if os.path.exists('/proc/keys') else ''
"""
    assert_in_sandbox("read() == b'', read()", body)
    assert_in_sandbox(f"{name.decode()!r} not in names(), names()", body)


def test_processes_threads_and_pools_are_allowed() -> None:
    body = """
import multiprocessing, subprocess, threading, asyncio, concurrent.futures, socket
def work():
    heard = []
    thread = threading.Thread(target=heard.append, args=(1,)); thread.start(); thread.join()
    with concurrent.futures.ThreadPoolExecutor(2) as pool: heard += pool.map(abs, [-2])
    with multiprocessing.get_context('fork').Pool(2) as pool: heard += pool.map(abs, [-3])
    heard.append(int(subprocess.run(['/bin/echo', '4'], capture_output=True).stdout))
    heard.append(int(subprocess.check_output('echo 5', shell=True)))
    pid = os.posix_spawn('/bin/true', ['true'], {}); heard.append(6 + os.waitpid(pid, 0)[1])
    async def seven(): return 7
    heard.append(asyncio.run(seven()))
    return heard
"""
    assert_in_sandbox("work() == [1, 2, 3, 4, 5, 6, 7], work()", body)
