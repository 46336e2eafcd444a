"""Small folders with the data of the survey's two language tasks, in the hub's schema."""

from __future__ import annotations

from pathlib import Path

import hub_folder

TYPES = ("GSM_AnsAug", "GSM_Rephrased", "GSM_SV", "MATH_AnsAug")


def metamathqa(root: Path, questions: int = 120) -> Path:
    """Write a folder of MetaMathQA with four rows per original question, and a folder of GSM8K."""
    rows = []
    for number in range(questions):
        question = f"Tom has {number} apples and buys 2. How many has he?"
        for kind in TYPES:
            query = question if kind.endswith("AnsAug") else f"{question} ({kind})"
            response = f"{number} + 2 = {number + 2}.\n#### {number + 2}\nThe answer is: {number + 2}"
            row = {"type": kind, "query": query, "original_question": question, "response": response}
            rows.append(row)
    hub_folder.write(root, "meta-math/MetaMathQA", {"train": rows})
    test = [
        {"question": f"{n} and 1?", "answer": f"It is <<{n}+1=>>{n + 1}.\n#### {n + 1}"} for n in range(6)
    ]
    hub_folder.write(root, "openai/gsm8k", {"test": test}, subset="main")
    return root


DOUBLE = '''def double(n):
    """ Return the number n that is given multiplied by the number two.
    >>> double(2)
    4
    """
'''
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": DOUBLE,
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def add_one(n):\r\n  return n + 1",
    "test_list": ["assert add_one(1) == 2", "assert add_one(-1) == 0"],
    "test_setup_code": "",
}


def codefeedback(root: Path, rows: int = 1500) -> Path:
    examples = []
    for number in range(rows):
        answer = f"Like so:\n\n```python\nx = {number}\n```\n\nThen:\n```\nmore\n```"
        examples.append({"query": f"Set x to {number}.", "answer": answer, "lang": "python"})
    examples.append({"query": "Set x in C.", "answer": "int x;", "lang": "c"})
    copied = "Please: return the number n that is given\n  multiplied by the number TWO. In Python."
    examples += [{"query": f"{copied} {n}", "answer": "2 * n", "lang": "python"} for n in range(4)]
    hub_folder.write(root, "m-a-p/CodeFeedback-Filtered-Instruction", {"train": examples})
    hub_folder.write(root, "openai/openai_humaneval", {"test": [HUMAN_EVAL] * 2})
    without_function = {**MBPP, "code": "add_one = 1"}
    hub_folder.write(
        root, "google-research-datasets/mbpp", {"test": [MBPP, without_function, MBPP]}, subset="full"
    )
    return root
