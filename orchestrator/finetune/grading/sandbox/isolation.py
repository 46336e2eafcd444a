"""The first processes of a sandbox: they isolate themselves and then start the program or its tests.

    launcher (outside)  ->  init process of the namespace  ->  program server, or test runner

When the init process ends, the kernel kills every other process in the namespace. This module and those that
it imports use the standard library only, since they run without the project's packages.

They isolate themselves by system calls of Linux, in this order:

1. new namespaces for users, mounts, processes, network, IPC and host name;
2. a root file system with the interpreter and the system's libraries, read-only, and an empty /tmp;
3. no capabilities, no way to gain new ones, and the user `nobody`;
4. a seccomp filter that refuses system calls which affect more than the program and its own processes;
5. resource limits.

Most calls that the filter refuses need privileges that a program does not have. They are refused anyway, so
that a bug of the kernel in one of them cannot be exploited. Others need no privilege: without the filter a
program could read the keys of the user who started the sandbox, use memory that no limit counts, or reach the
hypervisor of a virtual machine through a socket that belongs to no network namespace. If the machine allows
no namespaces, the filter alone prevents access to the network.

If the sandbox is started by root, `nobody` is the system's user of that name. If it is started by another
user, the processes belong to that user, who is called `nobody` inside the namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.finetune.grading.sandbox.rpc import run_tests, serve_calls

SETUP_FAILED, OUT_OF_TIME, OUT_OF_CPU = 125, 124, 123
"""Exit codes of the launcher: isolation failed (with a message on stderr), or the limit of wall-clock time or
of CPU time was reached."""

NOBODY = 65534

# From <linux/sched.h>, <sys/mount.h>, <linux/mount.h>, <linux/prctl.h>; equal on every architecture.
_OWN_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000
"""The flags of unshare(2) for users, mounts, processes, network, IPC and host name."""
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_KEYCTL_JOIN_SESSION_KEYRING = 1
_PR_DEATHSIG, _PR_DUMPABLE, _PR_CAPBSET_DROP, _PR_NO_NEW_PRIVS, _PR_SUBREAPER = 1, 4, 24, 38, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _call_libc(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        shown = [a.decode() if isinstance(a, bytes) else a for a in arguments[:2]]
        raise OSError(number, f"{name}{tuple(shown)}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call_libc(
        "mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )


def enter_new_namespaces() -> None:
    """Move this process to new namespaces, and its future children to a new process namespace."""
    if os.getuid() != 0:
        maps = {
            "setgroups": "deny",
            "uid_map": f"{NOBODY} {os.getuid()} 1",
            "gid_map": f"{NOBODY} {os.getgid()} 1",
        }
        _call_libc("unshare", _OWN_NAMESPACES)
        for name, text in maps.items():
            write_file(f"/proc/self/{name}", text)
        return
    # Every user keeps its number, so that files that only root may read are visible inside. A process outside
    # the new namespace has to write the map.
    maps = {name: _identity_map(f"/proc/self/{name}") for name in ("uid_map", "gid_map")}
    pid = os.getpid()
    read_end, write_end = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(write_end)
            if os.read(read_end, 1):
                for name, lines in maps.items():
                    write_file(f"/proc/{pid}/{name}", lines)
                status = 0
        finally:
            os._exit(status)
    os.close(read_end)
    try:
        _call_libc("unshare", _OWN_NAMESPACES)
        os.write(write_end, b"1")
    finally:
        os.close(write_end)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError(f"the users of the new namespace could not be mapped (status {status})")


def _identity_map(path: str) -> str:
    with open(path) as file:
        extents = [line.split() for line in file]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in extents)


def write_file(path: str, text: str) -> None:
    """Write a file in /proc, such as a setting of this process in /proc/self."""
    with open(path, "w") as file:
        file.write(text)


def enter_new_root(
    visible_folders: Sequence[str], hidden_folders: Sequence[str], tmp_bytes: int, max_tmp_files: int
) -> None:
    """Build a new root file system and move the first process of the new process namespace into it.

    It contains the visible folders, read-only, a /tmp that is empty apart from these, four devices, and
    /proc of this namespace where the machine allows mounting it. Nothing else of the machine is visible.

    Args:
        visible_folders: Folders of the machine; /usr is visible in any case.
        hidden_folders: Folders inside them that appear empty, by their real paths.
        tmp_bytes: The size of /tmp.
        max_tmp_files: The number of files that /tmp may contain.
    """
    root = "/sys"  # every machine has this folder, and nothing of its content has to be visible
    _mount("none", "/", "none", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.makedirs(root + "/tmp")  # first, because a visible folder may be below /tmp
    options = f"size={tmp_bytes},nr_inodes={max_tmp_files},mode=700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", root + "/tmp", "tmpfs", _NOSUID | _NODEV, options)
    _mount_folders(root, visible_folders, hidden_folders)
    _mount_devices(root)
    write_file("/proc/sys/user/max_user_namespaces", "0")  # no further namespaces inside the new one
    os.makedirs(root + "/proc", exist_ok=True)
    with contextlib.suppress(OSError):  # a container that masks parts of /proc forbids this
        _mount("proc", root + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    _mount("none", root, "none", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _pivot_root(root)
    os.chdir("/tmp")
    socket.sethostname("sandbox")


def _mount_folders(root: str, visible_folders: Sequence[str], hidden_folders: Sequence[str]) -> None:
    links = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
    for folder in links:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
    system_folders = [f for f in links if os.path.isdir(f) and not os.path.islink(f) and f != "/lib32"]
    mounted: list[str] = []
    for folder in sorted(map(os.path.realpath, ("/usr", *system_folders, *visible_folders)), key=len):
        if any(folder == earlier or folder.startswith(earlier + "/") for earlier in mounted):
            continue
        os.makedirs(root + folder, mode=0o755, exist_ok=True)
        _mount(folder, root + folder, "none", _BIND | _REC)
        _make_read_only(root + folder)
        mounted.append(folder)
    for folder in hidden_folders:
        if os.path.isdir(root + folder):
            _mount("tmpfs", root + folder, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k,mode=755")
    for folder in visible_folders:  # a path with symbolic links is visible under both names
        if not os.path.lexists(root + folder):
            os.makedirs(os.path.dirname(root + folder), mode=0o755, exist_ok=True)
            os.symlink(os.path.realpath(folder), root + folder)


def _mount_devices(root: str) -> None:
    if os.path.exists("/etc/ld.so.cache"):
        _bind_file("/etc/ld.so.cache", root)
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _bind_file(device, root)
    os.symlink("/tmp", root + "/dev/shm")  # multiprocessing creates its semaphores there


def _pivot_root(root: str) -> None:
    os.chdir(root)
    _call_libc("syscall", ctypes.c_long(_syscall_number("pivot_root")), b".", b".")
    _call_libc("umount2", b".", _DETACH)


def _bind_file(path: str, root: str) -> None:
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    open(root + path, "x").close()
    _mount(path, root + path, "none", _BIND)
    read_only = _RDONLY if path.startswith("/etc/") else 0
    _mount("none", root + path, "none", _REMOUNT | _BIND | _NOSUID | _NOEXEC | read_only)


def _make_read_only(target: str) -> None:
    """Make a mount and all mounts below it read-only, without set-user-id files and devices (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    place = (ctypes.c_int(_AT_FDCWD), target.encode(), ctypes.c_uint(_AT_RECURSIVE))
    _call_libc(
        "syscall", ctypes.c_long(_syscall_number("mount_setattr")), *place, ctypes.byref(attributes), size
    )


def drop_privileges() -> None:
    """Become `nobody` without capabilities, permanently, and forbid that user to inspect this process."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last capability of this kernel, or there were none to drop
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call_libc("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    _call_libc("prctl", _PR_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call_libc("prctl", _PR_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _call_libc("prctl", _PR_DEATHSIG, 9, 0, 0, 0)


def count_user_threads() -> int:
    """Return the number of this user's threads: without a user namespace RLIMIT_NPROC counts all of them."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        # A process may end meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
            if int(fields["Uid"].split()[0]) == os.getuid():
                count += int(fields["Threads"])
    return count


def set_resource_limits(limits: Mapping[str, int]) -> None:
    """Limit this process and its future children.

    Args:
        limits: The fields of `run.ProgramLimits`. Here `processes` counts the processes and threads of the
            user; in a user namespace, of the sandbox.
    """
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["tmp_bytes"]),
        (resource.RLIMIT_NOFILE, limits["max_open_files"]),
        (resource.RLIMIT_CORE, 1),  # no core dumps; with 0 a program in core_pattern still gets one
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


with open(os.path.join(os.path.dirname(__file__), "refused_calls.toml"), "rb") as _file:
    _REFUSED_NUMBERS = tomllib.load(_file)

_MACHINES = ("x86_64", "aarch64")
_ARCHITECTURE = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), 435
_FIRST_UNKNOWN = 463
"""The first number after the calls of Linux 6.12. Later calls, and the x32 calls of x86-64, are not in
the list and fail with ENOSYS: the C library then falls back to other calls, as on an older kernel."""
_ANY_NAMESPACE = 0x7E020000  # the flags of clone(2) that make a namespace of any kind

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
_PR_SET_SECCOMP, _FILTER = 22, 2
_AF_UNIX = 1

_FilterStep = tuple[str, int, int, str, str]
"""(label, operation, value, target if true, target if false). An empty target means the next step."""


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _syscall_number(name: str) -> int:
    return _REFUSED_NUMBERS[name][_machine_index()]


def _machine_index() -> int:
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"the sandbox knows no system calls of {machine}; use {' or '.join(_MACHINES)}")
    return _MACHINES.index(machine)


def install_seccomp_filter() -> None:
    """Install the filter, permanently, for this process and its descendants; needs `no_new_privs`."""
    steps = _filter_steps(_machine_index())
    code = _assemble(steps)
    if _libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(_FilterProgram(len(steps), code)), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _filter_steps(machine: int) -> list[_FilterStep]:
    refused = [numbers[machine] for numbers in _REFUSED_NUMBERS.values() if numbers[machine] >= 0]
    return [
        ("", _LOAD, _MACHINE, "", ""),
        ("", _EQUAL, _ARCHITECTURE[machine], "", "kill"),
        ("", _LOAD, _NUMBER, "", ""),
        ("", _AT_LEAST, _FIRST_UNKNOWN, "unknown", ""),
        ("", _EQUAL, _CLONE3, "unknown", ""),  # its flags are in memory, which a filter cannot read
        *(("", _EQUAL, number, "refuse", "") for number in refused),
        ("", _EQUAL, _CLONE[machine], "clone", ""),
        ("", _EQUAL, _SOCKETPAIR[machine], "socket", ""),
        ("", _EQUAL, _SOCKET[machine], "socket", "allow"),
        ("clone", _LOAD, _FIRST_ARGUMENT, "", ""),
        ("", _ANY_BIT, _ANY_NAMESPACE, "refuse", "allow"),
        ("socket", _LOAD, _FIRST_ARGUMENT, "", ""),
        ("", _EQUAL, _AF_UNIX, "allow", "refuse"),
        ("allow", _RETURN, _ALLOW, "", ""),
        ("refuse", _RETURN, _ERROR | errno.EACCES, "", ""),
        ("unknown", _RETURN, _ERROR | errno.ENOSYS, "", ""),
        ("kill", _RETURN, _KILL, "", ""),
    ]


def _assemble(steps: list[_FilterStep]) -> bytes:
    """Return the filter in the format of the kernel, where a jump is the number of steps to skip."""
    places = {step[0]: place for place, step in enumerate(steps)}
    code = b""
    for place, (_, operation, value, if_true, if_false) in enumerate(steps):
        skipped = [places[label] - place - 1 if label else 0 for label in (if_true, if_false)]
        code += struct.pack("<HBBI", operation, *skipped, value)
    return code


def main() -> None:
    """Isolate this process and run the program or the tests in it.

    The settings are a JSON object on stdin, which `run._start_launcher` writes. The verdict of the tests is
    a JSON object on stdout. The exit code is that of the program or of the tests, or a constant of this
    module.
    """
    spec = json.load(sys.stdin)
    connection = socket.socket(fileno=spec["connection"])
    try:
        with contextlib.suppress(OSError):  # when memory is short, the kernel ends this process first
            write_file("/proc/self/oom_score_adj", "1000")
        # An empty session keyring, since /proc/keys shows the names of its keys. Errors are ignored: where a
        # container forbids this, the seccomp filter still prevents reading keys.
        join = ctypes.c_long(_syscall_number("keyctl")), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None
        _libc.syscall(*join)
        if spec["namespaces"]:
            enter_new_namespaces()
        else:
            _call_libc("prctl", _PR_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
        child = os.fork()
        if child == 0:
            _run_init(spec, connection)
    except BaseException as error:
        _exit_setup_failed(error)
    connection.close()
    _redirect_to_devnull()  # only the process of the tests keeps the pipe of the verdict
    if not spec["namespaces"]:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))  # orphans are killed below
    code = _exit_code(os.waitpid(child, 0)[1])
    if not spec["namespaces"]:
        _kill_orphans()
    os._exit(code)


def _run_init(spec: dict[str, Any], connection: socket.socket) -> None:
    limits = spec["limits"]
    try:
        if spec["namespaces"]:
            enter_new_root(
                spec["visible_folders"], spec["hidden_folders"], limits["tmp_bytes"], limits["max_tmp_files"]
            )
        else:
            os.chdir(spec["folder"])
        drop_privileges()
        install_seccomp_filter()
        die_with_parent()
        child = os.fork()
        if child == 0:
            _run_payload(spec, connection)
    except BaseException as error:
        _exit_setup_failed(error)
    connection.close()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(OUT_OF_TIME))
    signal.setitimer(signal.ITIMER_REAL, limits["wall_seconds"])
    _redirect_to_devnull()
    while True:
        ended, status, used = os.wait4(-1, 0)
        if ended == child:
            os._exit(OUT_OF_CPU if _out_of_cpu(status, used, limits["cpu_seconds"]) else _exit_code(status))


def _out_of_cpu(status: int, used: resource.struct_rusage, limit: int) -> bool:
    """Return whether a process ended because of its limit of CPU time.

    SIGKILL may have other causes, such as the out-of-memory killer. The CPU time that the kernel compares
    with the limit is coarser than the time that it reports: 0.8 of the limit counts as reached.
    """
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = used.ru_utime + used.ru_stime >= 0.8 * limit
    return ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and spent)


def _run_payload(spec: dict[str, Any], connection: socket.socket) -> None:
    limits = spec["limits"]
    try:
        if not spec["namespaces"]:
            os.setsid()
            die_with_parent()
        processes = limits["processes"] + 1
        if not spec["namespaces"]:
            processes += count_user_threads() + limits["processes"] * (os.cpu_count() or 1)
        set_resource_limits(limits | {"processes": processes})
        sys.path[:] = [p for p in sys.path if p != spec["project"]] + spec["packages"]
    except BaseException as error:
        _exit_setup_failed(error)
    result = os.dup(sys.stdout.fileno()) if spec["runs_tests"] else -1
    _redirect_to_devnull()
    try:
        if spec["runs_tests"]:
            passed, reason = run_tests(connection, spec["text"])
            os.write(result, json.dumps({"passed": passed, "reason": reason}).encode())
        else:
            serve_calls(connection, spec["text"])
    finally:
        os._exit(0)


def _redirect_to_devnull() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)


def _exit_setup_failed(error: BaseException) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(SETUP_FAILED)


def _exit_code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _kill_orphans() -> None:
    """Kill the descendants that are left when there are no namespaces.

    Children of a process that has ended become children of this process, so killing is repeated until there
    are none.
    """
    for _ in range(1000):
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(number) for number in file.read().split()]
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        time.sleep(0.001)


if not sys.platform.startswith("linux"):
    raise OSError("programs written by a model run on Linux only")
