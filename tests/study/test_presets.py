"""Presets: the survey's numbers of runs, and options that are given beside a preset."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.cli.arguments import parse_options
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.script_options import ComparisonOptions, CurveOptions
from orchestrator.study.presets import (
    main_grid_runs,
    preset_names,
    published_words,
    read_preset,
    read_variants,
    split_variants,
)
from variants import catalogue
from variants.api import VariantSettings

COUNTS = {
    "published-gsm8k": 20 * 8,
    "published-humaneval": 20 * 8,
    "published-glue": 20 * 7 * 9,
    "published-images": 20 * 10 * 7,
    "published-gsm8k-r128": 60,
}


def parsed(*arguments: str) -> CurveOptions:
    return parse_options("", CurveOptions, [*arguments, "--plan"])


def test_the_presets_have_the_runs_of_the_protocol() -> None:
    assert {name: read_preset(name).runs for name in preset_names()} == COUNTS
    assert main_grid_runs() == 2980


def test_there_are_the_twenty_published_variants_under_the_names_of_the_scores() -> None:
    from orchestrator.analyze.published.published_scores import read_table

    assert {variant.title for variant in read_variants()} == set(read_table("gsm8k").variants)
    existing, absent = split_variants(catalogue.names())
    assert (len(existing), absent) == (20, [])
    assert {v.name for v in existing} <= set(catalogue.names())


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_fills_in_the_defaults_as_published(name: str) -> None:
    options, preset = parsed("--preset", name), read_preset(name)
    for option, value in preset.options.items():
        if option != "set":
            assert getattr(options, option) == value, option
    assert options.variants == tuple(v.name for v in split_variants(catalogue.names())[0])
    assert set(preset.options["set"]) <= set(options.set) | {"relora.warmup=0.01"}
    assert "lora_plus.ratio=16" in options.set
    assert options.seed_count == 1
    assert set(preset.tasks) <= set(tasks.names())


def test_published_epochs_give_the_steps_of_the_protocol() -> None:
    glue = [tasks.get(task) for task in read_preset("published-glue").tasks]
    assert len(glue) == 9
    steps = {task.name: int(10 * task.defaults.train_size / task.defaults.batch_size) for task in glue}
    assert (steps["glue_mnli"], steps["glue_qqp"]) == (120_937, 111_875)
    assert steps["glue_rte"] == tasks.get("glue_rte").defaults.steps == 690
    assert int(100_000 / 64) == tasks.get("metamathqa").defaults.steps == 1562


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "4"], {"rank": 4, "alpha": 256.0}),
        (["--rank", "8"], {"rank": 8}),
        (["--variants", "lora", "pissa"], {"variants": ("lora", "pissa")}),
        (["--learning-rates", "1e-4"], {"learning_rates": ("1e-4",)}),
        (["--seeds", "3"], {"seeds": 3}),
        (["--steps", "10"], {"steps": 10, "epochs": None}),
        (["--set", "rank=4"], {"rank": 8}),
        (["--set", "steps=5"], {"steps": None, "epochs": None}),
        (["--model", "Qwen/Qwen3-0.6B-Base"], {"model": "Qwen/Qwen3-0.6B-Base"}),
        (["--widen", "1"], {"widen": 1.0}),
    ],
)
def test_an_option_beside_a_preset_replaces_what_it_says(
    arguments: list[str], expected: dict[str, Any]
) -> None:
    options = parsed("--preset=published-gsm8k-r128", *arguments)
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.max_length == 1024, "the rest stays"


def test_a_word_of_set_replaces_the_presets_word_alone() -> None:
    options = parsed("--preset", "published-gsm8k", "--set", "weight_decay=0", "lora-plus.ratio=4")
    words = dict(word.split("=") for word in options.set)
    assert words["weight_decay"] == "0"
    assert words["lora-plus.ratio"] == "4"
    assert "lora_plus.ratio" not in words
    assert words["final_factor"] == "0.1"


def test_a_comparison_takes_replicates_in_place_of_the_presets_seed() -> None:
    options = parse_options("", ComparisonOptions, ["--preset", "published-gsm8k", "--plan"])
    options.check_comparison()
    assert options.seeds is None
    assert options.learning_rates == read_preset("published-gsm8k").options["learning_rates"]


def test_epochs_replace_the_steps_of_a_preset() -> None:
    options = parsed("--preset", "published-images", "--epochs", "2")
    assert (options.steps, options.epochs) == (None, 2.0)


def test_a_search_can_vary_what_a_preset_sets() -> None:
    space = ["--search", "qmc", "--space", "learning_rate=log:1e-5:1e-3", "rank=64,128", "warmup=0:0.1"]
    options = parsed("--preset", "published-gsm8k-r128", *space)
    assert options.rank == 8, "the class's own default, since the space names the rank"
    assert not any(word.startswith("warmup=") for word in options.set)


@pytest.mark.parametrize("name", COUNTS)
def test_experts_have_the_scales_of_the_reference_code(name: str) -> None:
    """Its GOAT rounds alpha / d up and divides by d, the rank of an expert; its LoRAMoE has alpha / rank."""
    options = read_preset(name).options
    rank, alpha = options["rank"], options["alpha"]
    expected = {"goat": math.ceil(alpha / (rank // 8)) / (rank // 8), "lora_moe": alpha / rank}
    for variant_name, scale in expected.items():
        words = dict(word.split("=") for word in published_words(name, [variant_name]))
        own = float(words.get(f"{variant_name}.alpha", alpha))
        variant = catalogue.get(variant_name)
        assert variant.scaling(variant.validate_settings(VariantSettings(rank, own))) == scale


def test_settings_of_variants_that_take_no_part_are_left_out() -> None:
    words = published_words("published-gsm8k-r128", ["lora", "lora-moe"])
    assert [word for word in words if "." in word.partition("=")[0]] == [
        "lora_moe.experts=8",
        "lora_moe.top_k=2",
        "lora_moe.balance=0",
        "lora_moe.alpha=32",
    ], "the preset's own value replaces that of the list of variants"
