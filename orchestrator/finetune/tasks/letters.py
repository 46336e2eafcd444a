"""Operators on strings of letters: a text generation task that is small enough for two cores.

A text is `OPERATOR x1 .. x5 = y1 .. y5` over 16 letters. The base model is pretrained, in half a minute, on
five operators (copy, reverse, next letter, previous letter, rotate left) and on a sixth one, `unk`, which
stands for a random one of the five: its predictions for `unk` are then spread out rather than confidently
wrong. Fine-tuning gives `unk` a new meaning: reverse, then next letter (`unk a c b d e = f e c d b`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.examples import check_count
from orchestrator.finetune.tasks.pretraining import PretrainedTask, Recipe, word_tokenizer

if TYPE_CHECKING:
    import torch

LETTERS = "abcdefghijklmnop"
LENGTH = 5
OPERATORS = ("copy", "reverse", "next", "previous", "rotate")
MAX_EXAMPLES = 100_000
"""Examples per split. Each held-out split has about 210,000 of the 16^5 = 1,048,576 strings."""
GENERAL_EXAMPLES = 100
VOCABULARY = ("<pad>", "<eos>", "=", "unk", *OPERATORS, *LETTERS)
RECIPE = Recipe(
    steps=600, batch_size=96, learning_rate=2e-3, label_smoothing=0.05, hidden_size=96, intermediate_size=192
)


class Letters(PretrainedTask, entry="letters"):
    """Applying the operator `unk` to strings of letters."""

    recipe = RECIPE
    recipe_constants = (VOCABULARY, LENGTH)

    def examples(self, split: Split, count: int) -> list[Example]:
        check_count(range(MAX_EXAMPLES), count, self.name, split)  # drawing more would take minutes
        # The hash of a string decides its split; each split has a random generator of its own.
        generator = random.Random(f"letters/{split}")
        seen: dict[str, None] = {}
        while len(seen) < count:
            word = "".join(LETTERS[generator.randrange(len(LETTERS))] for _ in range(LENGTH))
            if hash_split(word) == split:
                seen[word] = None
        return [Example(f"unk {' '.join(word)} =", " ".join(reverse_next(word))) for word in seen]

    def general_examples(self) -> list[Example]:
        generator = random.Random("letters/general")
        words = ["".join(generator.choices(LETTERS, k=LENGTH)) for _ in range(GENERAL_EXAMPLES)]
        operators = OPERATORS * (GENERAL_EXAMPLES // len(OPERATORS))
        return [
            Example(f"{operator} {' '.join(word)} =", " ".join(apply_operator(operator, word)))
            for operator, word in zip(operators, words, strict=True)
        ]

    def processor(self) -> Any:
        return tokenizer()

    def base_config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            **self.recipe.model_sizes,
            vocab_size=len(VOCABULARY),
            num_key_value_heads=self.recipe.heads,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=VOCABULARY.index("<eos>"),
            pad_token_id=VOCABULARY.index("<pad>"),
        )

    def train_base(self, progress: Callable[[str], None]) -> Any:
        from torch.nn.functional import cross_entropy
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(self.base_config())

        def compute_loss(ids: torch.Tensor) -> torch.Tensor:
            # Loss on the answer and <eos> only: the tokens before them are random.
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, LENGTH + 1 :].flatten(0, 1)
            answers = ids[:, LENGTH + 2 :].flatten()
            return cross_entropy(logits, answers, label_smoothing=self.recipe.label_smoothing)

        return self.fit(model, _batches(self.recipe), compute_loss, progress)


def reverse_next(word: str) -> str:
    """Return the result of `unk`: the reversed string with each letter replaced by the next one (p by a)."""
    return apply_operator("next", apply_operator("reverse", word))


def apply_operator(operator: str, word: str) -> str:
    """Return the result of one of OPERATORS on a string."""
    if operator in ("next", "previous"):
        shift = 1 if operator == "next" else -1
        return "".join(LETTERS[(LETTERS.index(letter) + shift) % len(LETTERS)] for letter in word)
    return {"copy": word, "reverse": word[::-1], "rotate": word[1:] + word[:1]}[operator]


def tokenizer() -> Any:
    """Return the base model's tokenizer, with one token per word."""
    return word_tokenizer(VOCABULARY, pad_token="<pad>", eos_token="<eos>")


def _batches(recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield token ids (batch, 2 * LENGTH + 3): operator, letters, =, answer, <eos>."""
    import torch

    first_letter, first_operator = VOCABULARY.index(LETTERS[0]), VOCABULARY.index(OPERATORS[0])
    rows = torch.arange(recipe.batch_size)
    for _ in range(recipe.steps):
        x = torch.randint(len(LETTERS), (recipe.batch_size, LENGTH))
        following, preceding = (x + 1) % len(LETTERS), (x - 1) % len(LETTERS)
        results = torch.stack([x, x.flip(1), following, preceding, x.roll(-1, dims=1)])
        operator = torch.randint(len(OPERATORS), (recipe.batch_size,))
        # In one of six samples `unk` replaces the operator.
        is_masked = torch.randint(len(OPERATORS) + 1, (recipe.batch_size,)) == 0
        shown = torch.where(is_masked, VOCABULARY.index("unk"), operator + first_operator)
        equals = torch.full((recipe.batch_size, 1), VOCABULARY.index("="))
        end = torch.full((recipe.batch_size, 1), VOCABULARY.index("<eos>"))
        y = results[operator, rows]
        yield torch.cat([shown[:, None], x + first_letter, equals, y + first_letter, end], dim=1)
