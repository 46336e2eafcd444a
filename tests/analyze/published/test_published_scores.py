"""The published scores give the results of the survey's own tables and of docs/published.md."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.analyze.published.published_scores import TASKS, PublishedTask, read_table, summarize_task
from orchestrator.study.config import SHIPPED_FOLDER


@pytest.fixture(scope="module")
def tasks() -> dict[str, PublishedTask]:
    return {task: summarize_task(read_table(task)) for task in TASKS}


def test_there_are_660_cells_of_twenty_variants() -> None:
    tables = [read_table(task) for task in TASKS]
    assert [table.scores.shape for table in tables] == [(20, 8), (20, 8), (20, 7), (20, 10)]
    assert sum(table.scores.size for table in tables) == 660
    assert all(np.isfinite(table.scores).all() for table in tables)
    assert all((SHIPPED_FOLDER / f"{table.config}.yaml").exists() for table in tables)


@pytest.mark.parametrize(
    ("task", "rank", "tied_with", "span", "best_ten"),
    [
        ("gsm8k", 3, (), 5.76, 1.29),
        ("humaneval", 3, (), 5.25, 2.89),
        ("glue", 7, (), 5.55, 2.08),
        ("images", 5, ("RaSA",), 3.51, 0.61),
    ],
)
def test_lora_ranks_and_peaks_span_as_published(
    task: str,
    rank: int,
    tied_with: tuple[str, ...],
    span: float,
    best_ten: float,
    tasks: dict[str, PublishedTask],
) -> None:
    found = tasks[task]
    assert (found.reference.rank, found.reference.tied_with) == (rank, tied_with)
    assert (found.span, found.top_half_span) == (span, best_ten)


BEST_RATES = {
    "LoRA": (5e-4, 5e-4, 1e-4, 5e-4),
    "LoRA+": (1e-4, 1e-5, 1e-5, 5e-5),
    "LoRA-GA": (5e-5, 1e-4, 1e-4, 5e-5),
    "PiSSA": (1e-4, 2e-4, 5e-5, 2e-4),
    "EVA": (5e-4, 5e-5, 5e-5, 1e-4),
    "HiRA": (1e-3, 1e-3, 1e-3, 5e-3),
    "LoRAMoE": (2e-5, 1e-5, 5e-5, 2e-5),
}


@pytest.mark.parametrize("variant", BEST_RATES)
def test_best_rates(variant: str, tasks: dict[str, PublishedTask]) -> None:
    found = tuple(tasks[task].variant(variant).best_rates[0] for task in TASKS)
    assert found == BEST_RATES[variant]


def test_a_tie_of_two_rates_is_no_edge(tasks: dict[str, PublishedTask]) -> None:
    """RaSA scores the same on HumanEval at 5e-4 and at the grid's last rate."""
    rasa = tasks["humaneval"].variant("RaSA")
    assert rasa.best_rates == (5e-4, 1e-3)
    assert not rasa.at_edge


@pytest.mark.parametrize(
    ("task", "ranks"), [("gsm8k", (1, 10)), ("humaneval", (2, 11)), ("glue", (2, 15)), ("images", (1, 16))]
)
def test_with_one_point_of_noise_a_repeat_ranks_lora_anywhere_here(
    task: str, ranks: tuple[int, int], tasks: dict[str, PublishedTask]
) -> None:
    assert tasks[task].noise[-1].reference_ranks == ranks


def test_twenty_equal_variants_span_what_normal_order_statistics_say(
    tasks: dict[str, PublishedTask],
) -> None:
    """The expected range of twenty standard normals is 3.7350 (Tippett 1925), its 95 % point 5.01."""
    for task in tasks.values():
        assert task.noise[-1].equal_span == pytest.approx(3.735, abs=0.02)
        assert task.noise[-1].equal_span_high == pytest.approx(5.01, abs=0.04)
    (doubled,) = summarize_task(read_table("gsm8k"), noise=[2.0]).noise
    assert doubled.equal_span == pytest.approx(2 * 3.735, abs=0.04)


def test_the_loss_at_loras_best_rate_is_zero_for_lora_and_never_negative(
    tasks: dict[str, PublishedTask],
) -> None:
    for task in tasks.values():
        assert task.reference.loss_at_reference_rate == 0
        assert min(each.loss_at_reference_rate for each in task.variants) >= 0
        table = task.table
        column = table.rates.index(task.reference_rate)
        pissa = table.variants.index("PiSSA")
        expected = table.scores[pissa].max() - table.scores[pissa, column]
        assert task.variant("PiSSA").loss_at_reference_rate == pytest.approx(expected)
