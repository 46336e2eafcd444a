"""Removal of secrets from everything that is written: passwords in URIs, secret environment variables.

Secrets are read where the user has put them, in the environment or on a command line. All text that is
written (records with their tracebacks, MLflow's tags, reports, logs) goes through `redact_secrets` first.
"""

from __future__ import annotations

import ctypes
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REDACTED = "***"
"""The text that replaces a secret."""

_SECRET_NAMES = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(API|ACCESS|SECRET)_?KEY)$")
_MIN_SECRET_LENGTH = 8  # shorter values are everyday words, too, and would make holes in every traceback
_URI_SECRETS = (
    re.compile(r"(://[^/@:\s]*:)(\S*)(?=@)"),
    re.compile(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)\w*=)([^&\s]+)"),
)


def redact_secrets(text: str, mask: Callable[[str], str] = lambda secret: REDACTED) -> str:
    """Return `text` with stars in place of secrets.

    Secrets are passwords in URIs (u:***@host, ?password=***) and the values of environment variables whose
    names end like HF_TOKEN, AWS_SECRET_ACCESS_KEY or PGPASSWORD.

    Args:
        text: The text.
        mask: Returns the replacement of a secret.
    """
    known = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_NAMES.search(name)
    }
    for value in sorted(known, key=len, reverse=True):  # one value may contain another
        text = text.replace(value, mask(value))
    for pattern in _URI_SECRETS:
        text = pattern.sub(lambda found: found[1] + mask(found[2]), text)
    return text


@contextmanager
def redact_errors(*preserved_types: type[Exception]) -> Iterator[None]:
    """Replace an error raised inside the block by one without secrets, if its traceback contains any.

    The caller (Ray) may log the whole error.

    Args:
        *preserved_types: Error types that are raised again as the same type.

    Raises:
        RuntimeError: An error of another type contained a secret; the text is its redacted traceback.
    """
    try:
        yield
    except Exception as error:
        whole = "".join(traceback.format_exception(error))
        if redact_secrets(whole) == whole:
            raise
        kind = next((kind for kind in preserved_types if isinstance(error, kind)), None)
        arguments = (redact_secrets(a) if type(a) is str else a for a in error.args)
        raise kind(*arguments) if kind else RuntimeError(redact_secrets(whole)) from None


def redact_process_arguments() -> None:
    """Overwrite the passwords in this process's command line, on Linux. `sys.argv` is not changed.

    Everybody on the machine can read a command line (`ps`), and Ray stores it as the entry point of a job.
    """

    def mask(secret: str) -> str:  # of the same length in bytes, because the words are adjacent in memory
        return "*" * len(os.fsencode(secret))

    with suppress(OSError, ValueError, IndexError):
        line = Path("/proc/self/cmdline").read_bytes()
        hidden = b"\0".join(os.fsencode(redact_secrets(os.fsdecode(w), mask)) for w in line.split(b"\0"))
        # The process name may hold anything, so the fields are counted behind it; see proc(5), arg_start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        first, last = int(fields[45]), int(fields[46])
        if hidden != line and first and last - first == len(hidden):
            ctypes.memmove(first, hidden, len(hidden))
