"""Encoding of chats with the model's own chat template."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.finetune.tasks.examples import Example
from orchestrator.finetune.tasks.text_encoder import IGNORE_INDEX, EncodedExample
from orchestrator.util.errors import UsageError, format_error

_PLACEHOLDER = "orchestrator:answer"
"""Stands for the answer where the end of its turn is looked up. Short answers, such as "d", also occur in
end markers, such as "<|im_end|>"."""


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
