"""The star design: its configurations in each stage, and the new ones after a change of the study."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from star_records import RATES, Surface, make_record, template

from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch.design import DesignInput
from orchestrator.launch.script_options import FactorOptions
from orchestrator.launch.star import StarDesign, make_star_design
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import default_rate, resweep_rates
from orchestrator.util.errors import UsageError

SURFACE = Surface()


def design(tmp_path: Path, variants: tuple[str, ...] = ("lora",), **options: object) -> StarDesign:
    """Return the design of a study on letters whose rates are given as an option."""
    words = {"factors": ("alpha", "rank"), "seeds": 2, "learning_rates": ("3.16e-4:1e-1:4",)}
    chosen = FactorOptions(store=tmp_path, **{**words, **options})  # type: ignore[arg-type]
    chosen.check_factors()
    templates = tuple(unprepared(template(variant)) for variant in variants)
    return make_star_design(DesignInput(chosen, templates, {"letters": RATES}))


def unprepared(configuration: Configuration) -> Configuration:
    """Return a copy of a configuration whose base model is not on this machine, as with --plan."""
    return replace(configuration, model=replace(configuration.model, content=UNPREPARED))


def train(configurations: Iterable[Configuration]) -> dict[str, Record]:
    """Return the records of configurations on the surface."""
    return {
        c.fingerprint: make_record(c, SURFACE.score(c, unprepared(template(c.variant.name))))
        for c in configurations
    }


def test_the_curve_comes_first_and_the_arms_lie_around_its_best_rate(tmp_path: Path) -> None:
    star = design(tmp_path)
    curve = star.request({})
    assert len(curve) == len(RATES) * 2
    both = star.request(train(curve))
    arms = both[len(curve) :]
    assert both[: len(curve)] == curve
    assert {c.optimizer.learning_rate for c in arms} == {*resweep_rates(RATES, 1e-2), default_rate(RATES)}
    assert len(arms) == 2 * 2 * 6 * 2  # factors, levels, rates, seeds
    assert {(c.variant.alpha, c.variant.rank) for c in arms} == {(4.0, 8), (64.0, 8), (16.0, 2), (16.0, 32)}
    assert star.request(train(both)) == both
    assert len(star.outline()) == len(both)


def test_every_template_goes_on_as_soon_as_its_own_curve_has_ended(tmp_path: Path) -> None:
    star = design(tmp_path, ("lora", "rslora"))
    curves = star.request({})
    ended = train(c for c in curves if c.variant.name == "lora")
    arms = [c for c in star.request(ended) if c.variant.rank != 8 or c.variant.alpha != 16.0]
    assert {c.variant.name for c in arms} == {"lora"}


def test_a_wider_study_trains_only_what_is_new(tmp_path: Path) -> None:
    star = design(tmp_path)
    done = train(star.request(train(star.request({}))))
    for more in ({"factors": ("alpha", "rank", "dropout")}, {"levels": 3}, {"seeds": 3}):
        wider = design(tmp_path, **more)
        records = dict(done)
        while new := [c for c in wider.request(records) if c.fingerprint not in records]:
            records |= train(new)
        asked = wider.request(records)
        assert {c.fingerprint for c in asked} >= done.keys()
        assert len(asked) > len(done)


def test_a_curve_without_a_score_has_no_arms(tmp_path: Path) -> None:
    star = design(tmp_path)
    curve = star.request({})
    failed = {c.fingerprint: replace(make_record(c, 0.5), state="failed", evaluations=()) for c in curve}
    assert star.request(failed) == curve


def test_what_a_variant_lacks_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    star = design(tmp_path, ("lora", "hira"))
    assert "hira has no alpha: left out." in capsys.readouterr().out
    hira = [c for c in star.outline() if c.variant.name == "hira"]
    assert {c.variant.alpha for c in hira} == {None}
    with pytest.raises(UsageError, match="no variant of the study has one of them"):
        design(tmp_path, ("hira",), factors=("alpha",))


def test_a_level_that_the_variant_refuses_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AdaLoRA's warm-up and final phase must not fill all steps."""
    chosen = FactorOptions(
        store=tmp_path, factors=("adalora.final",), variants=("adalora",), learning_rates=("3.16e-4:1e-1:4",)
    )
    extra = {"initial": 1.5, "warmup": 0.1, "final": 0.6, "orthogonality": 0.5}
    given = DesignInput(chosen, (unprepared(template("adalora", **extra)),), {"letters": RATES})
    star = make_star_design(given)
    assert "adalora, adalora.final 1.2: left out" in capsys.readouterr().out
    assert [c.variant.extra["final"] for c in star.levels[0]] == [0.3]


def test_a_task_s_own_grid_is_refined_to_four_rates_a_decade(tmp_path: Path) -> None:
    given = DesignInput(
        FactorOptions(store=tmp_path), (unprepared(template()),), {"letters": (1e-3, 1e-2, 1.0)}
    )
    star = make_star_design(given)
    assert star.rates["letters"][:5] == (1e-3, 1.78e-3, 3.16e-3, 5.62e-3, 1e-2)
    assert star.rates["letters"][-1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 4}, "--levels 4: must be from 1 to 3"),
        ({"margin": 0.0}, "--margin 0: must be above 0"),
        ({"factors": ()}, "--factors is empty"),
        ({"scheduler": "asha"}, "--scheduler asha"),
        ({"learning_rates": ("1e-3", "1e-2")}, "a curve needs 5 rates"),
    ],
)
def test_wrong_options_get_one_line(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match="--") as refused:
        design(tmp_path, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
