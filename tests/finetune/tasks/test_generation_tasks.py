"""The hub's generation tasks, on folders with the hub's schema: examples, grading, and runs of the loop.

The loop trains a small Llama with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_folder
import pytest
from generation_data import codefeedback, metamathqa
from huggingface_hub import constants

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.instruct import cut_after_first_block
from orchestrator.util.errors import UsageError

NAMES = ("metamathqa", "codefeedback", "commonsense_15k", "alpaca")


def commonsense_15k(root: Path) -> Path:
    rows = [
        {
            "instruction": f"Is {n} even?\n\nAnswer format: true/false",
            "output": "",
            "answer": str(n % 2 == 0).lower(),
        }
        for n in range(400)
    ]
    hub_folder.write(root, "zwhe99/commonsense_170k", {"train": rows})
    science = {"choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    hub_folder.write(root, "google/boolq", {"validation": [{"question": "is ice cold", "answer": True}] * 2})
    piqa = {"goal": "Cool a drink.", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0}
    hub_folder.write(root, "ybisk/piqa", {"validation": [piqa] * 2})
    siqa = {
        "context": "Ann fell.",
        "question": "How is she?",
        "answerA": "sad",
        "answerB": "up",
        "answerC": "so",
    }
    hub_folder.write(root, "allenai/social_i_qa", {"validation": [{**siqa, "label": "1"}] * 2})
    hellaswag = {
        "activity_label": "Ice",
        "ctx": "It melts",
        "endings": ["up", "down", "now", "."],
        "label": "2",
    }
    hub_folder.write(root, "Rowan/hellaswag", {"validation": [hellaswag] * 2})
    winogrande = {"sentence": "The _ melts.", "option1": "ice", "option2": "stone", "answer": "1"}
    hub_folder.write(root, "allenai/winogrande", {"validation": [winogrande] * 2}, subset="winogrande_xl")
    for subset in ("ARC-Easy", "ARC-Challenge"):
        row = {"question": "What is hot?", **science}
        hub_folder.write(root, "allenai/ai2_arc", {"test": [row] * 2}, subset=subset)
    hub_folder.write(
        root, "allenai/openbookqa", {"test": [{"question_stem": "Hot is", **science}] * 2}, subset="main"
    )
    return root


def alpaca(root: Path) -> Path:
    rows = [
        {"instruction": f"Say {n}.", "input": "" if n % 2 else "Loudly.", "output": f"{n}!"}
        for n in range(400)
    ]
    hub_folder.write(root, "yahma/alpaca-cleaned", {"train": rows})
    instructions = {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"]}
    kwargs = [{"keywords": None, "num_words": None}, {"keywords": ["corn"], "num_words": None}]
    prompts = [{"prompt": f"Speak of corn: {n}.", **instructions, "kwargs": kwargs} for n in range(40)]
    hub_folder.write(root, "google/IFEval", {"train": prompts})
    return root


FOLDERS = {
    "metamathqa": metamathqa,
    "codefeedback": codefeedback,
    "commonsense_15k": commonsense_15k,
    "alpaca": alpaca,
}
SIZES = {
    "metamathqa": (100, 4, 6),
    "codefeedback": (600, 2, 1),
    "commonsense_15k": (200, 4, 16),
    "alpaca": (200, 4, 6),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_folder.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def task(
    request: pytest.FixtureRequest, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Task:
    found = catalogue.get(request.param)
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(folders[request.param]))
    hub_folder.small(found, monkeypatch, *SIZES[request.param])
    return found


@pytest.mark.parametrize(
    "task", ["metamathqa", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])], indirect=True
)
def test_a_task_is_trained_and_evaluated_end_to_end(
    task: Task, folders: Mapping[str, Path], model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(task, "max_new_tokens", 12)  # an untrained model does not generate an end token
    if task.samples > 1:
        monkeypatch.setattr(task, "samples", 2)  # to save time: a program takes 0.1 s
    seeds = (0, 1) if task.name == "metamathqa" else (0,)
    records = hub_folder.through_the_loop(task, folders[task.name], model, tmp_path, monkeypatch, seeds=seeds)
    graded = {"validation": task.defaults.validation_size, "test": task.defaults.test_size}
    if task.name in ("codefeedback", "alpaca"):  # the other half counts in the loss only
        graded["validation"] //= 2
    for record in records:
        hub_folder.assert_went_through(record, task, graded)
        # Answers are generated in the last evaluation only.
        on_the_way, *_ = record.evaluations
        assert on_the_way.step == hub_folder.STEPS // 2
        assert set(on_the_way.scores) == {"loss", "bits_per_byte", "accuracy"}


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_splits_share_no_question(task: Task) -> None:
    parts = {
        split: {e.prompt for e in task.examples(split, n)}
        for split, n in zip(("train", "validation", "test"), SIZES[task.name], strict=True)
    }  # type: ignore[arg-type]
    assert not parts["train"] & parts["validation"]
    assert not parts["train"] & parts["test"]
    with pytest.raises(UsageError, match=rf"Task '{task.name}' has \d+ test examples, 100000 are needed"):
        task.load(replace(task.choice(), test_size=100_000))


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_reference_answers_are_correct_and_others_are_not(task: Task) -> None:
    """The task itself grades both held-out splits."""
    if task.name == "alpaca":
        (example,) = task.examples("test", 1)
        assert task.grade_all([example] * 3, ["Corn is good.", "Corn, yes.", "Wheat."]) == [1.0, 0.0, 0.0]
        return
    for split, count in (("validation", 4), ("test", 2)):
        graded = [e for e in task.examples(split, count) if e.counts_in != "loss"]  # type: ignore[arg-type]
        assert task.grade_all(graded, [e.answer for e in graded]) == [1.0] * len(graded)
        assert task.grade_all(graded, ["I do not know." for _ in graded]) == [0.0] * len(graded)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_hub_the_error_says_in_one_line_what_to_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(
        UsageError, match=rf"Task '{name}': .* cannot be read from the data hub .*Set HF_TOKEN"
    ) as caught:
        catalogue.get(name).choice()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["metamathqa"], indirect=True)
def test_the_validation_split_of_metamathqa_has_each_gsm8k_question_once(task: Task) -> None:
    validation = task.examples("validation", 4)
    assert len({e.prompt for e in validation}) == 4
    train = task.examples("train", 100)
    for example in validation:
        question = example.prompt.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
        assert "(" not in question
        assert not any(question in other.prompt for other in train)  # in any of its four forms
        assert example.prompt.endswith("### Response: Let's think step by step.")
    assert len({e.prompt for e in train}) > 70  # all four types are in the training split
    first = task.examples("test", 1)[0]
    assert first.answer == " It is 1.\nThe answer is: 1"
    assert task.grade(first, " So it is $1.00 in all. The answer is: 1") == 1.0
    assert task.grade(first, " The answer is: 2") == 0.0


@pytest.mark.parametrize("task", ["codefeedback"], indirect=True)
def test_codefeedback_trains_on_python_without_human_eval(task: Task) -> None:
    trained_on = task.examples("train", 600)
    assert not any("in C" in e.prompt or "multiplied by" in e.prompt.lower() for e in trained_on)
    assert trained_on[0].answer.endswith("\n```")
    assert trained_on[0].answer.count("```") == 2
    assert cut_after_first_block("no block") == "no block"
    loss_example, problem = task.examples("validation", 2)
    assert (loss_example.counts_in, problem.counts_in) == ("loss", "metric")
    assert (
        'def add_one(n):\n    """Write a function to add one.\n\n    assert add_one(1) == 2\n    """'
        in problem.prompt
    )
    assert problem.prompt.endswith("### Response:\n```python\n")
    assert task.grade_all(
        [problem] * 2, ["def add_one(n):\n    return 1 - -n", "def add_one(n):\n    return 2"]
    ) == [1, 0]


@pytest.mark.parametrize("task", ["commonsense_15k"], indirect=True)
def test_the_test_split_of_commonsense_alternates_between_the_eight_sets(task: Task) -> None:
    test = task.examples("test", 16)
    answers = [e.answer.removeprefix(" the correct answer is ") for e in test[:8]]
    assert answers == ["true", "solution1", "answer1", "ending3", "option1", "answer2", "answer2", "answer2"]
    assert test[:8] == test[8:]
    indent = " " * 16
    question = (
        f"{indent}Please choose the correct answer to the question: Hot is\n\nAnswer1: ice Answer2: fire\n\n"
    )
    assert (
        question + f"Answer format: answer1/answer2\n\n{indent}### Response:\n{indent[1:]}" in test[7].prompt
    )
    assert task.grade(test[7], " the correct answer is answer1") == 0.0
