"""A task: its examples, what the model has to produce, its metric, and the defaults of a fine-tuning run.

A task on a dataset of the hub is an entry in `tasks.toml`. Any other task is a subclass of `Task`; short ones
to start from, whose settings are in `tasks.toml`, are in `arithmetic.py` (answers in text) and `reviews.py`
(classes). A file with a task imports heavy libraries inside functions only, since a plan reads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE
from orchestrator.finetune.tasks.examples import (
    HELD_OUT_SPLITS,
    IGNORE_INDEX,
    SPLITS,
    EncodedExample,
    Example,
    Image,
    Split,
    check_examples,
    find_overlaps,
    hash_examples,
    hash_split,
)
from orchestrator.study.configuration import (
    HYPERPARAMETERS,
    Dtype,
    Hyperparameter,
    LRScheduleName,
    TaskChoice,
)
from orchestrator.util.errors import UsageError, suggest_nearest

__all__ = ["SPLITS", "EncodedExample", "Example", "Image", "Split", "Task", "TaskDefaults", "hash_split"]

Output = Literal["teacher_forced", "generation", "classification", "regression"]
"""The form of the model's output:

- teacher_forced: an answer is correct if in one teacher-forced pass the argmax equals every label. This is
  the result of greedy decoding if answers are graded by equality of strings.
- generation: an answer is generated and then graded by `Task.grade`.
- classification: a head chooses one of `Task.labels` (cross-entropy).
- regression: a head predicts a number (squared error).
"""
INVERSE_PERPLEXITY = "inverse_perplexity"
"""A metric of teacher-forced answers and of classes: exp(-loss), from 0 to 1. It takes the place of the loss,
which cannot be a metric: a higher score must be better, and a task must have a lowest score, its floor."""
Grader = Literal["exact", "math", "choice", "token_f1"]
GradeAt = Literal["every_evaluation", "last_evaluation"]
"""The evaluations in which answers are generated and graded. With "last_evaluation" the earlier ones compute
the loss only, which takes a small part of the time and is all that early stopping needs."""


COUNT = Hyperparameter(value_type=int, ge=1, le=1_000_000_000)
TOKENS = replace(COUNT, le=10_000_000)


@dataclass(frozen=True)
class TaskDefaults:
    """The settings of a fine-tuning run on a task, unless the command line changes them.

    Args:
        train_size: Training examples.
        validation_size: Validation examples.
        test_size: Test examples.
        steps: Optimizer steps.
        batch_size: Examples per step.
        max_length: The longest training example in tokens; 0 for images.
        evaluations: Evaluations on the validation split, evenly spaced.
        learning_rates: The grid of learning rates.
        warmup: The part of the steps in which the learning rate rises linearly.
        dtype: The data type of the base model's weights.
        schedule: The course of the learning rate after warm-up.
        weight_decay: The weight decay of AdamW.
        base_dropout: Whether the dropout of the base model is on in training.
        accumulation: The number of micro-batches of a batch, for a task whose batch does not fit usual GPUs.
    """

    train_size: Annotated[int, COUNT]
    validation_size: Annotated[int, COUNT]
    test_size: Annotated[int, COUNT]
    steps: Annotated[int, HYPERPARAMETERS["steps"]]
    batch_size: Annotated[int, HYPERPARAMETERS["batch_size"]]
    max_length: Annotated[int, TOKENS]
    evaluations: Annotated[int, replace(COUNT, le=100_000)]
    learning_rates: tuple[float, ...]
    warmup: Annotated[float, HYPERPARAMETERS["warmup"]] = 0.05
    dtype: Dtype = "float32"
    schedule: LRScheduleName = "cosine"
    weight_decay: Annotated[float, HYPERPARAMETERS["weight_decay"]] = 0.0
    base_dropout: Literal["on", "off"] = "off"
    accumulation: Annotated[int, HYPERPARAMETERS["batch_size"]] = 1


class Task:
    """A dataset with splits, the encoding and the form of its answers, a metric and its floor.

    A subclass sets `title`, `floor`, `default_model` and `defaults`, and overrides `examples`.
    """

    name: str
    """The name; of a user's task the name of its file."""
    source: str = ""
    """The path of the user's file; empty for a task of this project."""
    code: str = ""
    """The content of that file."""
    content: str = ""
    """See `TaskChoice.content`."""
    warnings: Sequence[str] = ()
    """What is wrong with a user's data, one line each, the worst first. `revision` sets it."""
    title: str
    metric: str = "exact_match"
    floor: Annotated[float, Hyperparameter(value_type=float)]
    """The score of a constant answer or of the untrained base model, whichever is lower. A diverged lane gets
    this score."""
    default_model: str
    numerics: Annotated[int, COUNT] = 1
    """Raised by hand when the encoding or the grading changes."""
    output: Output = "generation"
    inputs: Literal["text", "image"] = "text"
    """The input of the model. A task of images has the output "classification" or "regression"."""
    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of the head's outputs."""
    max_new_tokens: Annotated[int, TOKENS] = 0
    """The longest generated answer in tokens."""
    samples: Annotated[int, COUNT] = 1
    """Answers that are generated per item. The score of an item is the mean over them."""
    temperature: Annotated[float, Hyperparameter(value_type=float, ge=0)] = 0.0
    """0 for greedy decoding, else the temperature of sampling."""
    top_p: Annotated[float, Hyperparameter(value_type=float, gt=0, le=1)] = 1.0
    """Sampling is limited to the most probable tokens that together have this probability."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which a generated answer ends."""
    grader: Grader = "exact"
    """How `grade` compares an answer with the right one: by equality, or by a function of `grading/`."""
    grade_at: GradeAt = "every_evaluation"
    publishes_best_evaluation: bool = False
    """True if the published survey reports, of each run, the best of its evaluations on the test split."""
    defaults: TaskDefaults

    # -- overridden by tasks ---------------------------------------------------------------------------

    def examples(self, split: Split, count: int) -> Sequence[Example]:
        """Return the first `count` examples of a split, or all of them if it has fewer.

        Every call returns the same examples, and no example is in two splits, whatever the counts.

        Args:
            split: The split.
            count: The number of examples.

        Raises:
            UsageError: The data, or a library that the task needs, are missing.
        """
        raise NotImplementedError

    def encode(self, example: Example, tokenizer: Any) -> EncodedExample:
        """Encode an example.

        For a task without a head the ids are the prompt without loss, then the answer and the end token with
        loss. Prompt and answer are encoded separately, so that the prompt has the same ids in training and in
        generation. The prompt starts with the BOS token if the tokenizer adds one to every text. For a task
        with a head the ids are the prompt with the special tokens of the model.

        Args:
            example: The example to encode.
            tokenizer: A tokenizer of transformers.
        """
        return self._encode_default([example], tokenizer)[0]

    def grade(self, example: Example, answer: str) -> float:
        """Return the grade of a generated answer, from 0 to 1.

        Args:
            example: The example. Its `reference`, if it has one, is the right answer for other graders than
                "exact".
            answer: The generated text.
        """
        if self.grader == "exact":
            return float(answer.strip() == example.answer.strip())
        from orchestrator.finetune.grading import math as math_answers
        from orchestrator.finetune.grading import text_answers

        graders = {
            "math": math_answers.grade,
            "choice": text_answers.grade_choice,
            "token_f1": text_answers.grade_token_f1,
        }
        right = example.answer if example.reference is None else example.reference
        return graders[self.grader](answer, right)

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        """Return the grades of many answers; overridden where grading in parallel is faster.

        Args:
            examples: The examples, one per answer.
            answers: The generated texts.
        """
        return [self.grade(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def check_can_grade(self) -> None:
        """Check that this machine can grade answers; called before generation, which takes minutes.

        Raises:
            UsageError: Something that grading needs is missing.
        """

    def pretrain_recipe(self) -> str:
        """Return a key of everything that decides the result of `pretrain`; empty if nothing is pretrained.

        The base model that a task pretrains is called `<task name>-base`.
        """
        return ""

    def pretrain(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Train the task's own base model and save it with its tokenizer in the format of transformers.

        Args:
            folder: An empty folder.
            progress: Called with a line from time to time.
        """
        raise NotImplementedError

    def base_config(self) -> Any:
        """Return the transformers configuration of the model that `pretrain` makes, None if it is not known.

        Options are checked against the layers of that model before training.
        """
        return None

    def general_examples(self) -> Sequence[Example]:
        """Return examples of what the task's own base model was pretrained on, which it may forget.

        They are scored if the model's tokenizer does not know the English text of `general_text.txt`.
        """
        return ()

    # -- the same for all tasks ------------------------------------------------------------------------

    @property
    def has_head(self) -> bool:
        """True if the model has a head, for classes or for a number."""
        return self.output in ("classification", "regression")

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head."""
        return len(self.labels) if self.output == "classification" else 1

    def target(self, example: Example) -> int | float:
        """Return the target of the head: the index of a class, or a number.

        Args:
            example: An example of a task with a head.

        Raises:
            UsageError: The answer is no class of the task, or no finite number.
        """
        if self.output == "classification":
            if example.answer not in self.labels:
                hint = suggest_nearest(example.answer, self.labels)
                raise UsageError(f"Task {self.name!r}: {example.answer!r} is no class. {hint}")
            return self.labels.index(example.answer)
        try:
            value = float(example.answer)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value == IGNORE_INDEX:
            raise UsageError(
                f"Task {self.name!r}: the answer {example.answer!r} must be a finite number other than "
                f"{IGNORE_INDEX}."
            )
        return value

    def encode_all(self, examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
        """Encode many examples, together if `encode` is not overridden: a fast tokenizer then uses all cores.

        Args:
            examples: The examples to encode.
            tokenizer: A tokenizer of transformers.
        """
        if type(self).encode is not Task.encode:
            return [self.encode(example, tokenizer) for example in examples]
        return self._encode_default(examples, tokenizer) if examples else []

    def encode_truncated(self, example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
        """Encode a pair of texts that is longer than a limit.

        The longer text loses its end until both are equally long, then both lose tokens in turn, as in GLUE's
        reference code; the special tokens are kept. If `encode` is overridden, its result is returned
        unchanged, and the caller truncates it like a single text.

        Args:
            example: The example to encode.
            tokenizer: A tokenizer of transformers.
            max_length: The limit in tokens.
        """
        if type(self).encode is not Task.encode:
            return self.encode(example, tokenizer)
        return self._encode_texts([example], tokenizer, truncation="longest_first", max_length=max_length)[0]

    def revision(self) -> str:
        """Return a hash of the data: of the examples at the default sizes and of the names of the classes.

        Other sizes are longer or shorter pieces of the same sequences, so the hash identifies them, too. The
        hash is computed once per process for each combination of sizes, classes and data folder.
        """
        sizes = self._default_sizes()
        key = (*sizes.values(), self.labels, os.environ.get(DATA_FOLDER_VARIABLE))
        cached: dict[Any, str] = self.__dict__.setdefault("_revisions", {})
        if key not in cached:
            examples = {split: self._load_split(split, size) for split, size in sizes.items()}
            if self.has_head and self.content:  # a user's file, whose labels may be wrong
                for example in chain.from_iterable(examples.values()):
                    self.target(example)
            if self.content:  # the splits of this project's tasks are known
                self.warnings = find_overlaps(examples, self.name)
                self._check_grader(examples)
            cached[key] = hash_examples(examples, self.labels)
        return cached[key]

    def _check_grader(self, examples: Mapping[Split, Sequence[Example]]) -> None:
        """Refuse a grader that gives the grade 0 to a right answer of a held-out split."""
        if self.output != "generation" or type(self).grade is not Task.grade:
            return
        for split in HELD_OUT_SPLITS:
            for number, example in enumerate(examples[split]):
                right = example.answer if example.reference is None else example.reference
                if not self.grade(example, right):
                    raise UsageError(
                        f"Task {self.name!r}: the grader {self.grader!r} finds no answer in the right one of "
                        f"{split} example {number}, {right!r}; docs/grading.md says what it reads, 'exact' "
                        "compares whole texts."
                    )

    def choice(self) -> TaskChoice:
        """Return the task at its default sizes as a part of a configuration."""
        sizes = self.defaults.train_size, self.defaults.validation_size, self.defaults.test_size
        revision = self.revision()
        return TaskChoice(self.name, revision, *sizes, self.metric, self.floor, self.numerics, self.content)

    def entry(self) -> dict[str, str]:
        """Return the fields from which any machine can make a user's task again (see `catalogue`)."""
        return {"path": self.source, "source": self.code}

    def load(self, choice: TaskChoice) -> dict[Split, Sequence[Example]]:
        """Return the examples of the three splits.

        Args:
            choice: The sizes of the splits and the revision of the data.

        Raises:
            UsageError: The data on this machine have another revision.
        """
        sizes = dict(zip(SPLITS, (choice.train_size, choice.validation_size, choice.test_size), strict=True))
        default_sizes = self._default_sizes()
        examples = {s: self._load_split(s, max(sizes[s], default_sizes[s])) for s in SPLITS}
        revision = hash_examples({s: examples[s][: default_sizes[s]] for s in SPLITS}, self.labels)
        if choice.revision != revision:
            raise UsageError(
                f"Task {self.name!r}: the configuration was made with data {choice.revision}, "
                f"this machine makes {revision}. `examples` must return the same examples in every call "
                "(use a seed for everything random), and library versions must be the same on every machine."
            )
        return {s: examples[s][: sizes[s]] for s in SPLITS}

    def _load_split(self, split: Split, count: int) -> list[Example]:
        return check_examples(list(self.examples(split, count)), count, self.name, split)

    def _default_sizes(self) -> dict[Split, int]:
        sizes = self.defaults.train_size, self.defaults.validation_size, self.defaults.test_size
        return dict(zip(SPLITS, sizes, strict=True))

    def _encode_default(self, examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
        if self.has_head:
            if len({example.pair is None for example in examples}) > 1:  # a tokenizer takes texts or pairs
                return [self._encode_default([example], tokenizer)[0] for example in examples]
            return self._encode_texts(examples, tokenizer)
        prompts, answers = (
            tokenizer(texts, add_special_tokens=False)["input_ids"]
            for texts in ([example.prompt for example in examples], [example.answer for example in examples])
        )
        encoded = []
        first_ids = bos_ids(tokenizer)
        for prompt_ids, answer_ids in zip(prompts, answers, strict=True):
            prompt = [*first_ids, *prompt_ids]
            answer = [*answer_ids, tokenizer.eos_token_id]
            labels = (*[IGNORE_INDEX] * len(prompt), *answer)
            encoded.append(EncodedExample((*prompt, *answer), labels, len(prompt)))
        return encoded

    def _encode_texts(
        self, examples: Sequence[Example], tokenizer: Any, **tokenizer_options: Any
    ) -> list[EncodedExample]:
        """Encode texts, or pairs of texts, with the special tokens of the model."""
        pairs = None if examples[0].pair is None else [example.pair for example in examples]
        encoding = tokenizer([example.prompt for example in examples], pairs, **tokenizer_options)
        types = encoding.get("token_type_ids") if pairs is not None else None
        encoded = []
        for number, ids in enumerate(map(tuple, encoding["input_ids"])):
            start = None
            if types is not None and any(types[number]):
                start = types[number].index(1)
                if list(types[number]) != [0] * start + [1] * (len(ids) - start):
                    kind = type(tokenizer).__name__
                    raise UsageError(
                        f"Task {self.name!r}: the token types of {kind} for two texts are not 0 for the "
                        "first and 1 for the second; take another model."
                    )
            encoded.append(EncodedExample(ids, (IGNORE_INDEX,) * len(ids), len(ids), start))
        return encoded


def bos_ids(tokenizer: Any) -> list[int]:
    """Return the BOS token in a list if the tokenizer starts every text with it, else an empty list."""

    def first_id(add_special_tokens: bool) -> list[int]:
        # Not of an empty text: its first token may be an appended end token with the same id as BOS.
        return list(tokenizer("a", add_special_tokens=add_special_tokens)["input_ids"])[:1]

    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and first_id(True) == [bos] != first_id(False) else []
