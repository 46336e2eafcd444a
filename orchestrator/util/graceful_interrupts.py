"""End of a command on Ctrl-C or SIGTERM, also while its main thread is inside a library."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType
from typing import NoReturn, TextIO, TypeGuard

from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import redact_secrets

CLEAR_LINE = "\r\x1b[K"
"""Control characters that clear the cursor's line on a terminal."""


def print_status(text: str) -> None:
    """Print on a terminal what the next seconds are spent on, before slow imports.

    Nothing is printed where stderr is no terminal: a script that reads it finds errors only.
    """
    if is_terminal(sys.__stderr__):
        print(text, file=sys.__stderr__, flush=True)


def print_on_own_line(text: str) -> None:
    """Print `text` on a line of its own.

    On a terminal the line is cleared first: it may hold a typed ^C, or a study's live line. `sys.stderr` is
    not used, because it is a file while a study trains.
    """
    clear = CLEAR_LINE if is_terminal(sys.__stderr__) else ""
    print(f"{clear}{text}", file=sys.__stderr__, flush=True)


def is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    """Return whether `stream` is open and connected to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


EXIT_FAILED = 1
"""Exit code when something outside the command went wrong."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""

PROGRAM = "lora-orchestrator"
"""Name of the command that the installation creates."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # cluster managers send SIGTERM
_SHOW_CURSOR = "\x1b[?25h"  # a study's live line hides it


def format_command(arguments: Sequence[str]) -> str:
    """Return the command with these arguments as a line for a shell, without secrets.

    Args:
        arguments: `sys.argv`, or the arguments of `python`; none in an interactive session. The installed
            command `lora-orchestrator` and `python -m orchestrator` are written as a user types them, without
            the path of their file.
    """
    program, *others = arguments or [""]
    path = PurePath(program)
    if path.stem == PROGRAM:
        words = [PROGRAM]
    elif path.parts[-2:] == ("orchestrator", "__main__.py"):
        words = ["python", "-m", "orchestrator"]
    else:
        words = ["python", program] if program else ["python"]
    return shlex.join(map(redact_secrets, [*words, *others]))


class InterruptHandler:
    """The process's reaction to SIGINT and SIGTERM.

    The first signal raises KeyboardInterrupt in the main thread, or calls `stop_gracefully`; inside
    `exit_on_interrupt` it ends the process. The second signal always ends the process at once.

    A thread listens to signals as well, because an exception in the main thread is not enough: Python drops
    one that is raised in a callback of its imports, the main thread may be inside a library for minutes, and
    even `time.sleep` misses a signal that arrives between Python's check and the system call.
    """

    def __init__(self) -> None:
        self.handled_count = 0
        """Signals that the main thread has handled."""
        self.listener_count = 0
        """Signals that the listening thread has received while `stop_gracefully` was set."""
        self.stop_gracefully: Callable[[], None] | None = None
        self.before_exit: Callable[[], object] | None = None
        self.exit_lock = threading.Lock()
        """The thread that ends the process acquires this lock and never releases it."""
        self.is_resume_command_printed = False
        self.command = ""
        """The command that continues this one; empty for the command of this process."""
        self._read_fd, self._write_fd = -1, -1

    def install(self) -> None:
        """Install the handlers, also in place of those that a library has installed since the last call."""
        if self._read_fd < 0:
            self._read_fd, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """React to a signal in the main thread."""
        self.handled_count += 1
        if self.handled_count > 1:
            exit_immediately()
        if self.before_exit is not None:
            return
        if self.stop_gracefully is None:
            raise KeyboardInterrupt
        self.stop_gracefully()

    def raise_if_interrupted(self) -> None:
        """Raise the KeyboardInterrupt that Python has dropped, if there was one."""
        if self.handled_count:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        while True:
            number = os.read(self._read_fd, 1)[0]
            if number not in _SIGNALS:
                continue
            with self.exit_lock:
                if self.before_exit is not None:
                    self._run_before_exit(self.before_exit)
            if self.stop_gracefully is None:
                self._wait_for_signal(timeouts.INTERRUPT_TIMEOUT_SECONDS)
                if self.handled_count:  # else another library handles the signals now
                    self.print_resume_command()
                    exit_immediately()
                continue
            self.listener_count += 1
            if self.listener_count > 1 and signal.getsignal(number) == self.handle_signal:
                exit_immediately()

    def _run_before_exit(self, before_exit: Callable[[], object]) -> NoReturn:
        """End the process after `before_exit`, or sooner at a second signal."""
        self.print_resume_command()
        closing = threading.Thread(target=before_exit, daemon=True)
        closing.start()
        while closing.is_alive() and not self._wait_for_signal(0.05):
            pass
        exit_immediately()

    def _wait_for_signal(self, seconds: float) -> bool:
        return bool(select.select([self._read_fd], [], [], seconds)[0])

    def resume_command(self) -> str:
        """Return the command that continues this one, as a line for a shell without secrets."""
        return self.command or format_command(sys.orig_argv[1:])

    def print_resume_command(self) -> None:
        """Print, once, the command that continues this one."""
        if not self.is_resume_command_printed:
            self.is_resume_command_printed = True
            print_on_own_line(f"interrupted; to go on: {self.resume_command()}")


interrupt_handler = InterruptHandler()


@contextmanager
def exit_on_interrupt(before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End the process at the first signal inside the block, whatever the main thread is doing.

    Used for the start of Ray, which installs its own handlers and may wait for processes that the same signal
    has ended. The command that continues is printed first.

    Args:
        before_exit: Called, and waited for, before the process ends.

    Raises:
        KeyboardInterrupt: A signal arrived before the block or, by way of Ray's own handler, inside it.
    """
    interrupt_handler.raise_if_interrupted()
    interrupt_handler.before_exit = before_exit
    try:
        yield
    except SystemExit:  # raised by a handler of Ray's
        raise KeyboardInterrupt from None
    finally:
        with interrupt_handler.exit_lock:
            interrupt_handler.before_exit = None
        interrupt_handler.install()
    interrupt_handler.raise_if_interrupted()


@contextmanager
def graceful_interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal inside the block and raise nothing, so that the work ends by itself.

    Handlers that libraries have installed, before or inside the block, are replaced.
    """
    interrupt_handler.install()
    interrupt_handler.stop_gracefully = stop
    try:
        yield
    finally:
        interrupt_handler.stop_gracefully = None
        interrupt_handler.install()


@contextmanager
def borrowed_signals(command: str) -> Iterator[None]:
    """Restore the signal handlers of the embedding program, such as a notebook, at the end of the block.

    Args:
        command: The shell command that does the same as the block, printed if the process has to end.

    Raises:
        UsageError: This is not the main thread, the only one that can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("a study runs in the main thread, for Ctrl-C; call run(study) there.")
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    interrupt_handler.command, interrupt_handler.is_resume_command_printed = command, False
    try:
        yield
    finally:
        interrupt_handler.command = ""
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        interrupt_handler.handled_count = interrupt_handler.listener_count = 0


def interrupt_main_thread() -> None:
    """Raise KeyboardInterrupt in the main thread, from another one, inside `graceful_interrupts`.

    Used when everything is saved, but a library's loop in the main thread would take long to end.
    """
    interrupt_handler.stop_gracefully = None
    interrupt_handler.handled_count = interrupt_handler.listener_count = 0
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)  # a real signal wakes a thread that sleeps


def exit_immediately() -> NoReturn:
    """End this process and all processes that it has started, such as a local Ray's, without any cleanup.

    No cleanup is needed, because files are complete at any moment.
    """
    try:
        import psutil

        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.Error:
                continue
        if is_terminal(sys.__stdout__):
            os.write(sys.__stdout__.fileno(), f"{CLEAR_LINE}{_SHOW_CURSOR}".encode())
    finally:
        os._exit(EXIT_INTERRUPTED)
