"""A trainer of two workers gives the results of one worker. The processes, gloo and the loop are real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair import WORKERS, Scenario, play
from scripted import POISONED, WORDS_TASK, Script, configuration, leases, solo, tiny_base_model
from short_of_memory import Again

from orchestrator.finetune.data.batches import shuffled_indices as order
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from variants import catalogue
from variants.api import AdaptationScope

pytestmark = pytest.mark.xdist_group("pair")

SIZE = 64  # training examples


def uneven() -> list[Configuration]:
    """Return lanes with odd batches, answers of one or three tokens, two micro-batches, and dropout."""
    words = partial(configuration, task=WORDS_TASK, batch_size=7, accumulation=2, dropout=0.1)
    return [
        words(seed=0, steps=9, evaluations=3),
        words(seed=1, rate=3e-3, steps=6, evaluations=2),
        words(seed=2, rate=3e-2, alpha=4.0, steps=5, evaluations=1),
    ]


FEW = ("adalora", "eva", "full", "head_only", "hira", "lora_moe", "pissa")
"""Variants with hooks, calibration, full fine-tuning, a head only, a dense update, an auxiliary loss, and a
special initialization."""


def kinds(names: Iterable[str]) -> list[Configuration]:
    found = []
    for name in names:
        variant = catalogue.get(name)
        task = "reviews" if variant.adaptation_scope is AdaptationScope.HEAD_ONLY else WORDS_TASK
        one = configuration(variant=name, task=task, batch_size=7, accumulation=2, steps=6, evaluations=1)
        if task == "reviews":  # a BERT with base dropout, whose masks cover the rows of both workers
            one = replace(one, base_dropout="on")
        if not variant.uses_alpha:
            one = replace(one, variant=replace(one.variant, alpha=None))
        found.append(one)
    return found


def ending() -> dict[str, Configuration]:
    return {
        "finished": configuration(seed=0, steps=8, evaluations=4),
        "diverged": configuration(seed=1, rate=1e36, steps=8),
        "stopped": configuration(seed=2, steps=8, evaluations=4),
        "dropped": configuration(seed=3, steps=8, evaluations=4),
    }


def stop_one(report: Report) -> Directive:
    lanes = {one.fingerprint: name for name, one in ending().items()}
    directives = {"stopped": Directive.STOP, "dropped": Directive.DROP}
    return (
        directives.get(lanes[report.fingerprint], Directive.CONTINUE)
        if report.step == 4
        else Directive.CONTINUE
    )


def poisoned_rows(seed: int, steps: int, size: int = 8) -> list[int]:
    """Return the workers that draw example 5, which raises an error, in the first `steps` batches."""
    drawn = order(seed, SIZE, 0, steps * size)
    shares = np.array_split(np.arange(size), WORKERS)
    return [
        rank
        for place, one in enumerate(drawn)
        if one == 5
        for rank in range(WORKERS)
        if place % size in shares[rank]
    ]


@cache
def poisoned_seeds(steps: int = 5) -> tuple[int, int, int]:
    """Return seeds: with the first, worker 1 draws example 5; with the others, no worker does."""
    rows_by_seed = {seed: poisoned_rows(seed, steps) for seed in range(40)}
    failing = next(seed for seed in rows_by_seed if rows_by_seed[seed] == [1])
    unaffected = [seed for seed in rows_by_seed if not rows_by_seed[seed]]
    return failing, unaffected[0], unaffected[1]


def poisoned(path: str) -> list[Configuration]:
    return [configuration(task=path, seed=seed, steps=5) for seed in poisoned_seeds()]


def limited_memory() -> list[Configuration]:
    base = ModelChoice("limited_memory", "3" * 64)
    return [replace(configuration(seed=seed, steps=4), model=base) for seed in range(4)]


def load_on(rank: int, choice: ModelChoice, task: Task) -> BaseModel:
    """Load a base model on a worker. Worker 1 has memory for two lanes of the model `limited_memory`."""
    base_model = tiny_base_model(choice, task)
    if choice.name == "limited_memory" and rank == 1:
        enough = base_model.model.base_model.forward

        def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and len(kwargs["input_ids"]) > 2 * 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return enough(*args, **kwargs)

        base_model.model.base_model.forward = raises_out_of_memory
    return base_model


class Lost(Script):
    """A lane source whose broker does not answer after three steps."""

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        if self.taken >= 3:
            raise ConnectionError("the broker is lost")
        return super().exchange(steps_taken)


def scenario(name: str, path: str, rank: int) -> Scenario:
    if name == "uneven":
        late = {one.fingerprint: at for one, at in zip(uneven(), (0, 2, 3), strict=True)}
        return Scenario(Script(leases(uneven()), start_at=late))
    if name in ("kinds", "more kinds"):
        return Scenario(Script(leases(kinds(VARIANTS[name]))))
    if name == "ending":
        return Scenario(Script(leases(ending().values()), answers=stop_one))
    if name == "poisoned":
        return Scenario(Script(leases(poisoned(path))))
    if name == "limited_memory":
        return Scenario(Again(leases(limited_memory())), options={"load_base_model": partial(load_on, rank)})
    assert name == "lost"
    return Scenario(Lost(leases([configuration(seed=7, steps=8)])))


NAMES = ("uneven", "ending", "poisoned", "limited_memory", "lost")
VARIANTS = {"kinds": FEW, "more kinds": [name for name in catalogue.names() if name not in FEW]}
KINDS = (
    pytest.param("kinds", marks=pytest.mark.slow),
    pytest.param("more kinds", marks=pytest.mark.nightly),
)


class ScenarioResults:
    """The results of the two workers by scenario. A scenario runs when its results are first needed."""

    def __init__(self, pair: Callable[..., Any], folder: Path) -> None:
        self.pair, self.folder = pair, folder
        path = folder / "poisoned.py"
        path.write_text(POISONED)
        self.path = str(path)
        self.results: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.results:
            work = partial(play, partial(scenario, name, self.path))
            self.results |= self.pair({name: work}, self.folder)
        return self.results[name]

    def record(self, name: str, one: Configuration) -> Record | None:
        assert self[name]
        return Store(self.folder / name).get(one.fingerprint)


@pytest.fixture(scope="module")
def results(pair: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> ScenarioResults:
    return ScenarioResults(pair, tmp_path_factory.mktemp("scenarios"))


def close_to(value: Any) -> Any:
    return pytest.approx(value, rel=1e-3, abs=1e-5)


def assert_close(record: Record | None, expected: Record) -> None:
    """Assert that two records agree up to rounding of sums that were added in another order."""
    assert record is not None
    assert (record.state, record.steps, record.reason) == (expected.state, expected.steps, expected.reason)
    assert record.cost.tokens == expected.cost.tokens
    assert record.cost.trainable_parameters == expected.cost.trainable_parameters
    for mine, theirs in zip(record.curve, expected.curve, strict=True):
        assert (mine.step, mine.learning_rate) == (theirs.step, theirs.learning_rate)
        assert (mine.loss, mine.gradient_norm) == (close_to(theirs.loss), close_to(theirs.gradient_norm))
    for mine, theirs in zip(record.evaluations, expected.evaluations, strict=True):
        assert (mine.step, mine.split) == (theirs.step, theirs.split)
        assert mine.scores == close_to(dict(theirs.scores))
    for split, items in record.items.items():
        assert items.loss == close_to(expected.items[split].loss)
        assert items.answers == expected.items[split].answers


@pytest.mark.parametrize("name", [*NAMES, *KINDS])
def test_both_workers_have_equal_weights_and_only_the_first_uses_the_source(
    results: ScenarioResults, name: str
) -> None:
    first, second = results[name]
    assert first.taken > 0
    assert (second.reports, second.ended, second.spilled, second.taken) == ([], [], [], 0)
    assert set(first.weights) == set(second.weights)
    for lane, weights in first.weights.items():
        assert torch.equal(weights, second.weights[lane])


def test_uneven_rows_and_token_counts_give_the_results_of_one_worker(
    results: ScenarioResults, tmp_path: Path
) -> None:
    for one in uneven():
        record = results.record("uneven", one)
        assert_close(record, solo(one, tmp_path))
        assert record is not None
        assert record.provenance.workers == 2


@pytest.mark.parametrize("name", KINDS)
def test_every_variant_gives_what_one_worker_gives(
    results: ScenarioResults, tmp_path: Path, name: str
) -> None:
    for one in kinds(VARIANTS[name]):
        assert_close(results.record(name, one), solo(one, tmp_path))


def test_lanes_that_end_early(results: ScenarioResults, tmp_path: Path) -> None:
    first, _ = results["ending"]
    lanes = ending()
    assert sorted(state for _, _, state in first.ended) == ["diverged", "finished", "stopped"]
    assert results.record("ending", lanes["dropped"]) is None
    for name in ("finished", "diverged"):
        record, expected = results.record("ending", lanes[name]), solo(lanes[name], tmp_path)
        if name == "finished":
            assert_close(record, expected)
        else:
            assert record is not None
            assert (record.state, record.steps) == (expected.state, expected.steps)
    stopped = results.record("ending", lanes["stopped"])
    assert stopped is not None
    assert (stopped.state, stopped.steps) == ("stopped", 4)


def test_a_lane_that_fails_on_one_worker_fails_on_both_and_no_other_lane_fails(
    results: ScenarioResults, tmp_path: Path
) -> None:
    failing, *unaffected = poisoned(results.path)
    assert results["poisoned"][0].raised == ""
    record = results.record("poisoned", failing)
    assert record is not None
    assert record.state == "failed"
    assert "IndexError" in record.reason
    assert "Traceback" in record.traceback
    assert record.steps == order(failing.seed, SIZE, 0, 40).index(5) // 8
    for one in unaffected:
        assert_close(results.record("poisoned", one), solo(one, tmp_path))


def test_when_one_worker_is_out_of_memory_both_train_fewer_lanes(
    results: ScenarioResults, tmp_path: Path
) -> None:
    first, _ = results["limited_memory"]
    assert first.raised == ""
    assert len(first.spilled) == 2
    assert first.taken == sum(one.lr_schedule.steps for one in limited_memory())
    for one in limited_memory():
        assert_close(results.record("limited_memory", one), solo(one, tmp_path))


def test_an_error_of_the_source_ends_the_loop_on_all_workers(results: ScenarioResults) -> None:
    assert [result.raised for result in results["lost"]] == ["ConnectionError: the broker is lost", ""]
