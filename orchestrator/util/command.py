"""Start and end of all commands: exit codes, error lines, Ctrl-C and SIGTERM, status lines on a terminal."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePath
from types import FrameType, TracebackType
from typing import NoReturn, TextIO, TypeGuard

from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError, describe_disk_error
from orchestrator.util.redaction import redact_process_arguments, redact_secrets

PROGRAM = "lora-orchestrator"
"""Name of the command that the installation creates."""
EXIT_FAILED = 1
"""Exit code when something outside the command went wrong."""
EXIT_USAGE = 2
"""Exit code for a wrong value on the command line or in a file."""
EXIT_LIMIT_REACHED = 3
"""Exit code of a study that a limit has ended before everything was trained."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""
CLEAR_LINE = "\r\x1b[K"
"""Control characters that clear the cursor's line on a terminal."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # cluster managers send SIGTERM
_SHOW_CURSOR = "\x1b[?25h"  # a study's live line hides it


def main(run: Callable[[], int | None]) -> NoReturn:
    """Call `run` and exit with the code that it returns (None is 0).

    These errors are printed without a traceback: a UsageError (one line for each reason, exit code 2), a
    StudyError, a full disk and a file that the operating system refuses (one line, exit code 1), and Ctrl-C
    or SIGTERM (the command that continues, exit code 130). A second signal ends the process at once, with all
    processes that it has started. Any other exception is a bug and keeps its traceback. Secrets are removed
    from everything that is printed, and from this process's command line.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the next opened file would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open until the process ends
    redact_process_arguments()
    sys.excepthook = _print_exception
    interrupt_handler.install()
    try:
        code = run() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        interrupt_handler.print_resume_command()
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `... show abc | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        lines = _describe(error)
        if not lines:
            raise
        for line in lines:
            print(f"error: {redact_secrets(line)}", file=sys.stderr)
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    sys.exit(code)


def _describe(error: Exception) -> list[str]:
    """Return the lines for an error that the user can fix; none for a bug."""
    if isinstance(error, UsageError):
        return str(error).splitlines()
    if isinstance(error, StudyError):
        return [str(error)]
    line = describe_disk_error(error)
    if not line and isinstance(error, OSError) and error.filename is not None and error.strerror:
        line = f"{error.filename}: {error.strerror}; make it usable, or move it away"
    return [line] if line else []


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact_secrets("".join(traceback.format_exception(kind, error, trace))))


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

    The first signal calls `stop_gracefully`, or raises KeyboardInterrupt without it. The second one ends the
    process at once. The system ends a process that is still there `INTERRUPT_TIMEOUT_SECONDS` after the first
    one was handled, for example because Python has dropped the exception in a callback.
    """

    def __init__(self) -> None:
        self.count = 0
        """Signals that were handled."""
        self.stop_gracefully: Callable[[], None] | None = None
        self.command = ""
        """The command that continues this one; empty for the command of this process."""

    def install(self) -> None:
        """Install the handlers, also in place of those that a library has installed since the last call."""
        for number in _SIGNALS:
            signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """React to a signal in the main thread."""
        self.count += 1
        if self.count > 1:
            exit_immediately()
        signal.alarm(int(timeouts.INTERRUPT_TIMEOUT_SECONDS))  # nothing handles SIGALRM
        if self.stop_gracefully is None:
            raise KeyboardInterrupt
        self.stop_gracefully()

    def print_resume_command(self) -> None:
        """Print the command that continues this one, as a line for a shell without secrets."""
        print_on_own_line(f"interrupted; to go on: {self.command or format_command(sys.orig_argv[1:])}")


interrupt_handler = InterruptHandler()


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
        command: The shell command that does the same as the block.

    Raises:
        UsageError: This is not the main thread, the only one that can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("a study runs in the main thread, for Ctrl-C; call run(study) there.")
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    interrupt_handler.command = command
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        interrupt_handler.command, interrupt_handler.count = "", 0


def interrupt_main_thread() -> None:
    """Raise KeyboardInterrupt in the main thread, from another one, inside `graceful_interrupts`.

    Used when everything is saved, but a library's loop in the main thread would take long to end.
    """
    interrupt_handler.stop_gracefully, interrupt_handler.count = None, 0
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
            with suppress(psutil.Error):
                process.kill()
        if is_terminal(sys.__stdout__):
            os.write(sys.__stdout__.fileno(), f"{CLEAR_LINE}{_SHOW_CURSOR}".encode())
    finally:
        os._exit(EXIT_INTERRUPTED)
