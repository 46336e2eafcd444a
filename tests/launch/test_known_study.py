"""A command whose results are all known loads and makes nothing that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from untrained_base import base

from orchestrator.launch.experiment import Experiment
from orchestrator.launch.study_context import resolve_study
from orchestrator.record.schema import Evaluation, Record
from orchestrator.study.options import StudyOptions
from variants import catalogue

__all__ = ["base"]

EXPERIMENT = Experiment("lr_sensitivity", "?", ("lora",), ("letters",), ("letters",))
MAIN = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {without}: raise ImportError(name + " is not needed")
sys.meta_path.insert(0, Refuse())
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


def run_without(without: tuple[str, ...], module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process in which an import of some modules fails."""
    command = [sys.executable, "-c", MAIN.format(without=without, module=module), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})


@pytest.fixture
def words(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the words of a study of which the store has all results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalogue._built_in_traits.cache_clear()  # so that they are kept in this cache folder
    output, rates = tmp_path / "results", ("1e-3", "1e-2")
    options = StudyOptions(
        task=("letters",), variants=("lora", "rslora"), model=str(base), learning_rates=rates, seeds=2,
        output=output, gpus_per_worker=0,
    )  # fmt: skip
    context = resolve_study(EXPERIMENT, options)
    assert context.design is not None
    for configuration in context.design.request({}):
        scores = {"loss": 1.0, "exact_match": 0.5 + configuration.optimizer.learning_rate}
        evaluations = tuple(Evaluation(4, split, scores) for split in ("validation", "test"))
        context.store.put(
            Record(configuration.fingerprint, configuration, "finished", 4, evaluations=evaluations)
        )
    return [
        *("study", "--task", "letters", "--variants", "lora", "rslora", "--model", str(base), "--seeds", "2"),
        *("--learning-rates", *rates, "--widen", "0", "--output", str(output)),
    ]


def test_a_plan_of_known_results_needs_no_torch(words: list[str]) -> None:
    """A variant that is trained is tried on a model without weights, which takes torch and transformers."""
    done = run_without(("torch", "transformers", "mlflow", "ray"), "orchestrator", *words, "--plan")
    assert done.returncode == 0, done.stderr
    assert "8, of them 8 known" in done.stdout
    refused = run_without((), "orchestrator", *words, "--plan", "--rank", "100000")
    assert refused.returncode == 2
    assert "rank" in refused.stderr


def test_the_second_listing_of_variants_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows from the source files alone is kept in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "torch is not needed" in run_without(("torch",), "variants").stderr
    first = run_without((), "variants")
    assert first.returncode == 0, first.stderr
    second = run_without(("torch",), "variants")
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    (kept,) = (tmp_path / "lora-orchestrator").iterdir()
    kept.write_text(kept.read_text().replace('"sources": "', '"sources": "of other files '))
    assert "torch is not needed" in run_without(("torch",), "variants").stderr
