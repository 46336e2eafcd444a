"""Report what goes wrong in a user's Python file in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.util.errors import StudyError, UsageError, format_error


@contextmanager
def report_user_errors(name: str, action: str) -> Iterator[None]:
    """Turn what the code of the task `name` raises into a BadInput of one line, if the task is a user's file.

    SystemExit and all other BaseExceptions as well: sys.exit in the file would end the study, with an exit
    code of its own. Errors of the project's own tasks are bugs and keep their tracebacks.

    Args:
        name: The task's name; a user's is the path of its file.
        doing: What fails, in words that follow the name.

    Raises:
        BadInput: The code of the file raised anything but BadInput, Trouble or KeyboardInterrupt.
    """
    try:
        yield
    except (UsageError, StudyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if not name.endswith(".py"):
            raise
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name
        ]
        where = f" (line {lines[-1]})" if lines else ""
        if isinstance(error, SystemExit):
            said = f"sys.exit({'' if error.code is None else error.code}) would end the study; take it out"
        else:
            said = format_error(error)
        raise UsageError(f"Task file {name!r}{where} {action}: {said}") from error
