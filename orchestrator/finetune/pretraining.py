"""What the small bases have in common that tasks pretrain themselves: bits that anybody can make again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Recipe(Protocol):
    """AdamW at `learning_rate`: linear warm-up over `warmup_steps`, then a cosine to 0 at `steps`."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
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
    loss_of: Callable[[T], torch.Tensor],
    name: str,
    progress: Callable[[str], None],
) -> Any:
    """Trains all of `model` and returns it; `name` is the base's, for people."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == recipe.steps:
            progress(f"pretraining {name}: step {step} of {recipe.steps}, loss {loss.item():.3f}")
    return model.eval()


def _cosine(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    past = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def word_tokenizer(words: Sequence[str], **special: str) -> Any:
    """One token a word, as a transformers tokenizer; `special`: pad_token and the like, all in `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=None))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=known, clean_up_tokenization_spaces=False, model_max_length=64, **special
    )
