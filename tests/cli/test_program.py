"""The program's own words: help, version, unknown commands, and the two spellings of fetch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, Run

from orchestrator.cli.commands import COMMANDS
from orchestrator.cli.option_parser import TEXT_METAVARS
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
    if name in ("study", "tuned", "sensitivity", "check"):
        words = done.stdout.split()
        assert {"lora", "pissa", "letters", "metamathqa", "--variants"} <= set(words)


def test_every_word_for_a_value_is_that_of_an_option() -> None:
    classes = [*COMMANDS.values(), *(each.options_class for each in experiments().values())]
    assert TEXT_METAVARS.keys() <= {field.name for each in classes for field in fields(each)}


def test_an_unknown_command_is_refused_with_the_nearest(run: Run) -> None:
    run(ORCHESTRATOR, "tunned").assert_refused("'tunned' is no command", "'tuned'")
    run(ORCHESTRATOR, "fetsch").assert_refused("'fetsch' is no command", "'fetch ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("study", "--varaints", "lora"), "'--varaints' is no option here. Did you mean '--variants'?"),
        (("published", "--xyz", "1"), "'--xyz' is no option here."),
        (("study", "lora"), "'lora': no option takes this word; "),
        (("study", "--rank", "8", "16"), "'16': no option takes this word"),
        (("study", "--seeds", "two"), "--seeds: 'two' must be a whole number."),
        (("study", "--dtype", "float3"), "--dtype: 'float3' must be one of: float32, bfloat16, nf4."),
        (("study", "--seeds", "--plan"), "--seeds: its value is missing; "),
        (("gc", "--older-than", "x"), "--older-than: 'x' must be a number."),
        (("report",), "STUDY is missing; "),
        (("export", "mine", "--variant"), "--variant: its value is missing; "),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(words: tuple[str, ...], expected: str, run: Run) -> None:
    run(ORCHESTRATOR, *words).assert_refused(expected)


def test_fetch_has_two_spellings(run: Run, tmp_path: Path) -> None:
    for words in (("fetch", "data"), ("fetch-data",)):
        run(ORCHESTRATOR, *words, "letters").assert_refused("'letters' needs no download")
    run(ORCHESTRATOR, "fetch", "letters").assert_refused("write `fetch model NAME` or `fetch data TASK`")


def test_fetch_alone_and_help_list_both_spellings(run: Run) -> None:
    for words in (("fetch",), ("fetch", "--help"), ("--help",)):
        done = run(ORCHESTRATOR, *words)
        assert done.returncode == 0
        assert "  fetch model  Prepare" in done.stdout
        assert "  fetch data   Download" in done.stdout
