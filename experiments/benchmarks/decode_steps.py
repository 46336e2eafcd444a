"""Count the decode steps that the answers of one evaluation take, from the plan of their batches.

    python experiments/benchmarks/decode_steps.py --free-gib 60

The default is the final evaluation of a lane of the default study: 500 validation and 1,319 test problems,
answered by Qwen3-0.6B. The data are not read: lengths are drawn from log-normal distributions with the means
of MetaMathQA in the tokens of Qwen3 (a prompt 113, an answer 137).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import Qwen3Config

from experiments.benchmarks.markdown_table import markdown_table
from orchestrator.finetune.evaluation.generation_plan import (
    BatchPlan,
    GenerationLimits,
    plan_generation_batches,
)

QWEN3_06B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
SPLITS: Mapping[str, int] = {"validation": 500, "test": 1319}
"""Split -> problems."""
MEAN_PROMPT, MEAN_ANSWER, MAX_LENGTH, MAX_NEW_TOKENS = 113, 137, 511, 512
SPREAD = 0.5
"""The standard deviation of the logarithm of a length."""


def draw_lengths(count: int, mean: int, longest: int, seed: int) -> list[int]:
    """Draw lengths from a log-normal distribution.

    Args:
        count: The number of lengths.
        mean: Their mean in tokens, before the cut.
        longest: The cut: longer ones become this long.
        seed: Decides what is drawn.
    """
    drawn = np.random.RandomState(seed).lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)
    return [int(length) for length in np.clip(drawn, 8, longest)]


@dataclass(frozen=True)
class DecodeSteps:
    """The forward passes of a plan."""

    batches: int
    steps: int
    """Passes that compute a new token: for each batch the number of tokens of its longest answer."""
    row_steps: int
    """Rows computed in all steps, if each row leaves the batch when its answer ends."""
    padded_row_steps: int
    """Rows computed in all steps, if every row stays until the longest answer of its batch ends."""


def count_decode_steps(plan: BatchPlan, answer_lengths: Sequence[int]) -> DecodeSteps:
    """Count the decode steps of one lane.

    Args:
        plan: The batches, as `plan_generation_batches` makes them.
        answer_lengths: The length of each answer in tokens, its end token included.
    """
    longest = [max(answer_lengths[item] for item in items) for _, items in plan]
    padded = sum(steps * len(items) for steps, (_, items) in zip(longest, plan, strict=True))
    return DecodeSteps(len(plan), sum(longest), sum(answer_lengths), padded)


def count_study(limits: GenerationLimits, longest_answers: bool) -> DecodeSteps:
    """Count the decode steps of a lane's final evaluation in the default study.

    Args:
        limits: The limits of a batch.
        longest_answers: Whether every answer has the largest length, as those of an untrained model may.
    """
    found = []
    for number, count in enumerate(SPLITS.values()):
        prompts = draw_lengths(count, MEAN_PROMPT, MAX_LENGTH, 10 * number)
        answers = draw_lengths(count, MEAN_ANSWER, MAX_NEW_TOKENS - 1, 10 * number + 1)
        plan = plan_generation_batches(prompts, MAX_LENGTH, MAX_NEW_TOKENS, limits)
        found.append(count_decode_steps(plan, [MAX_NEW_TOKENS] * count if longest_answers else answers))
    return DecodeSteps(
        sum(one.batches for one in found),
        sum(one.steps for one in found),
        sum(one.row_steps for one in found),
        sum(one.padded_row_steps for one in found),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the decode steps with the sizes of a CPU and with those of a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--free-gib", type=float, default=60.0, help="free memory of the GPU in GiB (default: 60)"
    )
    free_gib = parser.parse_args(arguments).free_gib
    rows = []
    for device in ("cpu", "cuda"):
        limits = GenerationLimits.from_memory(QWEN3_06B, 2, int(free_gib * 2**30), device)
        for longest_answers in (True, False):
            found = count_study(limits, longest_answers)
            rows.append(
                [
                    f"{'GPU' if device == 'cuda' else 'CPU'}, "
                    f"{'all answers of 512 tokens' if longest_answers else 'drawn lengths'}",
                    f"{found.batches}",
                    f"{found.steps:,}",
                    f"{found.padded_row_steps:,}",
                    f"{found.row_steps:,}",
                ]
            )
    columns = ["sizes, answers", "batches", "decode steps", "rows without leaving", "rows with leaving"]
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
