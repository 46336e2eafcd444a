"""Greedy answers of several lanes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from orchestrator.finetune.data import Row, scoring_plan
from orchestrator.finetune.models import Bench
from orchestrator.finetune.team import Team


@torch.no_grad()
def answers(
    bench: Bench,
    rows: Sequence[Row],
    cap: int,
    max_new_tokens: int,
    lanes: int,
    lane_rows: Callable[[], AbstractContextManager[Any]],
    team: Team,
) -> list[tuple[str, ...]]:
    """What each lane says to each row's prompt, up to the end token, in the order of `rows`. The team share
    the work, and all get to know everything."""
    tokenizer = bench.tokenizer
    mine: dict[tuple[int, int], str] = {}
    plan = scoring_plan([len(r.prompt) for r in rows], cap)
    with lane_rows(), _greedy(bench.model, tokenizer, max_new_tokens):
        for length, items in plan[team.rank :: team.size]:
            # Prompts are padded on the left, so that all answers begin in one column.
            short = [length - len(rows[i].prompt) for i in items]
            ids = torch.tensor(
                [[*[tokenizer.pad_token_id] * n, *rows[i].prompt] for n, i in zip(short, items, strict=True)]
            )
            mask = torch.tensor([[*[0] * n, *[1] * (length - n)] for n in short])
            told = bench.model.generate(
                input_ids=ids.repeat(lanes, 1).to(bench.device),
                attention_mask=mask.repeat(lanes, 1).to(bench.device),
            )
            for row, new in enumerate(told[:, length:].tolist()):
                mine[row // len(items), items[row % len(items)]] = _text(new, tokenizer)
    found = {place: text for theirs in team.gather(mine) for place, text in theirs.items()}
    return [tuple(found[lane, item] for item in range(len(rows))) for lane in range(lanes)]


def _text(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding: what a model's own settings add (sampling, penalties) is left out meanwhile."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
