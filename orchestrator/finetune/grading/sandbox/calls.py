"""A filter of system calls (seccomp): no sockets but those between the sandbox's own processes, and no memory
that belongs to no process.

Some kinds of socket belong to no network namespace (a virtual machine's vsock reaches its hypervisor), and
without namespaces this is all that keeps a program from the network. System V's shared memory and queues and
memfd's files count in no limit of a process, so a program could fill the machine's memory with them, and
without namespaces the former outlive it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_ARCHITECTURE = {
    "x86_64": (0xC000003E, 41, (29, 64, 68, 319)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 279)),
}
"""What the kernel calls the machine, its number of socket(2), and those of shmget(2), semget(2), msgget(2)
and memfd_create(2)."""
_IO_URING_SETUP, _MEMFD_SECRET = 425, 447  # on every machine. Rings open sockets without socket(2)
_X32 = 0x40000000  # a second set of numbers on x86-64

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
_PR_SET_SECCOMP, _FILTER = 22, 2
_AF_UNIX = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def filter_calls() -> None:
    """For this process and all that it starts, for good; needs `no_new_privs`."""
    machine, socket, memory = _ARCHITECTURE[os.uname().machine]
    refused = (_IO_URING_SETUP, _MEMFD_SECRET, *memory)
    steps = [  # (operation, value, steps to skip when so, when not)
        (_LOAD, _MACHINE, 0, 0),
        (_EQUAL, machine, 1, 0),
        (_RETURN, _KILL, 0, 0),
        (_LOAD, _NUMBER, 0, 0),
        (_AT_LEAST, _X32, len(refused) + 4, 0),
        *((_EQUAL, number, len(refused) + 3 - place, 0) for place, number in enumerate(refused)),
        (_EQUAL, socket, 0, 2),
        (_LOAD, _FIRST_ARGUMENT, 0, 0),
        (_EQUAL, _AF_UNIX, 0, 1),
        (_RETURN, _ALLOW, 0, 0),
        (_RETURN, _REFUSE, 0, 0),
    ]
    code = b"".join(struct.pack("<HBBI", step[0], step[2], step[3], step[1]) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(_Program(len(steps), code)), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
