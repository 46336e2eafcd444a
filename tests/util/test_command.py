"""Signals, errors and the terminal of a command, with real processes and signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from terminal import CTRL_C, Terminal, hides_cursor

LOOP = "while not done.wait(0.05): pass"
HEAD = """
import subprocess, sys, threading, time
from orchestrator.util.command import graceful_interrupts, main
from orchestrator.util.errors import StudyError
class Done:
    is_set = False
    def set(self):
        self.is_set = True
    def wait(self, seconds=None):
        time.sleep(seconds or 0.05)
        while seconds is None and not self.is_set:
            time.sleep(0.05)
        return self.is_set
done = Done()
def started():
    print("started", flush=True)
"""
"""`Done` has no lock, unlike `threading.Event`: a signal handler that calls `Event.set` in the main thread
waits for ever if the signal has interrupted `Event.wait` while that held the lock."""


def _start(body: str, *words: str) -> subprocess.Popen[str]:
    """Start a process that runs `body` as its command. Returns when it has printed "started"."""
    program = HEAD + "def run():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "main(run)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert _line(process) == "started\n"
    return process


def _line(process: subprocess.Popen[str]) -> str:
    """Return the next line of the process's output."""
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


def test_the_second_signal_ends_the_process_and_its_children_at_once():
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    process = _start(
        f"{child}\nwith graceful_interrupts(lambda: print('heard', flush=True)):\n    started()\n    {LOOP}"
    )
    (other,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert _line(process) == "heard\n", "the first signal ends nothing"
    process.send_signal(signal.SIGINT)
    assert _end(process) == (130, "", "")
    assert not psutil.wait_procs([other], timeout=200)[1]


SHORT = "from orchestrator.util import timeouts\ntimeouts.INTERRUPT_TIMEOUT_SECONDS = 1"
DROPPED = """
class Dropping:
    def __del__(self):  # as in a callback of Python's imports, nobody gets an exception of this
        started()
        time.sleep(600)
Dropping()
"""


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        (f"{DROPPED}{LOOP}", "Exception ignored in"),
        ("with graceful_interrupts(done.set):\n    started()\n    while True: pass", ""),
    ],
    ids=["Python has dropped the exception", "the work goes on"],
)
def test_the_system_ends_what_does_not_end_after_an_interrupt(body, printed):
    process = _start(f"{SHORT}\n{body}")
    process.send_signal(signal.SIGINT)
    code, _, err = _end(process)
    assert code == -signal.SIGALRM
    assert printed in err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stdout_or_stderr_changes_no_exit_code(closed):
    code = "from orchestrator.util.command import main; main(lambda: print('said') or 3)"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == ("said\n" if closed == "2>&-" else "")


# -- in a terminal -------------------------------------------------------------------------------------------

LIVE = """
import tempfile
from pathlib import Path
from rich.console import Console
from orchestrator.execution.progress import Progress
folder = Path(tempfile.mkdtemp())
progress = Progress(folder, 5, 0, Console(file=sys.stdout))
def started():
    print("started", file=sys.__stdout__, flush=True)
"""
"""Code that creates a study's live line. While it is shown, prints go to a file, except in `started`."""


def _in_a_terminal(folder: Path, body: str) -> Terminal:
    """Run `body` as the command of a process in a terminal, and return once it has printed "started"."""
    program = folder / "x.py"
    program.write_text(f"{HEAD}{LIVE}def run():\n{textwrap.indent(body, '    ')}\nmain(run)\n")
    terminal = Terminal(program)
    terminal.wait_for("started\r\n")
    return terminal


def test_the_line_after_ctrl_c_has_a_line_of_its_own(tmp_path):
    terminal = _in_a_terminal(tmp_path, f"started()\n{LOOP}")
    terminal.type(CTRL_C)
    code, lines = terminal.end()
    assert "^C" in terminal.shown, "the terminal has echoed it"
    assert (code, lines) == (130, ["started", f"interrupted; to go on: python {tmp_path}/x.py"])


def test_a_message_before_the_live_line_has_a_line_of_its_own(tmp_path):
    body = (
        f"with progress, graceful_interrupts(done.set):\n    started()\n    {LOOP}\n"
        "    progress.notify('Ctrl-C: trainers save')"
    )
    terminal = _in_a_terminal(tmp_path, body)
    terminal.type(CTRL_C)
    assert terminal.end() == (0, ["started", "Ctrl-C: trainers save"])


def test_a_second_ctrl_c_leaves_neither_live_line_nor_hidden_cursor(tmp_path):
    body = (
        "with progress, graceful_interrupts(lambda: progress.notify('heard')):\n"
        "    started()\n    progress.refresh()\n    while True: time.sleep(0.05)"
    )
    terminal = _in_a_terminal(tmp_path, body)
    terminal.wait_for("0/5 done")
    terminal.type(CTRL_C)
    terminal.wait_for("heard")
    terminal.wait_for("0/5 done")
    terminal.type(CTRL_C)
    assert terminal.end() == (130, ["started", "heard"])
    assert not hides_cursor(terminal.shown)
