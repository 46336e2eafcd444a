"""Redaction of secrets, typed or from the environment, in command lines, errors and tracebacks."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_main(body: str, *arguments: str, **environment: str) -> tuple[str, str, list[str]]:
    """Run a command, and return its stdout, its stderr and the words that its command line shows."""
    program = "from pathlib import Path\nfrom orchestrator.util.command import main\n"
    program += "def run():\n    print(Path('/proc/self/cmdline').read_bytes())\n"
    program += f"    {body}\nmain(run)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=240,
    )
    return done.stdout, done.stderr, done.stdout.split("\\x00")[3:-1]


def test_a_command_line_loses_its_passwords_and_nothing_else() -> None:
    uri = "--tracking-uri=postgresql://me:pässwörd@host/db?password=abc"
    _, _, words = run_main("pass", "--a", uri, "tokentoken", "", "z", SOME_TOKEN="tokentoken")
    hidden = f"--tracking-uri=postgresql://me:{'*' * 10}@host/db?password=***"
    assert words == ["--a", hidden, "*" * 10, "", "z"]
    assert run_main("pass", "--a", "b")[2] == ["--a", "b"]


def test_the_traceback_of_a_bug_has_no_secret() -> None:
    value = f"pl4nted{secrets.token_hex(16)}"
    _, error, _ = run_main(f"raise OSError('no postgresql://me:{value}@h and {value}')", DB_PASSWORD=value)
    assert error.startswith("Traceback")
    assert error.endswith("OSError: no postgresql://me:***@h and ***\n")
    assert value not in error


def test_an_error_of_a_worker_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.execution.ray_cluster import format_ray_error
    from orchestrator.finetune.failures import BrokenKind, TrainerBrokenError
    from orchestrator.util.redaction import redact_errors

    value = f"pl4nted{secrets.token_hex(16)}"
    monkeypatch.setenv("HF_TOKEN", value)
    down = OSError("the hub is down")
    down.__cause__ = KeyError(value)
    with pytest.raises(RuntimeError) as caught, redact_errors(TrainerBrokenError):
        raise down
    assert value not in str(caught.value)
    assert "KeyError: '***'" in str(caught.value)
    assert format_ray_error(caught.value) == "OSError: the hub is down"
    with pytest.raises(TrainerBrokenError, match=r"^with \*\*\*$") as kept, redact_errors(TrainerBrokenError):
        raise TrainerBrokenError(f"with {value}", BrokenKind.DEVICE_LOST)
    assert kept.value.kind is BrokenKind.DEVICE_LOST
    with pytest.raises(LookupError), redact_errors(TrainerBrokenError):
        raise LookupError("nothing to hide")
    assert format_ray_error(OSError(f"a\n{value}")) == "***"


def test_everyday_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.util.redaction import redact_secrets

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "everyday word")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    monkeypatch.setenv("SHORT_TOKEN", "lora")
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghij")
    text = "everyday word /home/me/.ray/auth_token lora"
    assert redact_secrets(text) == text
    assert redact_secrets("abcdefghij abcdefgh") == "*** ***"
