"""The sandbox of an ordinary user, on a machine that forbids namespaces, and the weaker sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.finetune.grading.sandbox import run

PROJECT = Path(run.__file__).parents[4]
NOBODY = 65534


@pytest.fixture
def readable() -> Iterator[tuple[str, Path]]:
    """Return an interpreter and a copy of the sandbox's code, both accessible to every user."""
    if os.getuid() != 0:
        pytest.skip("not root: the other tests ran as an ordinary user already")
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            subprocess.run([python, "-c", ""], user=NOBODY, group=NOBODY, cwd="/", check=True)
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("no interpreter here that another user may run")
    # Other users may not read the temporary folder of this process.
    folder = Path(tempfile.mkdtemp(prefix="readable-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"]))
    imported = ("orchestrator/util/errors.py", "orchestrator/util/timeouts.py", "variants/errors.py")
    for part in ("orchestrator/finetune/grading", *imported):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (PROJECT / part).is_dir() else shutil.copy
        copy(PROJECT / part, folder / part)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield python, folder
    shutil.rmtree(folder)


def _as_nobody(readable: tuple[str, Path], script: str, **more: str) -> str:
    python, folder = readable
    done = subprocess.run(
        [python, "-B", "-c", script],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), **more},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return (done.stdout + done.stderr).strip()


STRONG = """
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, run, sandbox_level
tests = "assert uid() == 65534 and not there('/etc/passwd') and not there('/home')"
program = "import os\\ndef uid(): return os.getuid()\\ndef there(path): return os.path.exists(path)"
try:
    print(sandbox_level(), run(program, tests, ProgramLimits()).reason)
except Exception as error:
    print(error)
"""


def test_an_ordinary_user_gets_complete_isolation_or_a_refusal_in_one_line(
    readable: tuple[str, Path],
) -> None:
    output = _as_nobody(readable, STRONG)
    refused = output.startswith("Programs written by a model are not run here") and "\n" not in output
    assert output == "namespaces passed" or refused, output


WEAK = """
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, run
program = '''
import os
def add(a, b):
    reading, writing = os.pipe()  # closed in the daemon when `sleep` has replaced Python
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execlp('sleep', MARK, '1000')
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    return a + b
def hang():
    while True: pass
def reaches():
    import socket
    try:
        socket.socket(socket.AF_INET)
    except PermissionError:
        return False
    return True
def new_users():
    import ctypes
    return ctypes.CDLL(None).unshare(0x10000000) == 0
def fake():
    os._exit(0)
'''.replace('MARK', repr(mark))
wide, short = (ProgramLimits(wall_seconds=200.0, cpu_seconds=cpu) for cpu in (60, 1))
for tests in ("assert add(1, 2) == 3", "assert add(1, 2) == 4", "hang()", "fake()", "assert not reaches()",
              "assert not new_users()"):
    print(run(program, tests, short if tests == "hang()" else wide, "limits").reason)
"""


def test_the_weaker_sandbox_gives_the_same_results_and_leaves_no_processes(
    readable: tuple[str, Path],
) -> None:
    mark = f"weak-{os.getpid()}"
    assert _as_nobody(readable, f"mark = {mark!r}\n" + WEAK).splitlines() == [
        "passed",
        "AssertionError: assert add(1, 2) == 4",
        "out of CPU time",
        "the program ended before its tests did (exit code 0)",
        "passed",
        "passed",
    ]
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]


CROWDED = """
import os, subprocess
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, run
program = '''
import os, threading
def thread():
    heard = []
    one = threading.Thread(target=heard.append, args=(1,)); one.start(); one.join()
    return heard
def bomb():
    made = 0
    while made < 10000:
        try:
            if os.fork() == 0:
                while True: os.read(0, 1) or __import__('time').sleep(1000)
        except OSError:
            break
        made += 1
    return made
'''
others = [subprocess.Popen(["sleep", "1000"]) for _ in range(ProgramLimits().processes + 8)]
limits = ProgramLimits(wall_seconds=200.0, cpu_seconds=60)
for tests in ("assert thread() == [1]", f"assert 4 <= bomb() <= {limits.processes} * (2 + os.cpu_count())"):
    print(run(program, "import os\\n" + tests, limits, "limits").reason)
for other in others:
    other.kill()
"""


def test_the_weaker_sandbox_does_not_count_other_processes_of_its_user(readable: tuple[str, Path]) -> None:
    assert _as_nobody(readable, CROWDED).splitlines() == ["passed", "passed"]


HIDDEN = """
import os, sys, tempfile
from pathlib import Path
from orchestrator.finetune.grading.sandbox import isolation, run
from orchestrator.util.errors import StudyError

own, shown = Path(os.path.realpath(sys.base_prefix)), Path(tempfile.mkdtemp())
isolation._call_libc("unshare", 0x20000)
# The following mounts are visible to this process only.
isolation._mount("none", "/", "none", isolation._REC | isolation._PRIVATE)
isolation._mount(str(own), str(shown), "none", isolation._BIND | isolation._REC)
isolation._mount("tmpfs", str(own), "tmpfs", 0, "mode=0700")
for part in shown.iterdir():
    if part.is_symlink():
        (own / part.name).symlink_to(part.readlink())
    elif part.is_dir():
        (own / part.name).mkdir()
        isolation._mount(str(part), str(own / part.name), "none", isolation._BIND | isolation._REC)
program = "import wave\\n\\ndef there():\\n    return wave.__name__"
print(run.run(program, "assert there() == 'wave'", run.ProgramLimits(), "limits").reason)
try:
    run._try_level("limits")
except StudyError as error:
    print(error)
"""


def test_the_weaker_sandbox_is_refused_if_its_user_cannot_read_the_interpreter(tmp_path: Path) -> None:
    """If root starts the sandbox, the program belongs to another user, and its imports would fail.

    The script hides the interpreter's folder from other users, in its own mount namespace.
    """
    if os.getuid() != 0:
        pytest.skip("not root: programs run as the user that starts them")
    done = subprocess.run(
        [sys.executable, "-B", "-c", HIDDEN],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    why, refusal = done.stdout.splitlines() or [done.stderr, ""]
    assert why == "ModuleNotFoundError: No module named 'wave'"
    assert "cannot read Python in" in refusal
    assert refusal.endswith("let every user read it")
