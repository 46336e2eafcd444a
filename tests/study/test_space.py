"""Parsing of search spaces. Every point drawn from a space lies in it and gives a valid configuration."""

from __future__ import annotations

import math
import random

from configurations import read_configuration, template
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.resolve.option_names import variant_hyperparameters
from orchestrator.study.configuration import HYPERPARAMETERS, Configuration, Value
from orchestrator.study.space import Dimension, apply_values, parse_fixed_values, parse_space
from variants import catalogue

OWN = {v: variant_hyperparameters(v) for v in ("lora", "hira", "relora", "pissa", "oft", "full")}
RATES = (1e-4, 1e-3, 1e-1)


def default(variant: str) -> Configuration:
    return template(variant, **catalogue.traits(variant)["extra_defaults"])


def parsed(*words: str, fixed: tuple[str, ...] = ()) -> dict[str, list[str]]:
    found = parse_space(words, OWN, RATES, fixed)
    return {v: [f"{d.key}={d.spec_text}" for d in dimensions] for v, dimensions in found.items()}


def test_the_learning_rate_goes_from_the_lowest_to_the_highest_of_the_grid_unless_named() -> None:
    assert set(map(tuple, parsed().values())) == {("learning_rate=log:0.0001:0.1",)}
    assert parsed("learning-rate=log:1e-3:1e-2")["full"] == ["learning_rate=log:0.001:0.01"]
    assert parsed(fixed=("learning_rate",))["full"] == []
    assert parsed("rank=4,8")["lora"] == ["learning_rate=log:0.0001:0.1", "rank=4,8"]


def test_a_hyperparameter_that_a_variant_lacks_is_left_out_of_its_space() -> None:
    found = parsed("rank=8,4,16", "alpha=log:4:64", "weight_decay=0:0.1")
    assert found["lora"][1:] == ["rank=4,8,16", "alpha=log:4:64", "weight_decay=0:0.1"]
    assert found["hira"][1:] == ["rank=4,8,16", "weight_decay=0:0.1"]
    assert found["full"][1:] == ["weight_decay=0:0.1"]


def test_a_name_with_a_variant_in_front_applies_to_that_variant_alone() -> None:
    found = parsed("rank=4,8", "lora.rank=int:2:16", "relora.merges=1,2,3", "pissa.svd=exact,fast")
    assert found["lora"][1:] == ["lora.rank=int:2:16"]
    assert found["relora"][1:] == ["rank=4,8", "relora.merges=1,2,3"]
    assert found["pissa"][1:] == ["rank=4,8", "pissa.svd=exact,fast"]


def test_a_setting_of_a_variant_may_have_the_name_of_a_hyperparameter() -> None:
    assert parsed("warmup=0:0.5", "relora.warmup=0:0.1")["relora"][1:] == [
        "warmup=0:0.5",
        "relora.warmup=0:0.1",
    ]
    point = apply_values(default("relora"), {"warmup": 0.2, "relora.warmup": 0.05})
    assert (point.lr_schedule.warmup, point.variant.extra["warmup"]) == (0.2, 0.05)


def test_values_enter_the_configuration() -> None:
    point = apply_values(
        default("lora"),
        {"learning_rate": 0.01, "rank": 4, "lora.alpha": 8.0, "hira.rank": 2, "batch_size": 32},
    )
    assert point.optimizer.learning_rate == 0.01
    assert (point.variant.rank, point.variant.alpha) == (4, 8.0)
    assert (point.batches.batch_size, point.batches.accumulation) == (32, 1)
    assert apply_values(default("lora"), {"rank": 4, "lora.rank": 2}).variant.rank == 2


def test_fixed_values_are_typed_by_the_setting() -> None:
    found = parse_fixed_values(
        ["relora.merges=2", "weight-decay=0.01", "oft.cayley-neumann=false", "pissa.svd=fast"], OWN
    )
    values = {"relora.merges": 2, "weight_decay": 0.01, "oft.cayley_neumann": False, "pissa.svd": "fast"}
    assert found == values
    assert isinstance(found["relora.merges"], int)


SPECS = st.one_of(
    st.tuples(st.sampled_from(["learning_rate", "alpha", "epsilon", "clip_norm"]), st.booleans()).flatmap(
        lambda head: st.tuples(st.floats(1e-9, 1e3), st.floats(1.5, 1e4)).map(
            lambda ends: f"{head[0]}={'log:' if head[1] else ''}{ends[0]:.4g}:{ends[0] * ends[1]:.4g}"
        )
    ),
    st.tuples(st.sampled_from(["dropout", "weight_decay", "beta1", "beta2"]), st.integers(1, 998)).map(
        lambda x: f"{x[0]}=0:{x[1] / 1000}"
    ),
    st.tuples(
        st.sampled_from(["rank", "batch_size"]), st.integers(1, 99), st.integers(1, 99), st.booleans()
    ).map(lambda x: f"{x[0]}={'logint' if x[3] else 'int'}:{x[1]}:{x[1] + x[2]}"),
    st.lists(st.integers(1, 999), min_size=2, max_size=6, unique=True).map(
        lambda ranks: f"rank={','.join(map(str, ranks))}"
    ),
    st.just("schedule=constant,linear,cosine"),
    st.just("pissa.svd=exact,fast"),
)


def inside(dimension: Dimension, value: Value) -> bool:
    if dimension.choices:
        return value in dimension.choices
    assert not isinstance(value, str)
    return dimension.low <= value <= dimension.high and (
        value == int(value) or not dimension.has_integer_steps
    )


@given(st.lists(SPECS, max_size=4, unique_by=lambda w: w.partition("=")[0]), st.integers(0, 2**30))
def test_every_draw_lies_in_the_space_and_its_spelling_is_its_value(words: list[str], seed: int) -> None:
    found = parse_space(words, OWN, RATES)
    again = [f"{k}={d.spec_text}" for k, d in {d.key: d for each in found.values() for d in each}.items()]
    assert parse_space(again, OWN, RATES) == found, "the text of a space parses to the same space"
    rng = random.Random(seed)
    for variant, dimensions in found.items():
        values: dict[str, Value] = {}
        for d in dimensions:
            if d.choices:
                values[d.key] = rng.choice(d.choices)
            elif d.has_integer_steps:
                values[d.key] = d.to_value(rng.randint(int(d.low), int(d.high)))
            else:
                low, high = (math.log(d.low), math.log(d.high)) if d.log else (d.low, d.high)
                number = rng.uniform(low, high)
                values[d.key] = d.to_value(min(d.high, max(d.low, math.exp(number) if d.log else number)))
            assert inside(d, values[d.key]), (d, values[d.key])
        point = apply_values(default(variant), values)
        assert read_configuration(point.to_json()).fingerprint == point.fingerprint
        rate = point.optimizer.learning_rate
        ends = [e for d in dimensions if d.name == "learning_rate" for e in (d.low, d.high)]
        assert float(f"{rate:.3g}") == rate or rate in ends
        for d in dimensions:
            hyper = HYPERPARAMETERS.get(d.name)
            if hyper is not None:
                assert hyper.find_violation(values[d.key]) is None
                if hyper.part != "batches":
                    assert getattr(getattr(point, hyper.part), hyper.field) == values[d.key]
