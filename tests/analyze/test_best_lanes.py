"""The order of the best lanes."""

from __future__ import annotations

from synthetic import record

from orchestrator.analyze.best_lanes import rank_lanes, score_lane, sort_lanes


def test_of_equal_lanes_that_of_lora_comes_first_and_then_the_first_by_name() -> None:
    scores = {"pissa": 0.5, "dora": 0.5, "lora": 0.5, "hira": 0.9, "rslora": 0.1}
    ranked = rank_lanes(score_lane(record(name, validation=score)) for name, score in scores.items())
    ordered = sort_lanes({goal: lanes[0] for goal, lanes in ranked.items()})
    assert [goal.variant for goal, _ in ordered] == ["hira", "lora", "dora", "pissa", "rslora"]
