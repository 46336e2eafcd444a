"""A task made of a user's data, identified by the content of its rows, wherever they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.finetune.tasks.base import SPLITS, Example, Output, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.data_columns import Form
from orchestrator.finetune.tasks.data_splits import Examples, count_answers
from orchestrator.finetune.tasks.examples import IGNORE_INDEX, EncodedExample, check_count
from orchestrator.study.configuration import TaskChoice
from orchestrator.util.atomic_files import canonical_json
from orchestrator.util.errors import UsageError, format_error

Splits = Mapping[Split, Examples]

CONTENT_VERSION = 1
"""Raised by hand when other examples are made of the same rows."""
_PLACEHOLDER = "orchestrator:answer"
"""Stands for the answer where the end of its turn is looked up. Short answers, such as "d", also occur in
end markers, such as "<|im_end|>"."""


@dataclass(frozen=True)
class DataSpec:
    """Everything about a task of a user's data but its rows. It is stored as JSON.

    Args:
        name: The name of the file, for readers.
        form: What a row consists of.
        output: The form of the model's output.
        metric: The score.
        labels: The classes, empty for other outputs.
        floor: For accuracy the share of the most frequent class in all test rows; 0 for other metrics.
        max_new_tokens: The longest generated answer in tokens, 0 if none is generated.
        default_model: The base model if the command line names none.
        defaults: The settings of a fine-tuning run.
        revision: A hash of all examples of all splits, and of the labels.
        columns: Role -> column in the data, for readers.
        template: The template of the prompt, for readers; None if there is none.
    """

    name: str
    form: Form
    output: Output
    metric: str
    labels: tuple[str, ...]
    floor: float
    max_new_tokens: int
    default_model: str
    defaults: TaskDefaults
    revision: str
    columns: Mapping[str, str]
    template: str | None = None

    @property
    def content(self) -> str:
        """The identity of the task: 16 hexadecimal digits.

        It depends on the examples and on what is done with them. It does not depend on the name, the path or
        the format of a file, on the order of its rows, on the names of its columns, or on default settings.
        """
        parts: dict[str, Any] = {"version": CONTENT_VERSION, "revision": self.revision}
        parts |= {"chat": self.form == "chat", "output": self.output, "metric": self.metric}
        parts |= {"labels": self.labels, "max_new_tokens": self.max_new_tokens}
        return hashlib.sha256(canonical_json(parts)).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the spec as a JSON object."""
        return _type_adapter().dump_python(self, mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataSpec:
        """Return the spec in a JSON object.

        Raises:
            UsageError: The object is no spec.
        """
        try:
            return _type_adapter().validate_python(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UsageError(f"not the description of a data task: {field}: {first['msg']}.") from None


@lru_cache(maxsize=1)
def _type_adapter() -> TypeAdapter[DataSpec]:
    return TypeAdapter(DataSpec)


class DataTask(Task):
    """A task of a user's data.

    On the machine of the command it has the rows. A worker makes it from the spec alone and reads the
    examples from the store's prepared data.

    Args:
        spec: The description of the task.
        splits: The examples of each split; None if they are not on this machine.
        source: The path of the data, or their name on the hub.
    """

    grade_at = "last_evaluation"
    ignored_sources: tuple[str, ...] = ()
    """The files in the user's folders and the splits on the hub that were not read, for messages."""
    split_origins: Mapping[Split, str] = {}
    """Split -> name of its file, for messages; empty if no file is named after a split."""

    def __init__(self, spec: DataSpec, splits: Splits | None = None, source: str = "") -> None:
        self.spec, self.splits = spec, splits
        self.name, self.source, self.content = spec.name, source or spec.name, spec.content
        # These are class variables of tasks that are Python classes.
        vars(self).update(
            title=spec.name,
            metric=spec.metric,
            floor=spec.floor,
            default_model=spec.default_model,
            output=spec.output,
            inputs="image" if spec.form == "image" else "text",
            labels=spec.labels,
            max_new_tokens=spec.max_new_tokens,
            grader="token_f1" if spec.metric == "token_f1" else "math",
            defaults=spec.defaults,
        )

    @staticmethod
    def from_spec(spec: DataSpec, splits: Splits | None = None, source: str = "") -> DataTask:
        """Return the task of a spec, which is a `ChatDataTask` for chats.

        Args:
            spec: The description of the task.
            splits: The examples of each split; None if they are not on this machine.
            source: The path of the data, or their name on the hub.
        """
        return (ChatDataTask if spec.form == "chat" else DataTask)(spec, splits, source)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DataTask:
        """Return the task in a JSON object, without its rows.

        Args:
            data: What `DataSpec.to_json` returned, on any machine.

        Raises:
            UsageError: The object is no description of a task.
        """
        return DataTask.from_spec(DataSpec.from_json(data))

    def entry(self) -> dict[str, str]:
        """Return the fields from which any machine can make the task again; see `Task.entry`."""
        return {"path": self.source, "spec": json.dumps(self.spec.to_json())}

    def describe(self) -> str:
        """Return a line that describes the data as they were read.

        It has the columns, the number of rows of each split that are used by default, the files of the
        splits, the number of classes and of their rows, the metric, and what was not read.
        """
        columns = " ".join(f"{role}={column}" for role, column in self.spec.columns.items())
        words: Mapping[Split, str] = {"train": "training", "validation": "validation", "test": "test rows"}
        counts = [f"{size:,} {words[split]}" for split, size in self._default_sizes().items()]
        if origins := self.split_origins:
            pairs = zip(SPLITS, counts, strict=True)
            counts = [f"{text} ({origins.get(split, 'by hash')})" for split, text in pairs]
        classes = self._describe_classes() if self.labels else ""
        ignored = f"; not read: {', '.join(self.ignored_sources)}" if self.ignored_sources else ""
        rows = f"{', '.join(counts[:-1])} and {counts[-1]}"
        return f"{columns}; {rows}{classes}; {self.metric}{ignored}"

    def _describe_classes(self) -> str:
        rows = count_answers(*(self.splits or {}).values())
        sizes = sorted({min(rows.values()), max(rows.values())}) if rows else []
        each = f", {' to '.join(f'{size:,}' for size in sizes)} rows each" if sizes else ""
        return f", {len(self.labels)} classes{each}"

    def revision(self) -> str:
        """Return the hash of all examples."""
        return self.spec.revision

    def examples(self, split: Split, count: int) -> Sequence[Example]:
        """Return the first `count` examples of a split; see `Task.examples`.

        Raises:
            UsageError: The rows are not on this machine.
        """
        if self.splits is None:
            raise UsageError(
                f"Task {self.name!r}: its rows are neither in the store's prepared data nor on this machine; "
                "run the command with --data again."
            )
        return self.splits[split][:count]

    def default_examples(self) -> dict[Split, Sequence[Example]]:
        """Return the examples of each split that are used by default."""
        return {split: self.examples(split, size) for split, size in self._default_sizes().items()}

    def load(self, choice: TaskChoice) -> dict[Split, Sequence[Example]]:
        """Return the examples of the three splits; see `Task.load`.

        Raises:
            UsageError: The configuration was made with other data, the rows are not on this machine, or a
                split has fewer than are needed.
        """
        if choice.revision != self.revision():
            raise UsageError(
                f"Task {self.name!r}: the configuration was made with data {choice.revision}, here are "
                f"{self.revision()}."
            )
        sizes = dict(zip(SPLITS, (choice.train_size, choice.validation_size, choice.test_size), strict=True))
        examples = {split: self.examples(split, size) for split, size in sizes.items()}
        for split, size in sizes.items():
            check_count(examples[split], size, self.name, split)
        return examples


class ChatDataTask(DataTask):
    """A task of chats, encoded with the chat template of the model."""

    def encode(self, example: Example, tokenizer: Any) -> EncodedExample:
        """Encode a chat with the model's chat template, or without one as lines of text, `role: content`.

        Args:
            example: The chat, as `_encode_chat` takes it.
            tokenizer: A tokenizer of transformers.

        Raises:
            UsageError: The chat template refuses the messages.
        """
        encoded = _encode_chat(example, tokenizer, self.name)
        return encoded or super().encode(_plain_chat(example), tokenizer)


def _encode_chat(example: Example, tokenizer: Any, task: str) -> EncodedExample | None:
    """Encode a chat, whose last message is the answer.

    The prompt is what the template makes of the earlier messages, with the beginning of the assistant's turn;
    the template writes BOS where the model has one. The answer is the text of the last message, the end of
    the turn as the template writes it ("<|im_end|>"), and the end token if that is another one.

    Args:
        example: Its prompt has the earlier messages as JSON, its answer is the text of the last one.
        tokenizer: A tokenizer of transformers.
        task: The name of the task, for error messages.

    Returns:
        The encoded example, None if the tokenizer has no chat template.

    Raises:
        UsageError: The template refuses the messages, for instance because it knows no system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = json.loads(example.prompt)
    chat = [*messages, {"role": "assistant", "content": _PLACEHOLDER}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # jinja2's, which templates also raise on purpose
        raise UsageError(
            f"Task {task!r}: the model's chat template refuses a row: {format_error(error)}."
        ) from error
    answer = example.answer.strip()  # as some templates do
    _, found, rest = text.rpartition(_PLACEHOLDER)
    end_of_turn = rest.rstrip() if found else ""
    prompt_ids, answer_ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, answer + end_of_turn)
    )
    if answer_ids[-1:] != [tokenizer.eos_token_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    labels = (*[IGNORE_INDEX] * len(prompt_ids), *answer_ids)
    return EncodedExample((*prompt_ids, *answer_ids), labels, len(prompt_ids))


def _plain_chat(example: Example) -> Example:
    """Return a chat as a prompt and an answer in plain text, for a model without a chat template."""
    lines = [f"{each['role']}: {each['content']}" for each in json.loads(example.prompt)]
    return Example("\n".join([*lines, "assistant:"]), f" {example.answer}")
