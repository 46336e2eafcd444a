"""How every command of this project ends: an exit code, and for a wrong value one line."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, TextIO, TypeGuard

from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError, describe_disk_error
from orchestrator.util.redaction import redact_process_arguments, redact_secrets

EXIT_FAILED = 1
"""The exit code when something outside the command went wrong."""
EXIT_INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM."""
EXIT_LIMIT_REACHED = 3
"""The exit code of a study that a limit has ended before all was trained."""

CLEAR_LINE = "\r\x1b[K"
"""What clears the line of a terminal that the cursor is in."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a cluster's manager sends the second one


def main(run: Callable[[], int | None]) -> NoReturn:
    """Calls `run` and exits with what it returns (None is 0).

    A `BadInput` is a line on stderr and exit code 2, a `Trouble` one line and exit code 1, Ctrl-C (or
    SIGTERM) is the command that goes on and exit code 130, all without a traceback. A full disk, or a file
    that the operating system refuses (no permission, a folder in its place, ...), is one line and exit code
    1, too. A second Ctrl-C ends the process at once, and all that it has started. Any other
    exception is a bug and shows itself. No secret is in what is said, nor, from here on, in this process's
    command line.
    """
    for name in ("stdout", "stderr"):
        if (
            getattr(sys, name) is None
        ):  # closed by the shell: the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    redact_process_arguments()
    sys.excepthook = _print_exception
    _interrupt_handler.install()
    try:
        code = run() or 0
        sys.stdout.flush()
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"error: {redact_secrets(line)}", file=sys.stderr)
        code = 2
    except StudyError as error:
        print(f"error: {redact_secrets(str(error))}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        _interrupt_handler.print_resume_command()
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `... show abc | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        line = describe_disk_error(error)
        if not line and isinstance(error, OSError) and error.filename is not None and error.strerror:
            line = f"{error.filename}: {error.strerror}; make it usable, or move it away"
        if not line:
            raise
        print(f"error: {redact_secrets(line)}", file=sys.stderr)
        code = EXIT_FAILED
    sys.exit(code)


def format_command(arguments: Sequence[str]) -> str:
    """The command with these arguments as one types it, for files and people: without secrets."""
    return shlex.join(["python", *map(redact_secrets, arguments)])


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact_secrets("".join(traceback.format_exception(kind, error, trace))))


class _InterruptHandler:
    """The first signal raises KeyboardInterrupt, or calls what is to end the work gently; inside
    `ending_at_once` it ends the process. The second one does so anywhere.

    A thread hears of signals too, as an exception is not enough: it may be raised where Python drops it (in a
    callback of its imports), or the main thread may be deep in a library and see no signal for minutes. Even
    `time.sleep` sees none that arrives between Python's check for signals and the system call."""

    def __init__(self) -> None:
        self.handled_count = 0
        """How many signals the main thread has handled."""
        self.listener_count = 0
        """How many signals have reached the listening thread while the work was to end by itself."""
        self.stop_gracefully: Callable[[], None] | None = None
        self.before_exit: Callable[[], object] | None = None
        self.exit_lock = threading.Lock()
        """Held for good by the thread that ends the process."""
        self.is_resume_command_printed = False
        self._read_fd, self._write_fd = -1, -1

    def install(self) -> None:
        if self._read_fd < 0:
            self._read_fd, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        self.handled_count += 1
        if self.handled_count > 1:
            _exit_immediately()
        if self.before_exit is not None:
            return
        if self.stop_gracefully is None:
            raise KeyboardInterrupt
        self.stop_gracefully()

    def raise_if_interrupted(self) -> None:
        """Raises KeyboardInterrupt when there was a signal, which Python has dropped."""
        if self.handled_count:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        while True:
            number = os.read(self._read_fd, 1)[0]
            if number not in _SIGNALS:
                continue
            with self.exit_lock:
                if self.before_exit is not None:
                    self.print_resume_command()
                    ends = threading.Thread(target=self.before_exit, daemon=True)
                    ends.start()
                    while ends.is_alive() and not self._wait_for_signal(0.05):
                        pass
                    _exit_immediately()
            if self.stop_gracefully is None:
                self._wait_for_signal(timeouts.INTERRUPT_TIMEOUT_SECONDS)
                if self.handled_count:  # else the handler is another's
                    self.print_resume_command()
                    _exit_immediately()
                continue
            self.listener_count += 1
            if self.listener_count > 1 and signal.getsignal(number) == self.handle_signal:
                _exit_immediately()

    def _wait_for_signal(self, seconds: float) -> bool:
        return bool(select.select([self._read_fd], [], [], seconds)[0])

    def print_resume_command(self) -> None:
        if not self.is_resume_command_printed:
            self.is_resume_command_printed = True
            print_on_own_line(f"interrupted; to go on: {format_command(sys.orig_argv[1:])}")


_interrupt_handler = _InterruptHandler()


@contextmanager
def exit_on_interrupt(before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Around the start of Ray, which takes the signals and, deep inside, waits for processes that the same
    signal may have ended. Inside, in the main thread, the first signal ends the process, whatever the main
    thread is about: the command that goes on is said, and `last` is called and waited for."""
    _interrupt_handler.raise_if_interrupted()
    _interrupt_handler.before_exit = before_exit
    try:
        yield
    except SystemExit:  # raised by a handler of Ray's
        raise KeyboardInterrupt from None
    finally:
        with _interrupt_handler.exit_lock:
            _interrupt_handler.before_exit = None
        _interrupt_handler.install()
    _interrupt_handler.raise_if_interrupted()


@contextmanager
def graceful_interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, in the main thread, the first Ctrl-C calls `stop` and raises nothing: what runs there ends by
    itself. Libraries that were started meanwhile may have taken the signals: they are taken back."""
    _interrupt_handler.install()
    _interrupt_handler.stop_gracefully = stop
    try:
        yield
    finally:
        _interrupt_handler.stop_gracefully = None
        _interrupt_handler.install()


def interrupt_main_thread() -> None:
    """Called by another thread inside `gently`, when all is saved: KeyboardInterrupt in the main thread,
    where somebody else's loop would take its time to end."""
    (
        _interrupt_handler.stop_gracefully,
        _interrupt_handler.handled_count,
        _interrupt_handler.listener_count,
    ) = None, 0, 0
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)  # a real one: it wakes a thread that sleeps


def exit_with_error(message: str, before_exit: Callable[[], object] = lambda: None) -> NoReturn:
    """Print one `error:` line, then end this process with exit code 1, and all processes that it has started.

    Another thread than the main one calls this, when a call into a library blocks the main thread.

    Args:
        error: The line, without `error:`.
        last: Called after the line is printed; the process ends when it returns or raises.
    """
    with _interrupt_handler.exit_lock:
        try:
            print_on_own_line(f"error: {redact_secrets(message)}")
        finally:
            try:
                before_exit()
            finally:
                _exit_immediately(EXIT_FAILED)


def _exit_immediately(code: int = EXIT_INTERRUPTED) -> NoReturn:
    """Nothing is tidied up: what is on disk is whole at any moment. Processes of ours, such as those of a Ray
    that was started here, would outlive us."""
    try:
        import psutil

        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.Error:
                continue
        if _is_terminal(sys.__stdout__):
            show_cursor = "\x1b[?25h"  # the live line hides it
            os.write(sys.__stdout__.fileno(), f"{CLEAR_LINE}{show_cursor}".encode())
    finally:
        os._exit(code)


def print_status(text: str) -> None:
    """Print `text` if stderr is a terminal: what the next seconds are spent on, before the slow imports.

    Where stderr is no terminal nothing is printed: a script that reads it shall find errors and nothing else.
    """
    if _is_terminal(sys.__stderr__):
        print(text, file=sys.__stderr__, flush=True)


def print_on_own_line(text: str) -> None:
    """Print `text` on the process's first stderr, on a line of its own.

    On a terminal the line is cleared before: it may hold a typed ^C, or a study's live line. `sys.stderr` is
    not used, because it is a file while a study trains.
    """
    clear = CLEAR_LINE if _is_terminal(sys.__stderr__) else ""
    print(f"{clear}{text}", file=sys.__stderr__, flush=True)


def _is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    return stream is not None and not stream.closed and stream.isatty()
