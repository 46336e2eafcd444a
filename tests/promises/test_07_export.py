"""Promise 7: a lane exported for PEFT, for transformers or as raw tensors has the scores of its record.

So has a lane that lm-evaluation-harness scores, from its export or by `evaluate`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
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

import orchestrator

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


@pytest.mark.parametrize("variant", ["dora", "sine_lora"])
def test_a_lora_of_full_rank_has_the_logits_of_the_lane_and_one_of_a_low_rank_says_what_it_leaves_out(
    variant: str, exported: Callable[..., Path]
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from torch.testing import assert_close
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(exported(variant, "--merge")).eval()
    lane, _ = logits_and_labels(merged)
    distances, errors = [], []
    for rank in (4, 16, 32):
        folder = exported(variant, "--as-lora", str(rank))
        config = PeftConfig.from_pretrained(folder)
        assert (config.peft_type, config.r, config.use_dora) == ("LORA", rank, False)
        found, _ = logits_and_labels(AutoPeftModelForCausalLM.from_pretrained(folder).eval())
        distances.append((found - lane).square().mean().item())
        card = (folder / "README.md").read_text()
        (error,) = re.findall(rf"LoRA of rank {rank} leaves out (\S+) of the lane's update", card)
        errors.append(float(error))
        assert f"--max-lora-rank {max(rank, 8)} " in card
        assert "model-index" not in card  # it would give these weights the scores of the lane
    assert distances == sorted(distances, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]
    assert_close(found, lane, rtol=1e-4, atol=1e-4)


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


def write_harness_tasks(folder: Path) -> Path:
    """Write tasks of lm_eval with the prompts, answers and stop of the study, as YAML (JSON is YAML)."""
    rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in TEST]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 8, "until": ["<eos>"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    likely = {
        "output_type": "loglikelihood",
        "doc_to_target": " {{answer}} <eos>",  # the space and the end token belong to the answer
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (folder / "docs.py").write_text("def same(docs): return docs")
    for name, own in {"swap_generated": generated, "swap_likely": likely}.items():
        text = json.dumps({"task": name, **shared, **own, "process_docs": "FUNCTION"})
        (folder / f"{name}.yaml").write_text(text.replace('"FUNCTION"', "!function docs.same"))
    return folder


def assert_equal_items(trained: Path, variant: str, likelihoods: list[float], right: list[float]) -> None:
    """Check the scores of each test item against the record, which has the items in another order.

    No two items have equal losses, so their order shows which item is which.
    """
    (record,) = [
        r for r in as_a_user.records(trained).values() if r["configuration"]["variant"]["name"] == variant
    ]
    own, tokens = record["items"]["test"], 3  # two letters and the end token
    found = sorted((-value / tokens, correct) for value, correct in zip(likelihoods, right, strict=True))
    expected = sorted(zip(own["loss"], own["correct"], strict=True))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [correct for _, correct in found] == [correct for _, correct in expected]


@pytest.mark.parametrize("variant", ["lora", "sine_lora"])
def test_the_line_of_the_card_gives_the_scores_of_the_record_in_lm_eval(
    variant: str, trained: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    """An adapter of PEFT, and a merged model."""
    folder, tasks = exported(variant), write_harness_tasks(tmp_path / "tasks")
    (line,) = re.findall(r"^lm_eval .*", (folder / "README.md").read_text(), re.MULTILINE)
    line = line.replace("FOLDER", str(folder)).replace("TASKS", "swap_generated,swap_likely")
    more = ["--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line), *map(str, more)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    samples = {}
    for name in ("swap_generated", "swap_likely"):
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[name] = rows
    likelihoods = [row["perplexity"] for row in samples["swap_likely"]]
    right = [row["exact_match"] for row in samples["swap_generated"]]
    assert_equal_items(trained, variant, likelihoods, right)


def test_evaluate_gives_every_variant_its_scores_and_evaluates_nothing_twice(
    trained: Path, commands: Commands, tmp_path: Path
) -> None:
    folder, tasks = tmp_path / "mine", write_harness_tasks(tmp_path / "tasks")
    shutil.copytree(trained, folder)
    words = ["evaluate", "mine", "--include-path", tasks, "--tasks", "swap_generated,swap_likely"]
    first = commands.run(*words, cwd=folder)
    assert (first.code, "10 evaluations; 0 were known" in first.out) == (0, True), first
    results = orchestrator.load("mine", output=folder / "results")
    table = results.harness.set_index(["curve", "task", "metric"])
    store = folder / "results" / "store" / "harness"
    for name, record in as_a_user.records(folder).items():
        variant = record["configuration"]["variant"]["name"]
        files = [store / name / f"{task}.json" for task in ("swap_likely", "swap_generated")]
        likely, generated = (json.loads(file.read_text())["scores"][0]["items"] for file in files)
        assert_equal_items(folder, variant, likely, generated)
        row = table.loc[variant, "swap_generated", "exact_match,none"]
        assert row["score"] == pytest.approx(recorded(folder, variant)["exact_match"])
        assert (row["untrained"], row["difference"]) == (0, row["score"])
    assert "Scores in lm-evaluation-harness" in (folder / "results/mine/report.html").read_text()
    files = {path: path.stat().st_mtime_ns for path in store.rglob("*.json")}
    again = commands.run(*words, cwd=folder)
    assert "0 evaluations; 10 were known" in again.out, again
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.json")} == files
    (tasks / "rows.jsonl").write_text('{"prompt": "copy a b =", "answer": "b a"}\n')
    name = table.loc["lora", "swap_likely", "acc,none"]["fingerprint"]
    other = commands.run(*words[:2], name[:12], *words[2:], cwd=folder)
    assert "4 evaluations; 0 were known" in other.out, other


REFUSED = {
    "an unknown study": ("export mien", "'mien' 'mine'"),
    "an unknown variant": ("export mine --variant pissa", "'pissa'"),
    "a fingerprint that is none": ("export mine best!", "best!"),
    "a variant that cannot be merged": ("export mine --variant hydra_lora --merge", "hydra_lora --merge"),
    "a variant that is no LoRA": (
        "export mine --variant hydra_lora --as-lora 4",
        "hydra_lora --as-lora gates",
    ),
    "a rank of no layer": ("export mine --variant lora --as-lora 99", "--as-lora 99 32"),
    "an unknown task of lm_eval": ("evaluate mine --tasks arc_esay", "'arc_esay' 'arc_easy'"),
    "no task of lm_eval": ("evaluate mine", "--tasks gsm8k"),
    "a folder of tasks that is none": (
        "evaluate mine --tasks arc_easy --include-path no",
        "--include-path no",
    ),
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
