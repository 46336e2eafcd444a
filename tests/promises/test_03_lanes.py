"""Promise 3: lanes do not disturb each other, and training equals that of transformers' Trainer and PEFT."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import as_a_user
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from watched import RAISES, RUNS_OUT_OF_MEMORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

WATCHED = Path(__file__).with_name("watched.py")
HEALTHY = (1e-3, 3e-3)
DIVERGES = 1e6
STEPS, ROWS, RANK, ALPHA = 20, 24, 8, 16
DECAY, CLIP, EPSILON = 0.3, 2.2, 1e-3
STUDY = (
    *("study", "--dry-run", "--study", "lanes", "--model", "letters-base", "--variants", WATCHED),
    *("--data", "rows.jsonl", "--validation-data", "validation.jsonl", "--test-data", "test.jsonl"),
    *("--steps", str(STEPS), "--batch-size", str(ROWS), "--lr-schedule", "constant", "--seeds", "1"),
    *("--set", "warmup=0", f"weight_decay={DECAY}", f"clip_norm={CLIP}"),
    *(f"epsilon={EPSILON}", "--widen", "0"),
    *("--trainers", "1"),
)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write rows for the base model of the dry run: the answer is the next letter of each letter."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = [rng.choice("abcdefghijklmno") for _ in range(rng.randint(2, 6))]
        answer = [chr(ord(letter) + 1) for letter in letters]
        rows.append({"prompt": " ".join(["next", *letters, "="]), "completion": " ".join(answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def study(home: Path, *words: str) -> as_a_user.Result:
    write_rows(home / "rows.jsonl", ROWS, seed=1)
    write_rows(home / "validation.jsonl", 16, seed=2)
    write_rows(home / "test.jsonl", 16, seed=3)
    (home / "watched").mkdir()
    return as_a_user.run(*STUDY, *words, cwd=home, WATCHED=str(home / "watched"))


@pytest.fixture(scope="module")
def together(made_once: Callable[..., Path], with_base: Path) -> Path:
    """Return the folder of a study whose five lanes train together. Two of them finish."""

    def make(folder: Path) -> None:
        shutil.copytree(with_base, folder, dirs_exist_ok=True)
        rates = map(str, (HEALTHY[0], RAISES, DIVERGES, RUNS_OUT_OF_MEMORY, HEALTHY[1]))
        result = study(folder, "--lanes-per-trainer", "5", "--learning-rates", *rates)
        assert result.code == 1, f"two configurations have no result: {result}"
        assert "Traceback" not in result.err

    return made_once("together", make)


def by_rate(home: Path) -> dict[float, dict[str, Any]]:
    return {as_a_user.learning_rate(record): record for record in as_a_user.records(home).values()}


def test_a_lane_that_fails_is_a_result(together: Path) -> None:
    found = by_rate(together)
    assert {rate: record["state"] for rate, record in found.items()} == {
        HEALTHY[0]: "finished",
        HEALTHY[1]: "finished",
        DIVERGES: "diverged",
        RAISES: "failed",
        RUNS_OUT_OF_MEMORY: "failed",
    }
    assert f"no lane of this variant learns at {RAISES}" in found[RAISES]["reason"]
    assert "before_step" in found[RAISES]["traceback"]
    assert "--accumulation" in found[RUNS_OUT_OF_MEMORY]["reason"], "it names what needs less memory"
    runs = as_a_user.mlflow_runs(together, "lanes")
    status = {run.data.tags["fingerprint"]: run.info.status for run in runs if "fingerprint" in run.data.tags}
    assert len(runs) == len(status) + 1 == 6
    assert {rate: status[record["fingerprint"]] == "FAILED" for rate, record in found.items()} == {
        rate: record["state"] == "failed" for rate, record in found.items()
    }
    assert (together / "results" / "lanes" / "report.html").exists()


def test_a_lane_alone_equals_the_lane_beside_others_to_the_bit(together: Path, home: Path) -> None:
    rates = map(str, HEALTHY)
    result = study(home, "--lanes-per-trainer", "1", "--learning-rates", *rates)
    assert result.code == 0, result
    alone, beside = by_rate(home), by_rate(together)
    for rate in HEALTHY:
        assert as_a_user.results(alone[rate]) == as_a_user.results(beside[rate])


class InOrder(transformers.Trainer):
    """A Trainer that does not shuffle. A batch has all rows, so their order does not change the loss."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def encoded(rows: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Return token ids and labels of the rows. As in docs/own_data.md, answer and end token have a loss."""
    examples = []
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(row["prompt"]).input_ids
        answer = tokenizer(" " + row["completion"], add_special_tokens=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return examples


def test_twenty_steps_equal_those_of_trainer_and_peft(together: Path, tmp_path: Path) -> None:
    """Both trainings start from the lane's initial factors A and B, which watched.py saved.

    A larger learning rate, or AdamW's default epsilon, would magnify the rounding errors of float32.
    """
    rate = HEALTHY[0]
    (base,) = (together / "results" / "store" / "bases").glob("letters-base-*")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    initial = load_file(together / "watched" / f"initial-{rate:g}-0.safetensors")
    layers = sorted({name.rpartition(".")[0] for name in initial})
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers),
    )
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == len(initial)
    with torch.no_grad():
        for name, value in initial.items():
            layer, _, factor = name.rpartition(".")
            trained[f"base_model.model.{layer}.lora_{factor}.default.weight"].copy_(value)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        adam_epsilon=EPSILON,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model,
        arguments,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
        train_dataset=encoded(together / "rows.jsonl", tokenizer),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = by_rate(together)[rate]["curve"]
    for name, mine, tolerance in (
        ("loss", "loss", 1e-6),
        ("learning_rate", "learning_rate", 1e-6),
        ("grad_norm", "gradient_norm", 1e-4),
    ):
        theirs = [float(entry[name]) for entry in log]
        assert [step[mine] for step in curve] == pytest.approx(theirs, rel=tolerance)
    norms = [step["gradient_norm"] for step in curve]
    assert min(norms) < CLIP < max(norms), "some gradients are clipped, and others are not"
