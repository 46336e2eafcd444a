"""The program's own words: help, version, unknown commands, the two spellings of fetch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, SWEEP, Run

from orchestrator.cli.commands import COMMANDS
from orchestrator.experiments.catalogue import experiments


def test_help_and_version(run: Run) -> None:
    for words in ((), ("--help",), ("-h",)):
        done = run(ORCHESTRATOR, *words)
        assert done.returncode == 0
        assert "python -m orchestrator study --dry-run" in done.stdout
        names = [name.replace("fetch-", "fetch ") for name in (*COMMANDS, *experiments())]
        assert all(f"  {name} " in done.stdout for name in names)
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert run(ORCHESTRATOR, "--version").stdout.startswith("lora-orchestrator ")


@pytest.mark.parametrize("name", [*COMMANDS, *experiments()])
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


def test_an_unknown_command_is_refused_with_the_nearest(run: Run) -> None:
    run(ORCHESTRATOR, "tunned").assert_refused("'tunned' is no command", "'tuned'")
    run(ORCHESTRATOR, "fetsch").assert_refused("'fetsch' is no command", "'fetch ")


def test_fetch_has_two_spellings(run: Run, tmp_path: Path) -> None:
    for words in (("fetch", "model"), ("fetch-model",)):
        run(ORCHESTRATOR, *words, "leters").assert_refused("'leters'")
    run(ORCHESTRATOR, "fetch", "letters").assert_refused("write `fetch model NAME`")


def test_fetch_alone_and_help_list_the_command(run: Run) -> None:
    for words in (("fetch",), ("fetch", "--help"), ("--help",)):
        done = run(ORCHESTRATOR, *words)
        assert done.returncode == 0
        assert "  fetch model  Prepare" in done.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_ADDRESS", "nonsense"),
        ("RAY_ADDRESS", "127.0.0.1:9"),
        ("RAY_ADDRESS", "head..example.org:6379"),
        ("TMPDIR", "/none"),
        ("RAY_TMPDIR", "/none"),
        ("TMPDIR", "long" * 20),
    ],
)
def test_an_environment_in_which_ray_cannot_start_is_refused_before_anything_is_pretrained(
    name: str, value: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setenv(name, value)
    run(SWEEP, "--dry-run").assert_refused(name, value)
    assert not (tmp_path / "results").exists()


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
