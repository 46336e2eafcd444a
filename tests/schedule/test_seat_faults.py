"""Lanes that fail or take their seat with them, and data that goes away: real studies on real Ray."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import study
from mlflow import MlflowClient

from orchestrator.record.schema import FAILURES_ALLOWED, Record
from orchestrator.record.store import Store

RAISES, ABORTS = 0.06, 0.5

TASK = f"""
import os
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.letters import Letters


def trip(optimizer: Any, args: Any, kwargs: Any) -> None:
    rate = optimizer.defaults["lr"]
    if rate == {RAISES}:
        raise ValueError("this rate is not to be borne")
    if rate == {ABORTS}:
        os.abort()


register_optimizer_step_pre_hook(trip)


class Tripping(Letters):
    title = "letters that trip over two learning rates"

    def pretrain_recipe(self) -> str:
        return ""
"""

VANISHING = """
from pathlib import Path

from orchestrator.finetune.tasks.base import Example, Split
from orchestrator.finetune.tasks.letters import Letters

DATA = Path({data!r})


class Vanishing(Letters):
    title = "letters of a file"

    def examples(self, split: Split, count: int) -> list[Example]:
        DATA.read_bytes()
        return super().examples(split, count)

    def pretrain_recipe(self) -> str:
        return ""
"""

WANTED_BY_DORA = """
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.letters import Letters

DATA = Path({data!r})


def read(optimizer: Any, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.ndim == 1 for p in parameters):  # DoRA has magnitudes, LoRA has none
        DATA.read_bytes()


register_optimizer_step_pre_hook(read)


class Wanted(Letters):
    title = "letters, and a file that DoRA's steps read"

    def pretrain_recipe(self) -> str:
        return ""
"""

SMALL = ("--seeds", "1", "--steps", "12", "--seats", "1", "--model", "letters-base")


def by_rate(output: Path) -> dict[float, Record]:
    records = Store(output / "store").records()
    return {record.configuration.optimizer.learning_rate: record for record in records}


@pytest.mark.timeout(900)
def test_one_lane_raises_and_one_takes_its_seat_with_it_and_the_others_finish(
    output: Path, tmp_path: Path
) -> None:
    task = tmp_path / "tripping.py"
    task.write_text(TASK)
    rates = ("1e-3", "3e-3", str(RAISES), str(ABORTS))
    process = study.start(
        output, *SMALL, "--variants", "lora", "--task", str(task), "--learning-rates", *rates
    )
    code, out, err = study.end(process, timeout=500)
    assert code == 1, out + err
    assert "2 configurations failed" in out
    found = by_rate(output)
    states = {rate: record.state for rate, record in found.items()}
    assert states == {1e-3: "finished", 3e-3: "finished", RAISES: "failed", ABORTS: "failed"}, out + err
    store = Store(output / "store")
    for rate in (RAISES, ABORTS):
        assert store.failures(found[rate].fingerprint) >= FAILURES_ALLOWED
    assert "its seat's process died while it trained alone: " in found[ABORTS].reason
    assert found[RAISES].reason == "ValueError: this rate is not to be borne"
    assert "in trip" in found[RAISES].traceback
    # Halved from four to one, and three times alone.
    assert 3 <= (out + err).count(" died: ") <= 5, out + err

    name = next(path.parent.name for path in output.glob("*/report.html"))
    runs = dict(study.children(output, name))
    assert Counter(runs.values()) == {"FINISHED": 2, "FAILED": 2}
    assert runs[found[RAISES].fingerprint] == runs[found[ABORTS].fingerprint] == "FAILED"
    client = MlflowClient(f"sqlite:///{output / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    notes = {
        run.data.tags["fingerprint"]: json.dumps(run.data.tags)
        for run in client.search_runs([experiment.experiment_id])
        if "fingerprint" in run.data.tags
    }
    assert "ValueError: this rate is not to be borne" in notes[found[RAISES].fingerprint]
    assert "in trip" in notes[found[RAISES].fingerprint], "the traceback"
    assert "died while it trained alone" in notes[found[ABORTS].fingerprint]


@pytest.mark.timeout(900)
def test_data_that_goes_away_costs_nothing_and_with_the_stores_copy_is_named_in_the_records(
    output: Path, tmp_path: Path
) -> None:
    data, task = tmp_path / "letters.txt", tmp_path / "vanishing.py"
    data.write_text("abc\n")
    task.write_text(VANISHING.format(data=str(data)))
    arguments = (*SMALL, "--variants", "lora", "--task", str(task), "--learning-rates")
    # Once Ray starts the examples are in the store.
    process = study.start(output, *arguments, "3e-3")
    study.wait_for(lambda: "Ray started here" in study.log(output), 200, process)
    data.unlink()
    code, out, err = study.end(process, timeout=400)
    assert code == 0, out + err
    kept = by_rate(output)
    assert {rate: record.state for rate, record in kept.items()} == {3e-3: "finished"}

    data.write_text("abc\n")
    process = study.start(output, *arguments, "1e-3", "1e-2")
    study.wait_for(lambda: study.log(output).count("Ray started here") == 2, 200, process)
    data.unlink()
    shutil.rmtree(output / "store" / "data")
    code, out, err = study.end(process, timeout=400)
    assert code == 1, out + err
    assert "2 configurations failed" in out
    found = by_rate(output)
    assert found.pop(3e-3) == kept[3e-3]
    assert set(found) == {1e-3, 1e-2}
    for record in found.values():
        assert record.state == "failed"
        assert record.reason.startswith("FileNotFoundError: ")
        assert str(data) in record.reason
        assert "\n" not in record.reason


@pytest.mark.timeout(900)
def test_data_that_one_variant_needs_goes_away_and_the_other_is_trained(output: Path, tmp_path: Path) -> None:
    """A whole pack fails with the same words and takes its seat with it, three times."""
    data, task = tmp_path / "letters.txt", tmp_path / "wanted.py"
    data.write_text("abc\n")
    task.write_text(WANTED_BY_DORA.format(data=str(data)))
    rates = ("--learning-rates", "5e-4", "1e-3", "3e-3", "1e-2", "--lanes-per-seat", "4")
    process = study.start(output, *SMALL, "--variants", "dora", "lora", "--task", str(task), *rates)
    study.wait_for(lambda: "Ray started here" in study.log(output), 200, process)
    data.unlink()
    code, out, err = study.end(process, timeout=500)
    assert code == 1, out + err
    assert "4 configurations failed" in out
    assert "configurations in a row failed with FileNotFoundError" in " ".join(out.split())
    found = study.records(output).values()
    dora = [record for record in found if record.configuration.variant.name == "dora"]
    lora = [record for record in found if record.configuration.variant.name == "lora"]
    assert [record.state for record in lora] == ["finished"] * 4
    assert [record.state for record in dora] == ["failed"] * 4
    assert all(str(data) in record.reason for record in dora)
    assert max(r.provenance.ended for r in lora) < min(r.provenance.ended for r in dora)
