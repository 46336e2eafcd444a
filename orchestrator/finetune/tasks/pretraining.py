"""What the small bases have in common that tasks pretrain themselves: bits that anybody can make again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """How a base is made: AdamW at `learning_rate`, linear warm-up over `warmup_steps`, then a cosine to 0 at
    `steps`. `version` is raised by hand when the task's code changes what comes out."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 50
    label_smoothing: float = 0.0
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 3
    heads: int = 4
    seed: int = 0
    version: int = 1

    def key(self, *more: object) -> str:
        """Names all that decides what comes out: this, and what else the task says (JSON values)."""
        return hashlib.sha256(json.dumps([asdict(self), *more]).encode()).hexdigest()[:16]


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """During it torch draws from `seed`, on one thread: the order in which threads add up would change the
    last bits of the weights, and so the base's content."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def fit(
    model: Any,
    recipe: Recipe,
    batches: Iterable[T],
    compute_loss: Callable[[T], torch.Tensor],
    name: str,
    progress: Callable[[str], None],
) -> Any:
    """Trains all of `model` and returns it; `name` is the base's, for people."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    for step, batch in enumerate(batches, start=1):
        loss = compute_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == recipe.steps:
            progress(f"pretraining {name}: step {step} of {recipe.steps}, loss {loss.item():.3f}")
    return model.eval()


def _lr_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    past = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def word_tokenizer(words: Sequence[str], **special_tokens: str) -> Any:
    """One token a word, as a transformers tokenizer; `special`: pad_token and the like, all in `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=64, **special_tokens
    )
