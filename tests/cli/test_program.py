"""The program's own words: help, version, unknown commands, the two spellings of fetch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, SWEEP, Run

from orchestrator.cli.commands import COMMANDS
from orchestrator.experiments import MODULES


def test_help_and_version(run: Run) -> None:
    for words in ((), ("--help",), ("-h",)):
        done = run(ORCHESTRATOR, *words)
        assert done.returncode == 0
        assert "python -m orchestrator study --dry-run" in done.stdout
        names = [name.replace("fetch-", "fetch ") for name in (*COMMANDS, *MODULES)]
        assert all(f"  {name} " in done.stdout for name in names)
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert run(ORCHESTRATOR, "--version").stdout.startswith("lora-orchestrator ")


@pytest.mark.parametrize("name", [*COMMANDS, *MODULES])
def test_the_help_of_a_command_fits_the_terminal(name: str, run: Run, tmp_path: Path) -> None:
    script = tmp_path / "lora-orchestrator"
    script.write_text("from orchestrator.cli.program import main\nmain()\n")  # as pip writes it
    done = run(script, name, "--help")
    assert done.returncode == 0
    assert f"usage: lora-orchestrator {name.replace('fetch-', 'fetch ')} " in done.stdout
    assert not [line for line in done.stdout.splitlines()[1:] if len(line) > 80]
    assert "None" not in done.stdout, "a word for the reader, or no word"
    assert "[STR" not in done.stdout
    if name in ("study", "tuned", "sensitivity"):
        words = done.stdout.split()
        assert {"lora", "pissa", "letters", "metamathqa", "--variants"} <= set(words)


def test_help_imports_nothing_heavy() -> None:
    """Use a fresh interpreter, because other tests import these packages. Help has to appear at once."""
    probe = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'ray', 'transformers', 'datasets', 'mlflow', 'pyarrow', 'scipy', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    command = [sys.executable, "-c", probe, str(SWEEP), str(ORCHESTRATOR)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--learning-rates" in done.stdout
    assert all(name in done.stdout for name in ("sync", "show", "report", "fetch model"))
    assert done.stdout.splitlines()[-1] == "[]"
