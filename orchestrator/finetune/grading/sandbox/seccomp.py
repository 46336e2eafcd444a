"""A seccomp filter that refuses system calls which affect more than the program and its own processes.

Most of these calls need privileges that a program does not have in the sandbox. They are refused anyway, so
that a bug of the kernel in one of them cannot be exploited. Others need no privilege. Without the filter a
program could read the keys of the user who started the sandbox, use memory that no limit counts, or reach the
hypervisor of a virtual machine through a socket that belongs to no network namespace. If the machine allows
no namespaces, the filter alone prevents access to the network.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_REFUSED = (
    # Keys of the session that started the sandbox.
    "add_key 248 217, request_key 249 218, keyctl 250 219, "
    # Programs in the kernel, tracing, and the memory and files of other processes.
    "bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, lookup_dcookie 212 18, ptrace 101 117, "
    "process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, "
    "process_mrelease 448 448, pidfd_getfd 438 438, kcmp 312 272, move_pages 279 239, "
    "migrate_pages 256 238, "
    # Mounts and roots; files by handle, which bypass the permissions of folders.
    "mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, "
    "move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, "
    "mount_setattr 442 442, statmount 457 457, listmount 458 458, name_to_handle_at 303 264, "
    "open_by_handle_at 304 265, fanotify_init 300 262, fanotify_mark 301 263, "
    # Namespaces.
    "unshare 272 97, setns 308 268, "
    # Memory that no limit of a process counts.
    "shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, "
    "semctl 66 191, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, "
    "memfd_create 319 279, memfd_secret 447 447, "
    # io_uring, whose requests no filter sees.
    "io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, "
    # Administration of the machine.
    "kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273, "
    "delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89, "
    "quotactl 179 60, quotactl_fd 443 443, syslog 103 116, settimeofday 164 170, "
    "clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, "
    "setdomainname 171 162, vhangup 153 58, nfsservctl 180 42, iopl 172 -1, ioperm 173 -1, "
    "modify_ldt 154 -1"
)
"""The refused calls with their numbers on x86-64 and on ARM, from the kernel's headers. A call that an
architecture lacks has the number -1."""

REFUSED_SYSCALLS = {name: (int(x86), int(arm)) for name, x86, arm in map(str.split, _REFUSED.split(", "))}

_MACHINES = ("x86_64", "aarch64")
_ARCHITECTURE = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), 435
_FIRST_UNKNOWN = 463
"""The first number after the calls of Linux 6.12. Later calls, and the x32 calls of x86-64, are not in
the list and fail with ENOSYS: the C library then falls back to other calls, as on an older kernel."""
_NEW_NAMESPACES = 0x7E020000  # the flags of clone(2) that make a namespace

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
_PR_SET_SECCOMP, _FILTER = 22, 2
_AF_UNIX = 1

_FilterStep = tuple[str, int, int, str, str]
"""(label, operation, value, target if true, target if false). An empty target means the next step."""


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def syscall_number(name: str) -> int:
    """Return the number of a refused call on this machine, -1 if this machine has no such call."""
    return REFUSED_SYSCALLS[name][_machine_index()]


def _machine_index() -> int:
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"the sandbox knows no system calls of {machine}; use {' or '.join(_MACHINES)}")
    return _MACHINES.index(machine)


def install_seccomp_filter() -> None:
    """Install the filter, permanently, for this process and its descendants; needs `no_new_privs`."""
    steps = _filter_steps(_machine_index())
    code = _assemble(steps)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(_FilterProgram(len(steps), code)), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _filter_steps(machine: int) -> list[_FilterStep]:
    refused = [numbers[machine] for numbers in REFUSED_SYSCALLS.values() if numbers[machine] >= 0]
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
        ("", _ANY_BIT, _NEW_NAMESPACES, "refuse", "allow"),
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
