"""What signals do to a command, with processes and signals that are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

LOOP = "while not done.wait(0.05): pass"
HEAD = """
import subprocess, sys, threading, time
from orchestrator.study.command import gently, let_go, main
from orchestrator.study.errors import Trouble
done = threading.Event()
def started():
    print("started", flush=True)
"""


def _start(body: str, *words: str) -> subprocess.Popen[str]:
    """A process whose command does what `body` says, when it has said that it has started."""
    program = HEAD + "def run():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "main(run)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert _line(process) == "started\n"
    return process


def _line(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    return process.stdout.readline()


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_one_line_without_passwords_and_130(number):
    words = ["--tracking-uri", "postgresql://me:pl4nted@host/db", "--other=https://h?token=pl4nted"]
    process = _start(f"started()\n{LOOP}", *words)
    process.send_signal(number)
    code, out, err = _end(process)
    assert (code, out) == (130, "")
    assert err.startswith("interrupted; to go on: python -c ")
    assert err.endswith("--tracking-uri 'postgresql://me:***@host/db' '--other=https://h?token=***'\n")
    assert "pl4nted" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_inside_gently_the_work_ends_by_itself(number):
    process = _start(f"with gently(done.set):\n    started()\n    {LOOP}\nprint('tidied up')\nreturn 3")
    process.send_signal(number)
    assert _end(process) == (3, "tidied up\n", "")


def test_another_thread_may_let_go_of_work_that_does_not_end():
    body = (
        "from orchestrator.study import command\n"
        "command._interrupt._more = lambda seconds: threading.Event().wait()  # only `let_go` ends it\n"
        "try:\n    with gently(lambda: threading.Thread(target=let_go).start()):\n"
        "        started()\n        threading.Event().wait()\nfinally:\n    print('tidied up')"
    )
    process = _start(body)
    process.send_signal(signal.SIGINT)
    code, out, err = _end(process)
    assert (code, out) == (130, "tidied up\n")
    assert "Traceback" not in err


def test_the_second_signal_ends_it_at_once_with_all_that_it_started():
    """Also while the main thread is in one long call of a library, where it runs no handler of a signal."""
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    long_call = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    process = _start(
        f"import hashlib\n{child}\nwith gently(done.set):\n"
        f"    started()\n    {LOOP}\n    print('heard', flush=True)\n    {long_call}"
    )
    (other,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert _line(process) == "heard\n", "the first one has been taken and ends nothing"
    process.send_signal(signal.SIGINT)
    assert _end(process) == (130, "", "")
    assert not psutil.wait_procs([other], timeout=200)[1]


def test_a_library_that_takes_the_signals_does_not_keep_them():
    """As `ray.init` does with SIGTERM."""
    body = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
    process = _start(f"{body}with gently(done.set):\n    started()\n    {LOOP}\nreturn 4")
    os.kill(process.pid, signal.SIGTERM)
    assert _end(process)[0] == 4


DROPPED = """
from orchestrator.study import command
dropped = threading.Event()
class Dropping:
    def __del__(self):  # as in a callback of Python's imports, nobody gets an exception of this
        started()
        time.sleep(600)
def patience(seconds):
    assert seconds == command.PATIENCE_SECONDS
    dropped.wait()
command._interrupt._more = patience
Dropping()
"""
"""After a signal the process is ended from outside of the main thread as soon as `dropped` is set."""


@pytest.mark.parametrize(
    "then",
    ["with command.ending_at_once():\n    time.sleep(600)", f"dropped.set()\n{LOOP}"],
    ids=["before Ray starts", "elsewhere"],
)
def test_an_interrupt_that_python_drops_is_not_lost(then):
    """Before Ray is started it is found, elsewhere after a while."""
    process = _start(f"{DROPPED}{then}")
    process.send_signal(signal.SIGINT)
    code, out, err = _end(process)
    assert (code, out) == (130, "")
    assert "Exception ignored in" in err, "it was dropped"
    assert "\ninterrupted; to go on: python -c " in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_ray_starts_it_ends_whatever_the_main_thread_does(number):
    body = (
        "import hashlib, signal\nfrom orchestrator.study.command import ending_at_once\n"
        "with ending_at_once(lambda: print('closed', flush=True)):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    started()\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process = _start(body)
    process.send_signal(number)
    code, out, err = _end(process)
    assert (code, out) == (130, "closed\n")
    assert err.startswith("interrupted; to go on: python -c ")


def test_trouble_is_one_line_and_1():
    process = _start("started()\nraise Trouble('no seat')")
    assert _end(process) == (1, "", "error: no seat\n")
