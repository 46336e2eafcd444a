"""Protection of the file with Ray's authentication token, which only its user may read.

Ray 2.60 writes a new token to `~/.ray/auth_token` when it starts a local Ray and the file does not exist. The
user of a remote cluster copies that cluster's token to this file. Ray creates the file with the permissions
of the umask, which on most systems let every user read the file.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from orchestrator.util import atomic_files

TOKEN_BYTES = 32
"""Random bytes in a token, as in those that Ray makes."""
OTHER_USERS_MASK = 0o077
"""The permissions of the group and of all other users."""


def restrict_token_file(create_if_missing: bool) -> None:
    """Take the permissions of other users away from the token file.

    If that is impossible (no writable home folder, a file of another user), nothing happens: Ray then reads
    or creates the file by itself.

    Args:
        create_if_missing: True to create a missing file, because a local Ray is about to start.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        path = Path.home() / ".ray" / "auth_token"
        if path.exists():
            mode = path.stat().st_mode
            if mode & OTHER_USERS_MASK:
                path.chmod(mode & ~OTHER_USERS_MASK)
        elif create_if_missing and _ray_creates_token():
            _create_token_file(path)


def _ray_creates_token() -> bool:
    """Return whether Ray would create the file, because no variable sets a token or turns tokens off."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return not named and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _create_token_file(path: Path) -> None:
    """Create the file with a new token in one step, unless another process has created it meanwhile."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(TOKEN_BYTES))
        try:
            atomic_files.link_if_absent(draft, path)
        except OSError:  # no hard links here; a lock lets one study at a time start Ray
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
