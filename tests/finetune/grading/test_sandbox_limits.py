"""Programs that try to exceed each limit of the sandbox."""

from __future__ import annotations

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from attempts import WIDE, assert_nothing_reached, attempt, has_ended, wait_for_process

from orchestrator.finetune.grading.code import grade_programs
from orchestrator.finetune.grading.program_text import ProgramWithTests
from orchestrator.finetune.grading.sandbox import run
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, ProgramResult


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
    result = attempt(bomb, "assert 4 <= attempt() <= 16", limits)
    assert result.passed, result.reason


def test_a_fork_bomb_leaves_no_process_behind() -> None:
    mark = f"bomb-{os.getpid()}"
    spawn = f"os.spawnlp(os.P_NOWAIT, 'sleep', '{mark}', '1000')"
    bomb = f"while True:\n    try: {spawn}\n    except OSError: pass"
    assert not attempt(bomb, limits=ProgramLimits(wall_seconds=1.0, cpu_seconds=1)).passed
    assert has_ended(mark)


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
    assert_nothing_reached(daemon)
    assert has_ended(mark)


def test_memory_is_limited() -> None:
    assert_nothing_reached("""
try:
    return len(bytearray(1 << 30))
except MemoryError:
    return None
""")


def test_memory_outside_the_limits_cannot_be_allocated() -> None:
    assert_nothing_reached("""
import ctypes
libc = ctypes.CDLL(None)
made = {'shmget': libc.shmget(0, 1 << 20, 0o1600), 'msgget': libc.msgget(0, 0o1600),
        'semget': libc.semget(0, 1, 0o1600), 'memfd_create': libc.memfd_create(b'x', 0)}
return {name: number for name, number in made.items() if number >= 0} or None
""")


def test_cpu_time_is_limited() -> None:
    result = attempt("while True: pass", limits=replace(WIDE, cpu_seconds=1))
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
    result = attempt(f"{child}{body}\ntime.sleep(1000)", limits=replace(WIDE, wall_seconds=0.5))
    assert result == ProgramResult(False, "out of time")
    assert has_ended(mark)


def test_a_program_that_was_killed_from_outside_is_run_again() -> None:
    """When memory is short, the machine may kill one program because of another. This test kills it once."""
    mark = f"killed-{os.getpid()}"
    program = f"import os\ndef attempt(): os.spawnlp(os.P_WAIT, 'sleep', '{mark}', '1000')\n"
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(grade_programs, [ProgramWithTests(program, "assert attempt() is None")], WIDE)
        first = wait_for_process(mark)
        os.kill(first.ppid(), signal.SIGKILL)
        first.wait(timeout=120)  # Only this process: the second run may start at once, with the same mark.
        wait_for_process(mark).kill()
        assert results.result() == [ProgramResult(True, "passed")]


def test_a_program_that_kills_itself_fails_when_it_is_run_again() -> None:
    program = "import os\ndef attempt(): os.kill(os.getpid(), 9)\n"
    assert grade_programs([ProgramWithTests(program, "attempt()")], WIDE) == [ProgramResult(False, "killed")]


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
    assert_nothing_reached(
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
    assert_nothing_reached("""
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
