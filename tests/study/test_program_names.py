"""Commands that are derived from a command keep the form in which it was typed."""

from __future__ import annotations

import pytest

from orchestrator.analyze.curve_text import replicated_command
from orchestrator.experiments.catalogue import experiments
from orchestrator.record.show import replace_options
from orchestrator.study.program_names import find_script, maintenance_program, program_of
from orchestrator.util.graceful_interrupts import format_command

FORMS = {
    "installed": ("lora-orchestrator {}", ("study", "tuned", "sensitivity")),
    "module": ("python -m orchestrator {}", ("study", "tuned", "sensitivity")),
    "script": (
        "python experiments/{}.py",
        ("lr_sensitivity", "tuned_comparison", "hyperparameter_sensitivity"),
    ),
}


@pytest.mark.parametrize(("form", "names"), FORMS.values(), ids=FORMS)
def test_a_derived_command_has_the_form_of_its_source(form: str, names: tuple[str, ...]) -> None:
    study, tuned, *_ = (form.format(name) for name in names)
    for name, script in zip(names, FORMS["script"][1], strict=True):
        command = f"{form.format(name)} --seeds 3 --replicates 5"
        assert find_script(command) == script
        assert program_of(command) == form.format(name)
        assert replace_options(command, {"--rank": ["4"]}) == f"{study} --seeds 3 --rank 4"
        assert replicated_command(command) == tuned
    own = "python own/study.v2.py --rank 4"
    assert replace_options(own, {}) == own


def test_the_typed_form_is_recognized() -> None:
    assert format_command(["/env/bin/lora-orchestrator", "study", "--rank", "4"]) == (
        "lora-orchestrator study --rank 4"
    )
    assert format_command([]) == format_command([""]) == "python"  # an interactive session
    assert format_command(["/site/orchestrator/__main__.py", "check"]) == "python -m orchestrator check"
    assert maintenance_program("lora-orchestrator study") == "lora-orchestrator"
    assert maintenance_program("python experiments/lr_sensitivity.py") == "python -m orchestrator"


def test_every_experiment_has_a_command_of_its_own() -> None:
    names = {"study", "tuned", "sensitivity", "published"}
    assert set(experiments()) == names
    for name, each in experiments().items():
        assert each.summary.endswith("?")
        assert f"lora-orchestrator {name}" in each.description
