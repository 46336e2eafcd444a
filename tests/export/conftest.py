"""A store with one trained study, which the tests of the export share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, Ended, Run
from resolved import resolve_one_task
from scripted import Script, leases, train
from trained_study import RATES, STUDY, Trained

from orchestrator.finetune.models import loading
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.grids import build_grid
from orchestrator.study.options import StudyOptions
from variants.testing.rig import one_thread


@pytest.fixture(scope="session")
def trained_once(letters_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train four lanes on `letters` without Ray, and keep the adapter of each but the worst."""
    output = tmp_path_factory.mktemp("export") / "results"
    shutil.copytree(letters_bases, output / "store" / "bases")
    store = Store(output / "store")
    configurations = []
    for variant, rates in RATES.items():
        options = StudyOptions(
            dry_run=True,
            task=("letters",),
            variants=(variant,),
            learning_rates=rates,
            steps=40,
            output=output,
        )
        chosen, templates = resolve_one_task(options, store.bases)
        configurations += build_grid(templates, chosen.learning_rates, range(1))
    with one_thread():
        for configuration in configurations:
            adapters = store.adapters / "best"
            is_kept = configuration.optimizer.learning_rate != 1e-4
            train(
                Script(leases([configuration])),
                store,
                data=store.data,
                load_base_model=lambda model, task: loading.load_base_model(model, store.bases, "cpu", task),
                adapters=adapters if is_kept else None,
            )
    names = tuple(configuration.fingerprint for configuration in configurations)
    command = "python experiments/lr_sensitivity.py --dry-run --variants lora hydra_lora full"
    StudyFile(STUDY, "Which rate?", command, names).write(output / STUDY)
    return Trained(output)


@pytest.fixture
def trained(trained_once: Trained, tmp_path: Path) -> Trained:
    """Return a copy of the trained study, so that a test may change or remove files."""
    output = tmp_path / "results"
    shutil.copytree(trained_once.output, output)
    return Trained(output)


@pytest.fixture
def export(run: Run, trained: Trained):
    """Return a function that runs `export` on the trained study, or on another one, with more arguments."""

    def export(*arguments: str, study: str = STUDY) -> Ended:
        return run(ORCHESTRATOR, "export", study, "--output", str(trained.output), *arguments)

    return export
