"""One-line errors for a user's Python file."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.util.errors import StudyError, UsageError, format_error


@contextmanager
def report_user_errors(name: str, action: str) -> Iterator[None]:
    """Turn an error in a user's task file into a UsageError of one line.

    This includes SystemExit and other BaseExceptions, because sys.exit in the file would end the study with
    an exit code of its own. Errors of the project's own tasks are bugs and keep their tracebacks.

    Args:
        name: Path of the user's file; empty for a task of this project.
        action: What failed, as a phrase that follows the name in the message.

    Raises:
        UsageError: The file raised anything but UsageError, StudyError or KeyboardInterrupt.
    """
    try:
        yield
    except (UsageError, StudyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if not name:
            raise
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name
        ]
        where = f" (line {lines[-1]})" if lines else ""
        if isinstance(error, SystemExit):
            problem = f"sys.exit({'' if error.code is None else error.code}) would end the study; take it out"
        else:
            problem = format_error(error)
        kind = "Task file" if name.endswith(".py") else "Task"
        raise UsageError(f"{kind} {name!r}{where} {action}: {problem}") from error
