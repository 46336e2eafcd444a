"""The walls: what a process gives up before it runs a program that nobody has read. Linux, by its own calls.

Everything is done by one process before any foreign code is there, in this order: new namespaces (user,
mounts, processes, network, IPC, host name), a root of its own that holds the interpreter and the system's
libraries for reading and an empty /tmp, then no capability, no way to new ones, user `nobody`, and limits.
As root `nobody` is the system's nobody; as another user it is that user, called nobody inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.finetune.grading.sandbox.seccomp import syscall_number

NOBODY = 65534

# <linux/sched.h>, <sys/mount.h>, <linux/mount.h>, <linux/prctl.h>; the same numbers on every architecture.
_NEW = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000}
_NEW_HOST_NAME = 0x4000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_KEYCTL_JOIN_SESSION_KEYRING = 1
_PR_DEATHSIG, _PR_DUMPABLE, _PR_CAPBSET_DROP, _PR_NO_NEW_PRIVS, _PR_SUBREAPER = 1, 4, 24, 38, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _call_libc(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        said = [a.decode() if isinstance(a, bytes) else a for a in arguments[:2]]
        raise OSError(number, f"{name}{tuple(said)}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call_libc(
        "mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )


def enter_new_namespaces() -> None:
    """This process leaves the machine's; its children will be in the new process namespace, too."""
    flags = sum(_NEW.values()) | _NEW_HOST_NAME
    if os.getuid() != 0:
        inside = f"{NOBODY} {os.getuid()} 1"
        group = f"{NOBODY} {os.getgid()} 1"
        _call_libc("unshare", flags)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", inside)
        _write("/proc/self/gid_map", group)
        return
    # Every user that root has here keeps its number, so that files that only root may read can be shown.
    # The map has to be written from outside.
    maps = {name: _identity_map(f"/proc/self/{name}") for name in ("uid_map", "gid_map")}
    me = os.getpid()
    read_end, write_end = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(write_end)
            if os.read(read_end, 1):
                for name, lines in maps.items():
                    _write(f"/proc/{me}/{name}", lines)
                status = 0
        finally:
            os._exit(status)
    os.close(read_end)
    try:
        _call_libc("unshare", flags)
        os.write(write_end, b"1")
    finally:
        os.close(write_end)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError(f"the new namespace's users could not be mapped (status {status})")


def _identity_map(path: str) -> str:
    with open(path) as file:
        extents = [line.split() for line in file]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in extents)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_new_root(
    visible_folders: Sequence[str], hidden_folders: Sequence[str], tmp_bytes: int, max_tmp_files: int
) -> None:
    """Make a new root for this process namespace's first process.

    It has the `shown` folders, read-only, in which the `hidden` ones are empty; an empty /tmp; four devices;
    and /proc of this namespace where the machine lets it be mounted. Nothing else of the machine is visible.

    Args:
        shown: Folders of the machine.
        hidden: Folders below them, by their real paths.
        disk: The size of /tmp in bytes.
        files: How many files /tmp may hold.
    """
    _mount("none", "/", "none", _REC | _PRIVATE)
    root = "/sys"  # a folder that every machine has and of which nothing is shown
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=4096,mode=755")
    for folder in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
    links = ("/bin", "/lib", "/lib64", "/sbin")
    folders = ["/usr", *(f for f in links if os.path.isdir(f) and not os.path.islink(f)), *visible_folders]
    done: list[str] = []
    for folder in sorted(map(os.path.realpath, folders), key=len):
        if any(folder == earlier or folder.startswith(earlier + "/") for earlier in done):
            continue
        os.makedirs(root + folder, mode=0o755, exist_ok=True)
        _mount(folder, root + folder, "none", _BIND | _REC)
        _make_read_only(root + folder)
        done.append(folder)
    for folder in hidden_folders:
        if os.path.isdir(root + folder):
            _mount("tmpfs", root + folder, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k,mode=755")
    for folder in visible_folders:  # a name that leads elsewhere is shown under both
        if not os.path.lexists(root + folder):
            os.makedirs(os.path.dirname(root + folder), mode=0o755, exist_ok=True)
            os.symlink(os.path.realpath(folder), root + folder)
    if os.path.exists("/etc/ld.so.cache"):
        _bind_file("/etc/ld.so.cache", root)
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _bind_file(device, root)
    os.makedirs(root + "/tmp", exist_ok=True)
    os.symlink("/tmp", root + "/dev/shm")  # where locks between processes are made
    owner = f"uid={NOBODY},gid={NOBODY}"
    _mount(
        "tmpfs",
        root + "/tmp",
        "tmpfs",
        _NOSUID | _NODEV,
        f"size={tmp_bytes},nr_inodes={max_tmp_files},mode=700,{owner}",
    )
    _write("/proc/sys/user/max_user_namespaces", "0")  # of the new namespace: no further ones inside it
    os.makedirs(root + "/proc", exist_ok=True)
    with contextlib.suppress(OSError):  # in a container that masks parts of /proc: programs do without
        _mount("proc", root + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    _mount("none", root, "none", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise OSError(f"no number of pivot_root is known for {machine}")
    _call_libc("syscall", ctypes.c_long(_SYS_PIVOT_ROOT[machine]), b".", b".")
    _call_libc("umount2", b".", _DETACH)
    os.chdir("/tmp")
    socket.sethostname("sandbox")


def _bind_file(path: str, root: str) -> None:
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    open(root + path, "x").close()
    _mount(path, root + path, "none", _BIND)
    _mount(
        "none",
        root + path,
        "none",
        _REMOUNT | _BIND | _NOSUID | _NOEXEC | (_RDONLY if "/etc/" in path else 0),
    )


def _make_read_only(target: str) -> None:
    """Read-only, without set-user-id and devices, for all that is mounted below, too (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    _call_libc(
        "syscall",
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        target.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def drop_privileges() -> None:
    """To `nobody`, without capabilities, for good; none of that user may look into this process."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one that the kernel knows, or none was there to drop
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call_libc("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    _call_libc("prctl", _PR_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call_libc("prctl", _PR_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    _call_libc("prctl", _PR_DEATHSIG, 9, 0, 0, 0)


def leave_session_keyring() -> None:
    """Replace the caller's session key ring by an empty one: /proc/keys would show the names of its keys.

    An error is ignored: where a container forbids this, the filter of calls still lets no key be read.
    """
    _libc.syscall(
        ctypes.c_long(syscall_number("keyctl") or -1), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None
    )


def become_subreaper() -> None:
    _call_libc("prctl", _PR_SUBREAPER, 1, 0, 0, 0)


def count_user_threads() -> int:
    """Count this user's threads on the machine: without a user namespace RLIMIT_NPROC counts all of them."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:  # one may end meanwhile
            fields = dict(line.split(":", 1) for line in file if ":" in line)
            if int(fields["Uid"].split()[0]) == os.getuid():
                count += int(fields["Threads"])
    return count


def set_resource_limits(cpu: int, memory: int, processes: int, file: int, files: int) -> None:
    """Limits of this process and its children, each of its own but for `processes`, which counts the user's
    (in a user namespace: this sandbox's)."""
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 1),  # none; with 0 a program of the machine's (core_pattern) still gets it
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if not sys.platform.startswith("linux"):
    raise OSError("programs written by a model run on Linux only")
