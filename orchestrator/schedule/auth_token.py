"""Ray's token, which lets a process into a Ray: a file that only its user may read.

Ray 2.60 makes `~/.ray/auth_token` for the first Ray that it starts here, and users of a cluster put its token
there. Ray leaves the mode of the file to the umask, by which most systems let everybody read it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from orchestrator.record import files

BYTES = 32  # of randomness, as Ray's own tokens
OTHERS = 0o077  # the permissions of everybody but the user


def keep_private(create: bool) -> None:
    """Let nobody but the user read the file, and make it where it is missing.

    Where that is impossible (a home folder that cannot be written, a file of another user) nothing happens:
    Ray reads or makes the file as it would have done.

    Args:
        create: whether to make the file, for a Ray that is about to start here.
    """
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        if path.exists():
            mode = path.stat().st_mode
            if mode & OTHERS:
                path.chmod(mode & ~OTHERS)
        elif create and _ray_makes_one():
            _make(path)


def _ray_makes_one() -> bool:
    """Tell whether Ray would make the file: it has no other token, and nobody has turned tokens off."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return not named and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _make(path: Path) -> None:
    """Make the file with a new token, whole or not at all; one that another process makes now stays."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(BYTES))
        files.link(part, path)
    finally:
        part.unlink(missing_ok=True)
