"""Reviews of two clauses with a topic and a mood: a classification task that is small enough for two cores.

A text is `QUESTION the NOUN was [not] [very] ADJECTIVE and|but the NOUN was [not] [very] ADJECTIVE`. The base
model, a small encoder, is pretrained on five questions (topic and mood of each clause, and the conjunction)
and on a sixth one, `unk`, which stands for a random one of the five. In fine-tuning, with a new head, `unk`
asks for topic and mood of the decisive clause: the second one after `but`, the first one after `and`. So the
base model computes the parts of the answer, but a head alone cannot combine them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.examples import check_count
from orchestrator.finetune.tasks.pretraining import PretrainedTask, Recipe, word_tokenizer

if TYPE_CHECKING:
    import torch

NOUNS = {
    "food": ("soup", "bread", "steak", "salad", "cheese", "pasta", "coffee", "cake", "wine", "fish"),
    "room": ("bed", "bath", "desk", "lamp", "carpet", "window", "door", "sofa", "curtain", "shower"),
    "staff": ("waiter", "cook", "porter", "maid", "guide", "driver", "clerk", "barman", "guard", "host"),
    "show": ("film", "band", "song", "dance", "play", "singer", "plot", "stage", "actor", "choir"),
}
ADJECTIVES = {
    "good": (
        *("good", "great", "lovely", "superb", "pleasant", "excellent"),
        *("charming", "perfect", "splendid", "fine", "nice", "delightful"),
    ),
    "bad": (
        *("bad", "awful", "nasty", "dreadful", "poor", "horrible"),
        *("terrible", "dull", "shabby", "vile", "dismal", "grim"),
    ),
}
CONJUNCTIONS = ("and", "but")
QUESTIONS = ("topic1", "topic2", "mood1", "mood2", "conjunction")
VOCABULARY = (
    *("<pad>", "unk", *QUESTIONS, "the", "was", "not", "very", *CONJUNCTIONS),
    *(word for group in (*NOUNS.values(), *ADJECTIVES.values()) for word in group),
)
PRETRAINING_LABELS = (*NOUNS, *ADJECTIVES, *CONJUNCTIONS)
MAX_EXAMPLES = 100_000
RECIPE = Recipe(steps=1000, batch_size=64, learning_rate=1e-3)


@dataclass(frozen=True)
class Review:
    """A review.

    Args:
        text: Its words.
        answers: The answers to QUESTIONS, in their order.
    """

    text: str
    answers: tuple[str, ...]

    @property
    def label(self) -> str:
        """The class: topic and mood of the decisive clause."""
        *topics_and_moods, conjunction = self.answers
        return " ".join(topics_and_moods[CONJUNCTIONS.index(conjunction) :: len(CONJUNCTIONS)])


class Reviews(PretrainedTask, entry="reviews"):
    """Classification of reviews by topic and mood of the decisive clause."""

    labels = tuple(f"{topic} {mood}" for topic in NOUNS for mood in ADJECTIVES)
    recipe = RECIPE
    recipe_constants = (VOCABULARY,)

    def examples(self, split: Split, count: int) -> list[Example]:
        check_count(range(MAX_EXAMPLES), count, self.name, split)  # drawing more would take minutes
        # The hash of a text decides its split. The classes take turns, so that all have equal shares.
        generator = random.Random(f"reviews/{split}")
        seen: dict[str, str] = {}
        while len(seen) < count:
            review = draw_review(generator)
            label = self.labels[len(seen) % len(self.labels)]
            if review.label == label and review.text not in seen and hash_split(review.text) == split:
                seen[review.text] = review.label
        return [Example(f"unk {text}", label) for text, label in seen.items()]

    def processor(self) -> Any:
        return tokenizer()

    def base_config(self) -> Any:
        from transformers import BertConfig

        return BertConfig(
            **self.recipe.model_sizes,
            vocab_size=len(VOCABULARY),
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=VOCABULARY.index("<pad>"),
        )

    def train_base(self, progress: Callable[[str], None]) -> Any:
        from torch.nn.functional import cross_entropy
        from transformers import BertForSequenceClassification

        config = self.base_config()
        config.num_labels = len(PRETRAINING_LABELS)
        model = BertForSequenceClassification(config)

        def compute_loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            ids, answers = batch
            real = ids != VOCABULARY.index("<pad>")
            return cross_entropy(model(input_ids=ids, attention_mask=real[:, None, None, :]).logits, answers)

        return self.fit(model, _batches(self.recipe), compute_loss, progress).bert


def draw_review(generator: random.Random) -> Review:
    """Return a random review.

    A clause is negated with probability 0.15, which inverts its mood; `very` has no effect on the mood.

    Args:
        generator: The source of random numbers.
    """
    words: list[str] = []
    topics, moods = [], []
    conjunction = generator.choice(CONJUNCTIONS)
    for start in ((), (conjunction,)):
        topic, mood = generator.choice(list(NOUNS)), generator.choice(list(ADJECTIVES))
        negated = generator.random() < 0.15
        words += [*start, "the", generator.choice(NOUNS[topic]), "was"]
        words += [word for word, used in (("not", negated), ("very", generator.random() < 0.3)) if used]
        words.append(generator.choice(ADJECTIVES[mood]))
        topics.append(topic)
        moods.append({"good": "bad", "bad": "good"}[mood] if negated else mood)
    return Review(" ".join(words), (*topics, *moods, conjunction))


def tokenizer() -> Any:
    """Return the base model's tokenizer, with one token per word.

    The question is the first token, where the head of BERT reads the class.
    """
    return word_tokenizer(VOCABULARY, pad_token="<pad>")


def _batches(recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids (batch, 16), padded, and classes (batch,), which are indices of PRETRAINING_LABELS.

    Texts of held-out splits are left out.
    """
    import torch

    generator = random.Random(f"reviews/pretraining/{recipe.seed}")
    token_ids = {word: i for i, word in enumerate(VOCABULARY)}
    for _ in range(recipe.steps):
        rows: list[list[int]] = []
        answers: list[int] = []
        while len(rows) < recipe.batch_size:
            review = draw_review(generator)
            if hash_split(review.text) != "train":
                continue
            number = generator.randrange(len(QUESTIONS))
            # In one of six samples `unk` replaces the question.
            shown = "unk" if generator.randrange(len(QUESTIONS) + 1) == 0 else QUESTIONS[number]
            ids = [token_ids[word] for word in (shown, *review.text.split())]
            rows.append([*ids, *[token_ids["<pad>"]] * (16 - len(ids))])
            answers.append(PRETRAINING_LABELS.index(review.answers[number]))
        yield torch.tensor(rows), torch.tensor(answers)
