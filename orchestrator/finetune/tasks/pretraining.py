"""Deterministic pretraining of the small base models of tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from orchestrator.finetune.tasks.user_task import LocalTask

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """The settings of a pretraining run: AdamW with linear warm-up, then a cosine schedule to 0.

    Args:
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: The learning rate after warm-up.
        weight_decay: The weight decay.
        warmup_steps: Steps of warm-up.
        label_smoothing: The label smoothing of the loss.
        hidden_size: The width of the model.
        intermediate_size: The width of its MLPs.
        layers: Its number of layers.
        heads: Its attention heads.
        seed: The seed of weights and batches.
        version: Raised by hand when the task's code changes the result.
    """

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

    @property
    def model_sizes(self) -> dict[str, Any]:
        """The sizes of the model as arguments of its configuration in transformers."""
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        return sizes | {"num_hidden_layers": self.layers, "num_attention_heads": self.heads}

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, in units of `learning_rate`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        fraction = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


class PretrainedTask(LocalTask):
    """A task that pretrains its own base model, which is small enough for two cores.

    A subclass sets `recipe` and `recipe_constants`; it overrides `processor`, `base_config` and `train_base`.

    Args:
        recipe: How the base model is pretrained. Default: the recipe of the class.
    """

    recipe: Recipe
    recipe_constants: ClassVar[tuple[object, ...]]
    """JSON values beyond the recipe that decide the base model."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or self.recipe

    def processor(self) -> Any:
        """Return the tokenizer or the image processor of the base model."""
        raise NotImplementedError

    def train_base(self, progress: Callable[[str], None]) -> Any:
        """Return the trained base model, without a head that fine-tuning replaces.

        Args:
            progress: Called with a line from time to time.
        """
        raise NotImplementedError

    def pretrain_recipe(self) -> str:
        """Return a key of everything that decides the base model: 16 hexadecimal digits of a SHA-256."""
        data = json.dumps([asdict(self.recipe), *self.recipe_constants])
        return hashlib.sha256(data.encode()).hexdigest()[:16]

    def pretrain(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Train the base model and save it with its processor; see `Task.pretrain`.

        Training uses one thread. With several the order of summation varies, which would change the last bits
        of the weights and so the content hash of the base model.
        """
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.recipe.seed)
                model = self.train_base(progress)
        finally:
            torch.set_num_threads(threads)
        model.save_pretrained(folder)
        self.processor().save_pretrained(folder)

    def fit(
        self,
        model: Any,
        batches: Iterable[T],
        compute_loss: Callable[[T], torch.Tensor],
        progress: Callable[[str], None],
    ) -> Any:
        """Train all parameters of a model, and return it in evaluation mode.

        Args:
            model: The model.
            batches: The batches, one per step.
            compute_loss: Returns the loss of a batch.
            progress: Called with a line every 100 steps.
        """
        import torch

        recipe, parameters = self.recipe, list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.lr_factor)
        for step, batch in enumerate(batches, start=1):
            loss = compute_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            if step % 100 == 0 or step == recipe.steps:
                line = f"step {step} of {recipe.steps}, loss {loss.item():.3f}"
                progress(f"pretraining {self.name}-base: {line}")
        return model.eval()


def word_tokenizer(words: Sequence[str], **special_tokens: str) -> Any:
    """Return a tokenizer of transformers with one token per word.

    Args:
        words: The vocabulary; the index of a word is its id.
        special_tokens: `pad_token` and the like; their values are in the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=64, **special_tokens
    )
