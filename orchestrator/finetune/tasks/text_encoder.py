"""Encoding of examples as token ids: texts, pairs of texts, and chats with the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.finetune.tasks.examples import Example
from orchestrator.util.errors import UsageError, format_error

IGNORE_INDEX = -100
"""The label of a position that carries no loss (`ignore_index` in PyTorch)."""
_PLACEHOLDER = "orchestrator:answer"
"""Stands for the answer where the end of its turn is looked up. Short answers, such as "d", also occur in
end markers, such as "<|im_end|>"."""


@dataclass(frozen=True)
class EncodedExample:
    """The token ids of an example.

    Args:
        ids: The token ids.
        labels: A label per token: its id, or IGNORE_INDEX. They are not shifted yet (see `data/batches.py`).
        prompt_length: The number of ids of the prompt, after which generation starts.
        second_segment_start: The index of the first token of a pair's second text, if the tokenizer gives its
            tokens the type 1; None if it does not.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_length: int
    second_segment_start: int | None = None


class TextEncoder:
    """The encoding that tasks use unless they override it."""

    name: str

    @property
    def has_head(self) -> bool:
        """True if the model has a head; a model with a head reads the prompt only."""
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

    def encode_all(self, examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
        """Encode many examples, together if `encode` is not overridden: a fast tokenizer then uses all cores.

        Args:
            examples: The examples to encode.
            tokenizer: A tokenizer of transformers.
        """
        if type(self).encode is not TextEncoder.encode:
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
        if type(self).encode is not TextEncoder.encode:
            return self.encode(example, tokenizer)
        return self._encode_texts([example], tokenizer, truncation="longest_first", max_length=max_length)[0]

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
        bos_ids = _bos_ids(tokenizer)
        for prompt_ids, answer_ids in zip(prompts, answers, strict=True):
            prompt = [*bos_ids, *prompt_ids]
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


def _bos_ids(tokenizer: Any) -> list[int]:
    """Return the BOS token in a list if the tokenizer starts every text with it, else an empty list."""

    def first_id(add_special_tokens: bool) -> list[int]:
        # Not of an empty text: its first token may be an appended end token with the same id as BOS.
        return list(tokenizer("a", add_special_tokens=add_special_tokens)["input_ids"])[:1]

    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and first_id(True) == [bos] != first_id(False) else []


def encode_chat(example: Example, tokenizer: Any, task: str) -> EncodedExample | None:
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


def plain_chat(example: Example) -> Example:
    """Return a chat as a prompt and an answer in plain text, for a model without a chat template."""
    lines = [f"{each['role']}: {each['content']}" for each in json.loads(example.prompt)]
    return Example("\n".join([*lines, "assistant:"]), f" {example.answer}")
