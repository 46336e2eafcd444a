"""The permissions of the token file of a local Ray. With a real Ray: tests/promises/test_12_security.py."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.execution.ray.auth_token import restrict_token_file


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path of a new user's token, with a umask that lets every user read new files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o022)
    yield tmp_path / ".ray" / "auth_token"
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_the_users_alone_without_hard_links(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", link)
    restrict_token_file(create_if_missing=True)
    assert (mode(token), len(token.read_text())) == (0o600, 64)
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "of mine"), ("RAY_AUTH_TOKEN_PATH", "/of/mine")],
)
def test_no_token_is_made_that_ray_would_not_make(
    token: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    restrict_token_file(create_if_missing=True)
    assert not token.exists()


def test_to_join_a_cluster_makes_no_token(token: Path) -> None:
    restrict_token_file(create_if_missing=False)
    assert not token.exists()


def test_a_home_folder_that_cannot_be_written_stops_nobody(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/here")
    restrict_token_file(create_if_missing=True)
