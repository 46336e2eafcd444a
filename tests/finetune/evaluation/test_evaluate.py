"""Scores of lanes on a split, by teacher forcing and by generation."""

from __future__ import annotations

import pytest
import torch
from scripted import WORDS_TASK, tiny_base_model
from three_lanes import NAMES, compute_logits, three_lanes, tokenized_split
from torch.nn.functional import cross_entropy

from orchestrator.finetune.evaluation.evaluate import EvaluationSplit, _grade_generated, evaluate
from orchestrator.finetune.evaluation.forward import accepts_logits_to_keep
from orchestrator.finetune.evaluation.generate import EvaluatedLanes
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, WorkerError
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Example, Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError
from variants import catalogue as variants
from variants.adapters import attach
from variants.api import VariantSettings


def split_of(task: Task, base_model: BaseModel, size: int = 24) -> EvaluationSplit:
    return tokenized_split(task.examples("validation", size), task, base_model.tokenizer, max_row_length=31)


def make_base_model(dtype: str = "float32") -> BaseModel:
    return tiny_base_model(ModelChoice("tiny", "0" * 64, dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["letters", WORDS_TASK])
def test_a_lanes_scores_do_not_depend_on_other_lanes(name: str) -> None:
    base_model, task = make_base_model(), tasks.get(name)
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters:
        together = evaluate(base_model, task, split, EvaluatedLanes(adapters, NAMES, [0, 0, 0]))
        alone = [evaluate(base_model, task, split, EvaluatedLanes(adapters, [n], [0]))[0] for n in NAMES]
    assert together == alone
    assert len({one.scores["loss"] for one in alone}) == 3


@pytest.mark.parametrize("bad_grade", [float("nan"), 1.5, -0.1, float("inf")])
def test_a_grade_outside_0_to_1_is_named(bad_grade: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a grade would make the lane's score in its record meaningless."""
    base_model, task = make_base_model(), tasks.get(WORDS_TASK)
    monkeypatch.setattr(type(task), "grade", lambda *_: bad_grade)
    with (
        three_lanes(base_model) as adapters,
        pytest.raises(UsageError, match=f"is {bad_grade}; must be a number from 0"),
    ):
        evaluate(
            base_model,
            task,
            split_of(task, base_model),
            EvaluatedLanes(adapters, ["y"], [0]),
        )


def test_scores_equal_those_of_plain_forward_passes() -> None:
    base_model, task = make_base_model(), tasks.get(WORDS_TASK)
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters, torch.no_grad():
        found = evaluate(base_model, task, split, EvaluatedLanes(adapters, ["y"], [0]))[0]
        losses, hits, answers = [], [], []
        for row in split.rows:  # one row at a time, without padding
            with adapters.activate_lanes(["y"], None):
                logits = base_model.model(input_ids=torch.tensor([row.ids])).logits[0]
            labels = torch.tensor(row.targets)
            losses.append(cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX).item())
            hits.append((logits.argmax(-1) == labels)[labels != IGNORE_INDEX])
            new, eos = [], base_model.tokenizer.eos_token_id
            while len(new) < task.max_new_tokens and eos not in new:
                with adapters.activate_lanes(["y"], None):
                    text = torch.tensor([[*row.prompt, *new]])
                    new.append(base_model.model(input_ids=text).logits[0, -1].argmax().item())
            answers.append(
                base_model.tokenizer.decode([i for i in new if i != eos], skip_special_tokens=True)
            )
    tokens = [len(h) for h in hits]
    assert found.scores["loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    assert found.scores["accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert found.items.loss == pytest.approx([x / n for x, n in zip(losses, tokens, strict=True)], rel=1e-5)
    assert found.items.answers == tuple(answers)
    assert found.items.correct == tuple(
        task.grade(e, a) for e, a in zip(split.examples, answers, strict=True)
    )


def test_generation_and_teacher_forcing_agree_for_exact_match() -> None:
    base_model, generated = make_base_model(), tasks.get(WORDS_TASK)
    forced = type(generated)()
    forced.output = "teacher_forced"  # type: ignore[misc]
    split = split_of(generated, base_model)
    adapters = attach(base_model.model, variants.get("lora"), VariantSettings(rank=4, alpha=8.0), "blocks")
    adapters.add_lane("x", VariantSettings(rank=4, alpha=8.0), seed=0)
    # After a short training some answers are right and others wrong.
    optimizer = torch.optim.AdamW(adapters.trainable("x").values(), lr=0.02)
    for _ in range(30):
        for batch in split.batches:
            with adapters.activate_lanes(["x"], None):
                logits, labels = compute_logits(base_model, generated, batch)
                cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    one, other = (
        evaluate(base_model, t, split, EvaluatedLanes(adapters, ["x"], [0]))[0] for t in (generated, forced)
    )
    assert one.items.correct == other.items.correct
    assert one.scores == other.scores
    assert 0 < sum(one.items.correct) < len(split.rows)
    assert other.items.answers == ()


def test_disabled_adapters_give_the_scores_of_the_bare_model() -> None:
    base_model, task = make_base_model(), tasks.get("letters")
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters:
        off = evaluate(base_model, task, split, EvaluatedLanes(adapters))[0]
    # The adapters are detached here.
    assert evaluate(base_model, task, split, EvaluatedLanes(adapters))[0] == off


def test_leaving_out_columns_without_labels_changes_no_logits() -> None:
    base_model, task = make_base_model(), tasks.get(WORDS_TASK)
    for batch in split_of(task, base_model).batches:
        assert accepts_logits_to_keep(type(base_model.model).forward)
        assert (batch.targets != IGNORE_INDEX).any(0).sum() < batch.length
        logits, labels = compute_logits(base_model, task, batch)
        full = base_model.model(input_ids=batch.ids).logits
        places = batch.targets != IGNORE_INDEX
        assert torch.equal(labels, batch.targets[places])
        torch.testing.assert_close(logits, full[places])


def test_the_models_generation_settings_are_ignored_and_restored() -> None:
    base_model, task = make_base_model(), tasks.get(WORDS_TASK)
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters:
        plain = evaluate(base_model, task, split, EvaluatedLanes(adapters, ["z"], [0]))[0]
        own = base_model.model.generation_config
        own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 3.0
        again = evaluate(base_model, task, split, EvaluatedLanes(adapters, ["z"], [0]))[0]
    assert again == plain
    assert base_model.model.generation_config is own
    assert (own.do_sample, own.temperature) == (True, 5.0)


def test_grading_that_ends_the_process_fails_the_lane_with_its_traceback() -> None:
    class Ends(Task):
        name = "ends"

        def grade(self, example: Example, answer: str) -> float:
            raise SystemExit(7)

    split = EvaluationSplit([Example("a", "b")], [], max_row_length=8, processor=None)
    with pytest.raises(RuntimeError, match="SystemExit: 7") as caught:
        _grade_generated(Ends(), split, [[("b",)]], SINGLE_PROCESS_GROUP)
    assert "in grade" in WorkerError.from_exception(caught.value).traceback_text
