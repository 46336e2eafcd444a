"""Entry point of all commands: exit codes, and one line for each error that the user can fix."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from orchestrator.util import graceful_interrupts
from orchestrator.util.errors import StudyError, UsageError, describe_disk_error
from orchestrator.util.graceful_interrupts import EXIT_FAILED, EXIT_INTERRUPTED
from orchestrator.util.redaction import redact_process_arguments, redact_secrets

EXIT_USAGE = 2
"""Exit code for a wrong value on the command line or in a file."""
EXIT_LIMIT_REACHED = 3
"""Exit code of a study that a limit has ended before everything was trained."""


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
    graceful_interrupts.interrupt_handler.install()
    try:
        code = run() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        graceful_interrupts.interrupt_handler.print_resume_command()
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
