"""The search in a small space, or in a space of which a variant refuses most points, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.tune.search import Searcher
from search_drive import Drive, own, score, space

from orchestrator.execution import search
from orchestrator.execution.search import Params, SearchGroup
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import parse_space


def test_a_small_space_is_used_up_and_said_to_be(tmp_path: Path) -> None:
    over = parse_space(["rank=4,8,16"], own("lora", "full"), (1e-2,), ("learning_rate",))
    drive = Drive(tmp_path, over, points=9)
    assert drive.budget.total == 4
    assert drive.all() == {"lora": 3, "full": 1}
    assert Drive(tmp_path, over, points=9).ask() == Searcher.FINISHED


@pytest.mark.parametrize(
    ("points", "sampler", "seed"),
    [
        # These six cases cover every pair of parameter values.
        (12, "tpe", 0),
        (20, "cma-es", 0),
        (20, "tpe", 1),
        (12, "cma-es", 1),
        (12, "tpe", 2),
        (20, "cma-es", 2),
    ],
)
def test_choices_give_as_many_different_points_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int, sampler: str, seed: int
) -> None:
    """Samplers return to their best points; alone they would suggest only ten of the twenty points."""
    make_sampler = search.make_sampler
    monkeypatch.setattr(
        search, "make_sampler", lambda *given: make_sampler(given[0], f"{seed}/0", *given[2:])
    )
    over = parse_space(["learning_rate=1e-4,1e-3,1e-2,1e-1", "rank=4,8,16,32,64"], own("lora", "hira"), ())
    drive = Drive(tmp_path, over, points, sampler)
    assert drive.all() == {"lora": points, "hira": points}
    assert len({point.fingerprint for point in drive.given}) == 2 * points
    for variant in over:
        optuna_trials = [t for t in drive.optuna_trials(variant) if t.state.name == "COMPLETE"]
        mine = [p for p in drive.given if p.variant.name == variant]
        assert sorted(t.value for t in optuna_trials) == sorted(map(score, mine)), "each is told once"


def test_a_point_that_the_sampler_does_not_find_is_asked_and_counts(tmp_path: Path) -> None:
    """A driver dies after 19 of 20 points. The last point is found, and then the space is exhausted."""
    over = parse_space(["learning_rate=1e-4,1e-3,1e-2,1e-1", "rank=4,8,16,32,64"], own("lora"), ())
    assert Drive(tmp_path, over, points=19).all() == {"lora": 19}
    assert Drive(tmp_path, over, points=30).all() == {"lora": 1}
    last = Drive(tmp_path, over, points=30)
    assert last.ask() == Searcher.FINISHED
    assert len(last.budget.configurations) == last.budget.total == 20


def accept_only(drive: Drive, accepts: Callable[[Params], bool]) -> None:
    """Let LoRA refuse all other values."""

    class Picky(SearchGroup):
        def build(self, params: Params) -> Configuration | None:
            return super().build(params) if accepts(params) else None

    group = drive.budget.groups["lora"]
    drive.budget.groups["lora"] = Picky(group.name, group.template, group.dimensions, group.points)


def with_one_rank(folder: Path, rank: int) -> Drive:
    """Return a search for two of 2,000 ranks, of which LoRA refuses all but `rank`."""
    over = parse_space(["rank=int:1:2000"], own("lora"), (1e-2,), ("learning_rate",))
    drive = Drive(folder, over, points=2)
    accept_only(drive, lambda params: params["rank"] == rank)
    return drive


def test_the_only_point_that_a_variant_takes_is_found(tmp_path: Path) -> None:
    drive = with_one_rank(tmp_path, 7)
    drive.all()
    assert [point.variant.rank for point in drive.given] == [7]
    assert drive.budget.groups["lora"].is_exhausted


def test_a_large_space_that_is_refused_throughout_ends(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=2)
    accept_only(drive, lambda params: False)
    assert drive.ask() == Searcher.FINISHED
    assert drive.budget.groups["lora"].is_exhausted
