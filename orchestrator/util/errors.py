"""Errors for the user: one line that names the value, the rule and the nearest valid choice."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from variants.errors import describe_error_line
from variants.errors import format_error as format_error
from variants.errors import suggest_nearest as suggest_nearest

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    **dict.fromkeys(DISK_FULL_ERRNOS, "free some space"),
    errno.EROFS: "make it writable",
    errno.EACCES: "let this user read and write it",
    errno.EIO: "check that disk",
    errno.ESTALE: "mount its file system again",
    errno.ENOTCONN: "mount its file system again",
}
"""Remedies for errors of a disk: errno -> advice."""


class UsageError(Exception):
    """A wrong value from a command line, a file or the environment.

    Its text is one line, or one line for each of several reasons. Commands print it without a traceback and
    exit with code 2.
    """


class StudyError(Exception):
    """A failure outside the user's command that ends the study, such as a lost cluster.

    Its text is one line. Commands print it without a traceback and exit with code 1.
    """


def describe_disk_error(error: BaseException | None) -> str:
    """Describe an error of a disk that is full or cannot be used.

    Args:
        error: Any error; its causes are searched, too.

    Returns:
        A line with the remedy for the user; empty if neither the error nor its causes are errors of a disk.
    """
    if error is None:
        return ""
    found = re.search(r"\(os error (\d+)\)", str(error))  # from safetensors
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in _ADVICE:
        return describe_disk_error(error.__cause__)
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {os.strerror(number)}; {_ADVICE[number]}, then run the command again"


def quote_value(value: str) -> str:
    """Return `value` in quotation marks, with control characters escaped and a long middle left out."""
    return repr(value if len(value) <= 80 else f"{value[:50]}...{value[-20:]}")


def install_hint(extra: str) -> str:
    """Return the command that installs the packages of an extra, in a clone and beside an installed wheel.

    Args:
        extra: Name of the extra in pyproject.toml, such as "wandb".
    """
    with suppress(PackageNotFoundError):  # in a clone that is not installed
        lines = requires("lora-orchestrator") or ()
        names = [each.partition(";")[0] for each in lines if re.search(f"extra == .{extra}.$", each)]
        return shlex.join(["pip", "install", *names])
    return f"install the packages of {extra!r} in pyproject.toml"


def require_package(user: str, package: str, extra: str, otherwise: str = "") -> None:
    """Check that a package of an extra is installed, without importing it.

    Args:
        user: What needs the package, for the error: a model, a task, an option.
        package: Name of the package, as it is imported.
        extra: The extra that installs it.
        otherwise: What to do without it, for the end of the error.

    Raises:
        UsageError: The package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name, such as W&B's, is no package
        end = f"; {otherwise}" if otherwise else ""
        raise UsageError(f"{user} needs {package}, which is not installed: {install_hint(extra)}{end}")


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
        where = describe_error_line(error, name)
        if isinstance(error, SystemExit):
            problem = f"sys.exit({'' if error.code is None else error.code}) would end the study; take it out"
        else:
            problem = format_error(error)
        kind = "Task file" if name.endswith(".py") else "Task"
        raise UsageError(f"{kind} {name!r}{where} {action}: {problem}") from error
