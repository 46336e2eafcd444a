"""What may be in no file, message or process listing: passwords in URIs, the environment's secrets.

A secret is used from where it is: the environment, a command line. What this project writes, or has others
write (records with their tracebacks, MLflow's tags, reports, logs), goes through `without_secrets` first.
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
"""In place of a secret."""

_SECRET_NAMES = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(API|ACCESS|SECRET)_?KEY)$")
_MIN_SECRET_LENGTH = (
    8  # characters: shorter ones are everyday words, too, and would make holes in every traceback
)
_URI_SECRETS = (
    re.compile(r"(://[^/@:\s]*:)(\S*)(?=@)"),
    re.compile(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)\w*=)([^&\s]+)"),
)


def redact_secrets(text: str) -> str:
    """`text` with stars for the passwords of the URIs in it (u:***@host, ?password=***) and for the values of
    this process's variables whose names end like HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD."""
    return _redact(text, lambda secret: REDACTED)


def _redact(text: str, mask: Callable[[str], str]) -> str:
    known = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_NAMES.search(name)
    }
    for value in sorted(known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, mask(value))
    for pattern in _URI_SECRETS:
        text = pattern.sub(lambda found: found[1] + mask(found[2]), text)
    return text


@contextmanager
def redact_errors(*preserved_types: type[Exception]) -> Iterator[None]:
    """An error that says a secret is raised again without it, as what it was for the types `kept`, else as a
    RuntimeError with the old one's traceback for words: whoever catches it (Ray) may log all of it."""
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
    """Writes stars over the passwords in this process's own command line: everybody on a machine may read it
    (`ps`), and Ray keeps it as the job's entry point. Only on Linux. `sys.argv` stays."""
    with suppress(OSError, ValueError, IndexError):
        line = Path("/proc/self/cmdline").read_bytes()
        words = [_redact(os.fsdecode(word), _mask_same_length) for word in line.split(b"\0")]
        hidden = b"\0".join(map(os.fsencode, words))
        # After the name, which may hold anything: the fields from the third on; see proc(5), arg_start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        first, last = int(fields[45]), int(fields[46])
        if hidden != line and first and last - first == len(hidden):
            ctypes.memmove(first, hidden, len(hidden))


def _mask_same_length(secret: str) -> str:
    """As many bytes: the words of a command line lie one behind the other."""
    return "*" * len(os.fsencode(secret))
