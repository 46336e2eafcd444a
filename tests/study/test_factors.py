"""The table of factors, and the levels that a study takes from it."""

from __future__ import annotations

from dataclasses import replace

from configurations import template

from orchestrator.analyze.factors import find_changed_factor
from orchestrator.study import factors
from orchestrator.study.configuration import HYPERPARAMETERS, BatchConfig
from orchestrator.study.factors import (
    choose_factors,
    default_rate,
    factor_levels,
    load_factors,
    resweep_rates,
)
from orchestrator.study.space import apply_values

STUDY = [
    template("lora_plus", ratio=16.0),
    template("adalora", orthogonality=0.5),
    template("relora", merges=3),
]


def test_every_factor_of_the_table_has_what_a_study_needs() -> None:
    for factor in load_factors().values():
        name = factor.name.rpartition(".")[2]
        assert factor.variant or name in HYPERPARAMETERS
        assert factor.title
        assert factor.source
        assert factor.default is not None
        if factor.prior == "choice":
            assert factor.default in factor.levels
            assert not factor.range
        elif factor.name != factors.RATE:
            assert factor.range[0] < factor.range[1]
            # The first two levels are the ends of the range, unless the default is one of the ends.
            assert {*factor.levels[:2]} <= {*factor.range} or factor.range[1] == 1.0
            assert all(factor.range[0] <= float(level) <= factor.range[1] for level in factor.levels)


def test_every_level_of_the_table_is_a_valid_value() -> None:
    default = template()
    for factor in load_factors().values():
        rule = HYPERPARAMETERS.get(factor.name)
        for level in factor_levels(factor, default, 3) if rule else ():
            assert rule is not None
            assert rule.find_violation(level) is None, factor.name


def test_all_takes_the_table_and_the_own_settings_of_the_variants() -> None:
    names = [factor.name for factor in choose_factors(["all"], STUDY)]
    assert {"alpha", "rank", "train_size", "lora_plus.ratio", "relora.merges"} <= {*names}
    assert "learning_rate" not in names
    assert "pissa.svd" not in names  # PiSSA is not in the study


def test_a_setting_without_an_entry_is_varied_from_half_to_double() -> None:
    (factor,) = choose_factors(["adalora.orthogonality"], STUDY)
    default = template("adalora", orthogonality=0.5)
    assert factor_levels(factor, default, 2) == (0.25, 1.0)


def test_levels_are_multiples_of_the_default_and_whole_where_they_must_be() -> None:
    default = template()
    table = load_factors()
    assert factor_levels(table["alpha"], default, 3) == (1024.0, 4.0, 64.0)
    assert factor_levels(table["rank"], default, 3) == (2, 32, 16)
    assert factor_levels(table["steps"], default, 2) == (30, 120)
    assert factor_levels(table["schedule"], default, 1) == ("constant", "linear")
    assert factor_levels(table["dropout"], default, 2) == (0.1, 0.05)  # 0 is the default


def test_levels_are_clipped_to_what_the_task_and_the_batch_allow() -> None:
    default = template()
    assert factor_levels(load_factors()["train_size"], default, 2) == (240, 480)
    small = replace(default, task=replace(default.task, train_size=40))
    assert factor_levels(load_factors()["batch_size"], small, 2) == (4, 40)
    split = replace(default, batches=BatchConfig(8, accumulation=2))
    assert all(int(level) % 2 == 0 for level in factor_levels(load_factors()["batch_size"], split, 3))


def test_a_factor_that_a_variant_lacks_has_no_levels() -> None:
    assert factor_levels(load_factors()["alpha"], template("hira"), 2) == ()
    assert factor_levels(load_factors()["lora_plus.ratio"], template(), 2) == ()


def test_the_changed_factor_of_a_level_is_found() -> None:
    default = template()
    known = list(load_factors().values())
    for factor in known:
        for level in factor_levels(factor, default, 3):
            changed = apply_values(default, {factor.name: level})
            assert find_changed_factor(changed, default, known) is factor
    both = apply_values(default, {"rank": 2, "dropout": 0.1})
    assert find_changed_factor(both, default, known) is None
    assert find_changed_factor(default, default, known) is None


def test_few_steps_with_fewer_evaluations_are_a_level_of_the_steps() -> None:
    default = replace(template(), evaluations=40)
    (level, _) = factor_levels(load_factors()["steps"], default, 2)
    changed = apply_values(default, {"steps": level})
    assert changed.evaluations == 30
    assert find_changed_factor(changed, default, [load_factors()["steps"]]) is load_factors()["steps"]


def test_the_sweep_has_five_rates_half_a_decade_apart_on_the_grid() -> None:
    grid = [float(f"{10 ** (k / 4):.3g}") for k in range(-16, 1)]
    assert resweep_rates(grid, 1e-2) == (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
    assert resweep_rates(grid, 1e-4) == (1e-4, 3.16e-4, 1e-3)  # the curve begins there
    assert resweep_rates([1e-4, 1e-3, 1e-2, 1e-1, 1.0], 1e-2) == (1e-3, 1e-2, 1e-1)


def test_the_default_rate_is_the_published_one_where_the_curve_has_it() -> None:
    assert default_rate([1e-6, 1e-5, 5.62e-5, 1e-4, 1e-3]) == 5.62e-5
    assert default_rate([1e-3, 1e-2, 1e-1]) == 1e-2
