"""The studies that come with the program: the survey's numbers of runs, and options given beside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from configurations import shipped
from orchestrator.experiments.lr_sensitivity import CurveOptions
from orchestrator.experiments.tuned_comparison import ComparisonOptions

from orchestrator.analyze.published import published_variants, read_task
from orchestrator.experiments import options_of
from orchestrator.finetune.resolve.option_names import variant_hyperparameters
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.config import make_options, shipped_studies
from orchestrator.study.grids import parse_learning_rates
from orchestrator.study.space import parse_fixed_values
from variants import catalogue
from variants.api import VariantSettings

SURVEY = {
    "published-gsm8k-r8": 20 * 8,
    "published-humaneval": 20 * 8,
    "published-glue": 20 * 7 * 9,
    "published-images": 20 * 10 * 7,
    "published-gsm8k-r128": 60,
}
COUNTS = SURVEY | {
    "lr-matters-qwen3-0.6b": 5 * 13 * 3,
    "lr-matters-32-runs": 32,
    "peft-metamathqa": 11 * 6 * 2,
}


def settings(options: CurveOptions) -> dict[str, str]:
    return dict(word.split("=") for word in options.set)


def test_they_have_the_runs_of_the_protocol() -> None:
    found = {}
    for name in shipped_studies():
        options = shipped(name)
        assert options.preset == name
        assert set(options.task or ()) <= set(tasks.names())
        assert set(options.variants or ()) <= set(catalogue.names())
        assert name not in SURVEY or set(options.variants or ()) == set(published_variants())
        settings_of = {variant: variant_hyperparameters(variant) for variant in options.variants or ()}
        assert parse_fixed_values(options.set, settings_of), "every word of --set has a setting"
        rates = parse_learning_rates(options.learning_rates or ())
        found[name] = len(options.variants or ()) * len(options.task or ()) * len(rates) * options.seed_count
    assert found == COUNTS
    assert sum(SURVEY.values()) - SURVEY["published-gsm8k-r128"] == 2980, "the survey's four main grids"
    assert set(published_variants().values()) == set(read_task("gsm8k")[0]["curve"])


def test_published_epochs_give_the_steps_of_the_protocol() -> None:
    glue = [tasks.get(task) for task in shipped("published-glue").task or ()]
    assert len(glue) == 9
    steps = {task.name: int(10 * task.defaults.train_size / task.defaults.batch_size) for task in glue}
    assert (steps["glue_mnli"], steps["glue_qqp"]) == (120_937, 111_875)
    assert steps["glue_rte"] == tasks.get("glue_rte").defaults.steps == 690
    assert int(100_000 / 64) == tasks.get("metamathqa").defaults.steps == 1562


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"rank": 4}, {"rank": 4, "alpha": 256.0}),
        ({"learning_rates": ["1e-4"]}, {"learning_rates": ("1e-4",)}),
        ({"seeds": 3}, {"seeds": 3}),
        ({"steps": 10}, {"steps": 10, "epochs": None}),
        ({"set": ["rank=4"]}, {"rank": 8}),
        ({"set": ["steps=5"]}, {"steps": None, "epochs": None}),
        ({"set": ["batch_size=5"]}, {"batch_size": None}),
        ({"data": "a.csv"}, {"data": ("a.csv",), "task": None}),
        ({"widen": 1}, {"widen": 1.0}),
    ],
)
def test_an_option_replaces_what_the_file_says_in_any_way(
    typed: dict[str, Any], expected: dict[str, Any]
) -> None:
    options = shipped("published-gsm8k-r128", **typed)
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.max_length == 1024, "the rest stays"


def test_a_word_of_set_replaces_the_word_of_the_file_alone() -> None:
    words = settings(shipped("published-gsm8k-r8", set={"lora-plus.ratio": 4}, weight_decay=0))
    assert words["weight_decay"] == "0"
    assert words["lora-plus.ratio"] == "4"
    assert "lora_plus.ratio" not in words
    assert words["final_factor"] == "0.1"


def test_settings_of_variants_that_take_no_part_are_left_out() -> None:
    words = settings(shipped("published-gsm8k-r128", variants=["lora", "LoRA-MoE"]))
    own = {name: word for name, word in words.items() if "." in name}
    assert own == {
        "lora_moe.experts": "8", "lora_moe.top_k": "2", "lora_moe.balance": "0", "lora_moe.alpha": "32"
    }  # fmt: skip


def test_a_comparison_takes_replicates_in_place_of_seeds_and_leaves_the_widening() -> None:
    options, _ = make_options(ComparisonOptions, {"config": "published-gsm8k-r8"}, "tuned", options_of)
    assert (options.seeds, options.replicate_count) == (None, 10)
    assert options.learning_rates == shipped("published-gsm8k-r8").learning_rates


def test_a_search_can_vary_what_the_file_sets() -> None:
    space = ["learning_rate=log:1e-5:1e-3", "rank=64,128", "warmup=0:0.1"]
    options = shipped("published-gsm8k-r128", search="qmc", space=space, seeds=1)
    assert options.rank == 8, "the class's own default, since the space names the rank"
    assert "warmup" not in settings(options)


@pytest.mark.parametrize("name", SURVEY)
def test_experts_have_the_scales_of_the_reference_code(name: str) -> None:
    """Its GOAT rounds alpha / d up and divides by d, the rank of an expert; its LoRAMoE has alpha / rank."""
    options = shipped(name)
    rank, alpha = options.rank, options.alpha
    expected = {"goat": math.ceil(alpha / (rank // 8)) / (rank // 8), "lora_moe": alpha / rank}
    for variant_name, scale in expected.items():
        own = float(settings(options).get(f"{variant_name}.alpha", alpha))
        variant = catalogue.get(variant_name)
        assert variant.scaling(variant.validate_settings(VariantSettings(rank, own))) == scale
