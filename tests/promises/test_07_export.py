"""Promise 7: a lane exported for PEFT, for transformers or as raw tensors has the scores of its record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import as_a_user
import pytest
import tiny_models
from forked_commands import Commands

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

VARIANTS = ("lora", "dora", "sine_lora", "hydra_lora")
"""The last two have no adapter in PEFT's format; the last one cannot be merged, either."""


def rows() -> list[tuple[str, str, str]]:
    """Return rows of a prompt, an answer and a split."""
    splits = ("train", "train", "train", "validation", "test")
    pairs = list(permutations("abcdefgh", 2))
    return [(f"copy {a} {b} =", f"{b} {a}", splits[number % 5]) for number, (a, b) in enumerate(pairs)]


TEST = [(prompt, answer) for prompt, answer, split in rows() if split == "test"]


def make_model(folder: Path) -> None:
    """Save a language model that copies two letters. The study teaches it to swap them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models.llama(folder))
    tokenizer = tiny_models.tokenizer()
    ids = torch.tensor(
        [tokenizer(f"{prompt} {answer[::-1]} <eos>").input_ids for prompt, answer, _ in rows()]
    )
    labels = torch.where(torch.arange(ids.shape[1]) < 4, -100, ids)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def train(folder: Path, model: Path) -> None:
    """Train one lane of each variant, and keep its adapter."""
    lines = [",".join(row) for row in [("prompt", "completion", "split"), *rows()]]
    (folder / "copy.csv").write_text("\n".join(lines) + "\n")
    options = ["--data", "copy.csv", "--model", str(model), "--study", "mine", "--metric", "exact_match"]
    options += ["--learning-rates", "3e-3", "--widen", "0", "--seeds", "1", "--rank", "4"]
    options += ["--steps", "60", "--evaluations", "1", "--trainers", "1"]
    print(as_a_user.succeed("study", "--dry-run", *options, "--variants", *VARIANTS, cwd=folder))


@pytest.fixture(scope="module")
def trained(made_once: Callable[..., Path]) -> Path:
    """Return the working folder of a study of four lanes. Tests only read it."""
    model = made_once("copying-llama", make_model)
    return made_once("to-export", lambda folder: train(folder, model))


@pytest.fixture(scope="module")
def commands(trained: Path) -> Iterator[Commands]:
    """Yield a process that runs exports."""
    made = Commands(["export", "mine", "--variant", "lora", "--to", "first"], folder=trained)
    yield made
    made.close()


@pytest.fixture(scope="module")
def exported(
    commands: Commands, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function: words after `export mine --variant` -> folder of the export, which is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def export(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("exported") / "lane"
            result = commands.run("export", "mine", "--variant", *words, "--to", folder, cwd=trained)
            assert result.code == 0, result
            made[words] = folder
        return made[words]

    return export


def recorded(trained: Path, variant: str) -> dict[str, float]:
    """Return the test scores in the record of a variant."""
    (record,) = [
        r for r in as_a_user.records(trained).values() if r["configuration"]["variant"]["name"] == variant
    ]
    (found,) = [each["scores"] for each in record["evaluations"] if each["split"] == "test"]
    return {"loss": found["loss"], "exact_match": found["exact_match"]}


def logits_and_labels(model: Any) -> tuple[Any, Any]:
    """Return for the answers of the test rows logits, (rows, tokens, vocabulary), and ids, (rows, tokens)."""
    import torch

    tokenizer = tiny_models.tokenizer()
    prompts = torch.tensor([tokenizer(prompt).input_ids for prompt, _ in TEST])
    answers = torch.tensor([[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for _, answer in TEST])
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompts, answers], 1)).logits
    return logits[:, prompts.shape[1] - 1 : -1].float(), answers


def scores(model: Any) -> dict[str, float]:
    """Return the test scores of a model, computed without this project."""
    import torch

    logits, labels = logits_and_labels(model)
    right = (logits.argmax(-1) == labels).all(dim=1).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    return {"loss": loss, "exact_match": right}


def python_lines(folder: Path) -> list[str]:
    """Return the blocks of Python in the model card of an export."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [block.replace("FOLDER", str(folder)) for block in blocks]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_loads_in_peft_and_has_the_scores_of_its_record(
    variant: str, trained: Path, exported: Callable[..., Path]
) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(exported(variant)).eval()
    assert scores(model) == pytest.approx(recorded(trained, variant), rel=1e-4)


@pytest.mark.parametrize("words", [("lora", "--merge"), ("dora", "--merge"), ("sine_lora",)], ids=" ".join)
def test_a_merged_model_is_a_model_of_transformers_with_the_scores_of_the_record(
    words: tuple[str, ...], trained: Path, exported: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = exported(*words)
    assert not list(folder.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert scores(model) == pytest.approx(recorded(trained, words[0]), rel=1e-4)


def test_an_adapter_and_a_merged_model_have_the_same_logits(exported: Callable[..., Path]) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter, _ = logits_and_labels(AutoPeftModelForCausalLM.from_pretrained(exported("dora")).eval())
    merged, _ = logits_and_labels(AutoModelForCausalLM.from_pretrained(exported("dora", "--merge")).eval())
    torch.testing.assert_close(adapter, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", [("lora", "--raw"), ("hydra_lora",)], ids=" ".join)
def test_the_tensors_of_a_lane_load_by_the_lines_of_the_card(
    words: tuple[str, ...], trained: Path, exported: Callable[..., Path]
) -> None:
    variables: dict[str, Any] = {}
    for code in python_lines(exported(*words)):
        exec(code, variables)
    with variables["adapters"].activate_lanes(["lane"], None):
        found = scores(variables["base"].eval())
    assert found == pytest.approx(recorded(trained, words[0]), rel=1e-4)


READER = """
import io, json, sys
from contextlib import redirect_stdout

sys.modules["orchestrator"] = sys.modules["variants"] = None  # an import of them is an error
answers = []
for (load, predict), prompts in json.load(sys.stdin):
    variables = {}
    exec(load, variables)
    answers.append([])
    for prompt in prompts:
        with redirect_stdout(io.StringIO()) as printed:
            exec(predict.replace("INPUT", prompt), variables)
        answers[-1].append(printed.getvalue().strip())
json.dump(answers, sys.stdout)
"""
"""A program that runs the Python blocks of model cards, and cannot import this project."""


def test_the_lines_of_the_card_give_the_answers_of_the_record_without_this_project(
    trained: Path, exported: Callable[..., Path]
) -> None:
    folders = {"lora": exported("lora"), "sine_lora": exported("sine_lora")}
    prompts = [prompt for prompt, _ in TEST]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER],
        input=json.dumps([(python_lines(folder), prompts) for folder in folders.values()]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for variant, answers in zip(folders, json.loads(done.stdout), strict=True):
        right = [said.split() == answer.split() for said, (_, answer) in zip(answers, TEST, strict=True)]
        assert sum(right) / len(right) == pytest.approx(recorded(trained, variant)["exact_match"]), variant


REFUSED = {
    "an unknown study": ("export mien", "'mien' 'mine'"),
    "an unknown variant": ("export mine --variant pissa", "'pissa'"),
    "a fingerprint that is none": ("export mine best!", "best!"),
    "a variant that cannot be merged": ("export mine --variant hydra_lora --merge", "hydra_lora --merge"),
    "two forms": ("export mine --merge --raw", "--merge --raw"),
    "a folder of the user": ("export mine --to results", "--to"),
    "an unknown record": ("show 0123456789abcdef0123", "0123456789abcdef0123"),
    "a report of an unknown study": ("report mien", "'mien' 'mine'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_or_shown_is_refused_in_one_line(
    case: str, trained: Path, commands: Commands
) -> None:
    words, named = REFUSED[case]
    before = sorted(trained.rglob("*"))
    result = commands.run(*words.split(), cwd=trained)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert not [word for word in named.split() if word not in result.err], result
    assert sorted(trained.rglob("*")) == before
