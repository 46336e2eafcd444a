"""Options become configurations, and what does not fit model, task or data is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from data_rows import CHATS, MAILS, write
from image_data import picture
from in_process import SWEEP, Run
from resolved import bases, resolve_one_task
from tiny_images import vit

from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import max_learned_positions
from orchestrator.finetune.resolve.data import prepare_datasets
from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import letters
from orchestrator.finetune.tasks.base import Example
from orchestrator.finetune.tasks.examples import Image, find_overlaps
from orchestrator.finetune.tasks.reviews import Reviews
from orchestrator.study.configuration import BatchConfig, Configuration, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

__all__ = ["bases"]


def resolve_configurations(bases: Path, task: str = "reviews", **options: Any) -> list[Configuration]:
    usual = {"task": (task,), "variants": ("lora",), "model": str(bases / task)}
    return resolve_one_task(StudyOptions(**usual | options), bases)[1]


def test_inputs_that_two_splits_share_are_counted_those_that_are_trained_on_and_tested_first() -> None:
    one, other, text, more = Example("a", "b"), Example("c", "b"), Example("", "d"), Example("", "e")
    assert find_overlaps({"train": [one, text], "validation": [other], "test": [more]}, "x") == []
    found = find_overlaps({"train": [one], "validation": [one, other], "test": [one, other, text]}, "x")
    assert found == [
        "1 of 3 test rows have the input of a training row; their scores measure memorization",
        "1 of 2 validation rows have the input of a training row; their scores measure memorization",
        "2 of 3 test rows have the input of a validation row; the learning rate is chosen by their scores",
    ]
    red, blue = (Example("", "a", image=Image(name, name.encode)) for name in ("red", "blue"))
    (line,) = find_overlaps({"train": [red], "validation": [text], "test": [red, blue]}, "x")
    assert line.startswith("1 of 2 test rows have the input of a training row")


def test_test_rows_that_are_all_training_rows_are_refused() -> None:
    one, other, relabeled = Example("a", "b"), Example("c", "b"), Example("a", "c")
    with pytest.raises(UsageError, match=r"^x: all 2 test rows are training rows, .*; give other test rows"):
        find_overlaps({"train": [one, other], "validation": [other], "test": [one, one]}, "x")
    assert find_overlaps({"train": [one], "validation": [other], "test": [one, relabeled]}, "x")


def test_options_that_a_variant_lacks_do_not_change_its_configuration(bases: Path) -> None:
    study_options: dict[str, Any] = {"variants": ("lora", "head_only", "full", "hira", "delta_lora")}
    usual = resolve_configurations(bases, **study_options)
    other = resolve_configurations(
        bases, **study_options, rank=4, alpha=1.0, targets="query,value", dropout=0.1
    )
    same = {a.variant.name: a.fingerprint == b.fingerprint for a, b in zip(usual, other, strict=True)}
    assert same == {"lora": False, "head_only": True, "full": True, "hira": False, "delta_lora": False}
    assert [c.variant.rank for c in other] == [4, 0, 0, 4, 4]
    assert [c.variant.alpha for c in other] == [1.0, None, None, None, 1.0]
    assert [c.variant.dropout for c in other] == [0.1, 0.0, 0.0, 0.1, 0.0]


def test_accumulation_splits_the_batch(bases: Path) -> None:
    defaults = tasks.get("reviews").defaults
    (one,) = resolve_configurations(bases, accumulation=4)
    assert one.batches == BatchConfig(defaults.batch_size // 4, 4, defaults.max_length)
    (one,) = resolve_configurations(bases, accumulation=2, batch_size=6)
    assert one.batches == BatchConfig(3, 2, defaults.max_length)
    with pytest.raises(UsageError, match="--accumulation 3: must divide the batch size, 32; take 2"):
        resolve_configurations(bases, accumulation=3)
    with pytest.raises(UsageError, match="every worker needs a row of the 32 in a batch; take 32"):
        resolve_configurations(bases, accumulation=16, workers_per_trainer=33)


def test_a_lane_is_evaluated_as_often_as_requested_and_at_most_once_a_step(bases: Path) -> None:
    (usual,) = resolve_configurations(bases)
    assert usual.evaluations == Reviews.defaults.evaluations
    assert resolve_configurations(bases, evaluations=12)[0].evaluations == 12
    assert resolve_configurations(bases, steps=2)[0].evaluations == 2
    with pytest.raises(UsageError, match="--evaluations 12: a fine-tune has 5 steps"):
        resolve_configurations(bases, evaluations=12, steps=5)
    with pytest.raises(UsageError, match="--evaluations 0"):
        StudyOptions(evaluations=0)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"batch_size": 4, "train_size": 80}, 40),
        ({"set": ("batch_size=4", "train_size=80")}, 40),
        ({"set": ("train_size=80", "lora.batch_size=8")}, 20),
    ],
)
def test_epochs_are_passes_over_the_rows_that_are_trained_on(
    given: dict[str, Any], steps: int, bases: Path
) -> None:
    (one,) = resolve_configurations(bases, epochs=2, **given)
    assert one.lr_schedule.steps == steps


def test_the_sizes_of_the_splits_can_be_set_and_are_other_configurations(bases: Path) -> None:
    (usual,) = resolve_configurations(bases)
    (one,) = resolve_configurations(bases, train_size=100, test_size=1000)
    assert one.task == replace(usual.task, train_size=100, test_size=1000)
    assert one.fingerprint != usual.fingerprint
    assert len(tasks.get("reviews").load(one.task)["test"]) == 1000
    for option in ("train_size", "test_size"):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} 0"):
            StudyOptions(**{option: 0})
    short = replace(tasks.get("digits").choice(), test_size=5000)
    with pytest.raises(UsageError, match="'digits' has 245 test examples, 5000 are needed"):
        tasks.get("digits").load(short)


def test_a_heads_rate_needs_a_head(bases: Path) -> None:
    (same,) = resolve_configurations(bases)
    (other,) = resolve_configurations(bases, head_learning_rate="1e-3")
    assert (same.optimizer.head_learning_rate, other.optimizer.head_learning_rate) == (None, 1e-3)
    with pytest.raises(UsageError, match="--head-learning-rate 1e-3: task 'letters' has no head; take same"):
        resolve_configurations(bases, task="letters", head_learning_rate="1e-3")


def test_head_only_needs_a_head(bases: Path) -> None:
    with pytest.raises(UsageError, match="with head_only: head_only trains the task's head alone"):
        resolve_configurations(bases, task="letters", variants=("lora", "head-only"))


SEES_ANSWER = "its tokens attend to later ones, so it would see the answer"


def plan_and_load_calls(folder: Path, root: Path) -> list[Callable[[], object]]:
    """Return two functions for the model in a folder: one plans a `letters` study, one loads the weights."""
    choice = ModelChoice(str(folder), model_catalogue.prepare_base_model(str(folder), root))
    return [
        lambda: resolve_configurations(root, "letters", model=str(folder)),
        lambda: loading.load_base_model(choice, root, "cpu", tasks.get("letters")),
    ]


def assert_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def add_end_token(folder: Path) -> Path:
    """Give the tokenizer of a folder, which may have none, an end token."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    words.eos_token = words.sep_token
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "deberta"])
def test_an_encoder_is_refused_where_the_answer_is_the_next_tokens(kind: str, tmp_path: Path) -> None:
    """An encoder attends in both directions and would see the answer. Both functions refuse it."""
    from transformers import AutoModelForMaskedLM

    folder = add_end_token(encoders.save(kind, tmp_path))
    with suppress_transformers_logging():  # the discriminator of ELECTRA has no head for words
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    # For DistilBERT and DeBERTa, transformers has no class for language models.
    message = "Unrecognized configuration class" if kind in ("distilbert", "deberta") else SEES_ANSWER
    for refuses in plan_and_load_calls(folder, tmp_path / "bases"):
        assert_refused(refuses, message)


def test_a_bert_that_is_a_decoder_may_give_the_next_tokens(tmp_path: Path) -> None:
    folder = add_end_token(encoders.save("bert", tmp_path, is_decoder=True))
    for accepts in plan_and_load_calls(folder, tmp_path / "bases"):
        accepts()


def test_a_decoder_whose_configuration_makes_it_attend_both_ways_is_refused(
    bases: Path, tmp_path: Path
) -> None:
    """LLM2Vec writes such a configuration. The attention modules have is_causal=True nevertheless."""
    from transformers import AutoConfig

    shutil.copytree(bases / "letters", tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    config.is_causal = False
    config.save_pretrained(tmp_path / "m")
    for refuses in plan_and_load_calls(tmp_path / "m", tmp_path / "bases"):
        assert_refused(refuses, SEES_ANSWER)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}),
        ("OpenAIGPT", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}),
        ("OPT", {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("Bart", {"d_model": 16, "decoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2}),
    ],
)
def test_the_positions_of_a_model_are_as_many_as_it_computes(kind: str, sizes: dict[str, int]) -> None:
    import transformers

    arguments = {"max_position_embeddings": 12, "vocab_size": 30, "word_embed_proj_dim": 16, **sizes}
    config = getattr(transformers, f"{kind}Config")(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert max_learned_positions(model) == 12
    model(input_ids=torch.zeros((1, 12), dtype=torch.int64))
    with pytest.raises(Exception, match=r"size of tensor|out of range|expanded size"):
        model(input_ids=torch.zeros((1, 13), dtype=torch.int64))


def test_a_model_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    """On a GPU, an index out of the range of a table ends the process."""
    most = Reviews.defaults.max_length
    for room, padding in ((most, 0), (most - 1, 0), (most + 1, 2)):
        folder = encoders.save(
            "roberta" if padding else "bert", tmp_path / str(room), max_position_embeddings=room
        )
        if room - padding >= most:
            resolve_configurations(tmp_path, model=str(folder))
            continue
        with pytest.raises(
            UsageError, match=f"positions for {most - 1} tokens, .* up to {most}; take"
        ) as caught:
            resolve_configurations(tmp_path, model=str(folder))
        assert "\n" not in str(caught.value)


LONG = """
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults

class Long(Task):
    floor, default_model, output = 0.0, "letters-base", OUTPUT
    defaults = TaskDefaults(
        train_size=8, validation_size=8, test_size=8, steps=2, batch_size=8, max_length=5,
        evaluations=1, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        prompt = "a b c d e f g =" if split == "test" else "a ="
        return [Example(prompt, "a b")] * count
"""


@pytest.mark.parametrize(
    ("output", "needed"), [('"teacher_forced"', 10), ('"generation"\n    max_new_tokens = 5', 12)]
)
@pytest.mark.parametrize("missing", [0, 1])
def test_a_held_out_text_longer_than_the_positions_is_refused_before_ray_starts(
    output: str, needed: int, missing: int, tmp_path: Path
) -> None:
    """Held-out texts are not truncated, and a prompt of eight tokens grows by four generated ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    words, room = letters.tokenizer(), needed - missing
    config = GPT2Config(vocab_size=len(words), n_positions=room, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    (tmp_path / "long.py").write_text(LONG.replace("OUTPUT", output))
    (one,) = resolve_configurations(tmp_path, str(tmp_path / "long.py"), model=str(tmp_path / "m"))
    prepare = lambda: prepare_datasets([one], tmp_path, tmp_path / "data", lambda text: None)  # noqa: E731
    if missing:
        assert_refused(
            prepare, f"positions for {room} tokens, and task .* needs up to {needed}; take another --model"
        )
        return
    prepare()
    if "generation" in output:
        prompt = torch.tensor([words("a b c d e f g =")["input_ids"]])
        model.generate(prompt, max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_token_without_an_embedding_is_refused_before_ray_starts(
    missing: int, bases: Path, tmp_path: Path
) -> None:
    """On a GPU, an index out of range ends the worker's process and all its lanes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(bases / "letters", tmp_path / "base")
    found = resolve_configurations(bases, "letters")[0]
    prepare_datasets([found], bases, tmp_path / "data", lambda text: None)
    kept = dataset_cache.prepare_dataset(
        tmp_path / "data",
        found,
        tasks.get("letters"),
        loading.load_processor(found.model, bases, tasks.get("letters")),
    )
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.vocab_size = dataset_cache.max_token_id(kept) + 1 - missing
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    smaller = resolve_configurations(tmp_path, "letters", model=str(tmp_path / "base"))
    if not missing:
        prepare_datasets(smaller, tmp_path, tmp_path / "data", lambda text: None)
        return
    with pytest.raises(
        UsageError, match=f"embeddings for {config.vocab_size} tokens, from 0 on; take"
    ) as caught:
        prepare_datasets(smaller, tmp_path, tmp_path / "data", lambda text: None)
    assert "\n" not in str(caught.value)


NARROW = "it is a small model for task"
CASES = {
    "the words of letters": ("chats.jsonl", "letters-base", [f"{NARROW} 'letters'", "take another --model"]),
    "the words of reviews": ("chats.jsonl", "reviews-base", [f"{NARROW} 'reviews'", "example smollm2-135m"]),
    "images of another size": ("colors", "digits-base", [f"{NARROW} 'digits'", "the model takes 8 x 8"]),
    "images for a text model": ("colors", "minilm-l6", ["is a text model", "take an image model"]),
    "texts for an image model": ("mails.jsonl", "vit", ["is an image model", "has texts; take a text model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_read_the_data_is_refused_by_a_plan(case: str, tmp_path: Path, run: Run) -> None:
    data, model, expected = CASES[case]
    write(tmp_path / "chats.jsonl", CHATS)
    write(tmp_path / "mails.jsonl", MAILS)
    for number in range(30):
        place = tmp_path / "colors" / ("red", "green", "blue")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number, number % 3))
    vit(tmp_path / "vit")
    run(SWEEP, "--plan", "--data", data, "--model", model).assert_refused(f"--model {model}", *expected)
