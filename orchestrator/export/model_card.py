"""The model card of an export: README.md with the metadata of the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from orchestrator.analyze.formatting import redact_secrets
from orchestrator.analyze.run_labels import LABELS, label_runs
from orchestrator.export.export_folder import Form
from orchestrator.export.lane_choice import ChosenLane
from orchestrator.record.schema import Record
from orchestrator.study.configuration import VariantChoice
from variants.variant_names import FILE_SUFFIX

if TYPE_CHECKING:
    from orchestrator.finetune.tasks.base import Task

PIPELINES = {"text": "text-classification", "image": "image-classification"}
"""Inputs of a task with a head -> the hub's name of the pipeline."""
InputForm = Literal["text", "pair", "chat", "lines"]
"""The form of a lane's inputs. "text": single texts, or unknown, because a user's own task may have pairs.
"pair": pairs of texts. "chat": chats in the tokenizer's chat template. "lines": chats written as lines,
because the tokenizer has no template."""
_LEFT_OUT = ("variant", "task", "model", "model_content", "dtype", "seed", "task_revision", "task_content")


@dataclass(frozen=True)
class CardFacts:
    """Facts on an export that its model card states besides the study's results."""

    form: Form
    base: str
    """The base model as `from_pretrained` takes it: a name of the hub, or a folder."""
    base_revision: str | None
    """The hub's commit of the base model; None for a folder."""
    heads: tuple[str, ...]
    """Names of the modules of the task's head."""
    command: str
    """The command that makes this export."""
    retrained: Record | None
    """The record of the run in which the lane was trained again, if its results differ; else None."""
    inputs: InputForm = "text"
    serving: str = ""
    """A sentence on whether vLLM serves the export; empty to say nothing."""


def format_scores(record: Record) -> str:
    """Return the scores at the end of training as text: "validation 0.9550, test 0.9400"."""
    scores = {split: record.score(split) for split in ("validation", "test")}
    return ", ".join(f"{split} {score:.4f}" for split, score in scores.items() if score is not None)


def render_card(chosen: ChosenLane, task: Task, facts: CardFacts) -> str:
    """Return the text of README.md.

    Args:
        chosen: The lane, its study, and the records of the study.
        task: The lane's task.
        facts: Facts on the export.

    Returns:
        Markdown, after a YAML block with the metadata of the Hugging Face hub.
    """
    from orchestrator.analyze.summary import summarize

    verdicts = summarize(chosen.study, chosen.records).verdicts
    record = facts.retrained or chosen.record
    own = record.configuration
    title = getattr(task, "title", own.task.name)  # a user's task may have none
    parts = [
        _metadata(chosen, task, facts, record),
        f"# {own.variant.name} on {title}",
        f"One fine-tune of `{own.model.name}` on the task `{own.task.name}` ({title}), trained with the "
        f"variant `{own.variant.name}` in the study `{chosen.study.name}`. This lane was exported because "
        f"{chosen.reason}.",
        "License: fill in. The licenses of the base model and of the data apply.",
        "## Use",
        "\n".join(_usage(task, facts, own.variant)),
        "\n".join(_prediction(task, facts)),
        f"Classes, in the order of the model's outputs: {', '.join(task.labels)}." if task.labels else "",
        facts.serving,
        "## Scores",
        "\n".join(_scores(record)),
        "The best lane of a study is the one with the best validation score, so this score is optimistic; no "
        "test score takes part in the choice.",
        _retraining_note(chosen.record) if facts.retrained else "",
        "## What the study says",
        "\n".join(f"- **{each.outcome}**: {each.heading} {each.answer}" for each in verdicts)
        or "No verdict.",
        "## How it was made",
        "\n".join(_provenance(chosen, record, facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(chosen: ChosenLane, task: Task, facts: CardFacts, record: Record) -> str:
    """Return the YAML block in front of the text."""
    from huggingface_hub import EvalResult, ModelCardData

    own, pipeline = record.configuration, PIPELINES[task.inputs] if task.has_head else "text-generation"
    results = [
        EvalResult(
            pipeline, own.task.name, own.task.name, own.task.metric, score, dataset_split=split,
            dataset_revision=own.task.revision,
        )
        for split in ("validation", "test")
        if (score := record.score(split)) is not None
    ]  # fmt: skip
    data = ModelCardData(
        base_model=facts.base if facts.base_revision is not None else None,
        library_name="peft" if facts.form == "peft" else "transformers",
        pipeline_tag=pipeline,
        tags=["lora-orchestrator", own.variant.name],
        model_name=f"{chosen.study.name}-{record.fingerprint[:12]}",
        eval_results=results,
    )
    return f"---\n# license: fill in\n{data.to_yaml().strip()}\n---"


def _usage(task: Task, facts: CardFacts, variant: VariantChoice) -> Iterator[str]:
    """Yield the lines that load the export in Python."""
    values = variant.rank, variant.alpha, variant.dropout, dict(variant.extra)
    kind = "CausalLM" if not task.has_head else "SequenceClassification"
    kind = "ImageClassification" if task.inputs == "image" else kind
    # The base model may have a head of another size. The adapter replaces this head.
    labels = f", num_labels={task.num_labels}, ignore_mismatched_sizes=True" if task.has_head else ""
    revision = f", revision={facts.base_revision!r}" if facts.base_revision else ""
    yield "```python"
    if facts.form == "merged":
        yield f"from transformers import AutoModelFor{kind}"
        yield ""
        yield f'model = AutoModelFor{kind}.from_pretrained("FOLDER")'
    elif facts.form == "peft" and kind == "ImageClassification":
        yield "from peft import PeftModel"
        yield f"from transformers import AutoModelFor{kind}"
        yield ""
        yield f"base = AutoModelFor{kind}.from_pretrained({facts.base!r}{revision}{labels})"
        yield 'model = PeftModel.from_pretrained(base, "FOLDER")'
    elif facts.form == "peft":
        yield f"from peft import AutoPeftModelFor{kind}"
        yield ""
        yield f'model = AutoPeftModelFor{kind}.from_pretrained("FOLDER"{labels})'
    else:
        yield f"from transformers import AutoModelFor{kind}"
        yield "from variants import catalogue"
        yield "from variants.api import VariantSettings"
        yield "from variants.attach import attach"
        yield "from variants.storage import load_lane"
        yield ""
        yield f"base = AutoModelFor{kind}.from_pretrained({facts.base!r}{revision}{labels})"
        folder = "FOLDER/" if variant.name.endswith(FILE_SUFFIX) else ""  # the file is in the export
        yield f"variant = catalogue.get({folder + variant.name!r})"
        yield f"settings = VariantSettings({', '.join(map(repr, values))})"
        yield f"adapters = attach(base, variant, settings, {variant.targets!r}, {facts.heads!r})"
        yield 'load_lane(adapters, "lane", "FOLDER/lane.safetensors")'
        yield '# with adapters.activate_lanes(["lane"], None): base(...)'
    yield "```"


def _prediction(task: Task, facts: CardFacts) -> Iterator[str]:
    """Yield the lines that give the loaded model an input and print its answer; none for raw tensors."""
    if facts.form == "raw":
        return
    is_image = task.inputs == "image"
    yield "With an image:" if is_image else "With a text such as the training data have (INPUT):"
    yield ""
    yield "```python"
    if is_image:
        yield "from PIL import Image"
        yield "from transformers import AutoImageProcessor"
        yield ""
        yield 'image = Image.open("FILE").convert("RGB")'
        yield 'inputs = AutoImageProcessor.from_pretrained("FOLDER")(image, return_tensors="pt")'
    else:
        yield "from transformers import AutoTokenizer"
        yield ""
        yield 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        yield from _encode_input(task, facts)
    if task.output == "regression":
        yield "print(model(**inputs).logits.item())"
    elif task.has_head:
        yield f"labels = {list(task.labels or map(str, range(task.num_labels)))!r}"
        yield "print(labels[int(model(**inputs).logits.argmax())])"
    else:
        yield f"output = model.generate(**inputs, max_new_tokens={task.max_new_tokens or 32})"
        yield 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    yield "```"


def _encode_input(task: Task, facts: CardFacts) -> Iterator[str]:
    """Yield the lines of code that encode a text as the inputs were encoded in the lane's training."""
    if facts.inputs == "chat":
        yield 'messages = [{"role": "user", "content": "INPUT"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ")"
    elif facts.inputs == "lines":
        yield 'inputs = tokenizer("user: INPUT\\nassistant:", return_tensors="pt")'
    elif facts.inputs == "pair":
        yield 'inputs = tokenizer("INPUT", "SECOND INPUT", return_tensors="pt")'
    else:
        note = "  # or two texts, for a task of pairs" if task.has_head else ""
        yield f'inputs = tokenizer("INPUT", return_tensors="pt"){note}'


def _scores(record: Record) -> Iterator[str]:
    """Yield the rows of the table of scores: one for each split that was evaluated."""
    metric = record.configuration.task.metric
    yield f"| split | {metric} | untrained base model |"
    yield "| --- | --- | --- |"
    for split in ("validation", "test"):
        score, before = record.score(split), record.baseline_scores.get(split, {}).get(metric)
        if score is None:  # not evaluated on this split
            continue
        yield f"| {split} | {score:.4f} | {'-' if before is None else f'{before:.4f}'} |"


def _retraining_note(record: Record) -> str:
    return (
        "The adapter of the study's lane was not kept. This one was trained again, with other numbers: the "
        f"study's record has {format_scores(record)}."
    )


def _provenance(chosen: ChosenLane, record: Record, facts: CardFacts) -> Iterator[str]:
    """Yield the list of provenance: model, data, hyperparameters, code and commands."""
    own, run = record.configuration, record.provenance
    columns = {k: v for k, v in own.to_columns().items() if k not in _LEFT_OUT and v is not None}
    runs = [each for each in chosen.records if each.configuration.variant.name == own.variant.name]
    labels = label_runs(chosen.records)
    states = Counter(labels[each.fingerprint] for each in runs)
    counts = ", ".join(f"{states[label]} {label}" for label in LABELS if states[label])
    revision = f", commit {facts.base_revision}" if facts.base_revision else ""
    yield f"- base model: `{own.model.name}`, content `{own.model.content}`{revision}, {own.model.dtype}"
    yield f"- task: `{own.task.name}`, {own.task.metric}, data revision `{own.task.revision}`"
    yield f"- hyperparameters: {_join(columns)}; seed {own.seed}"
    yield f"- runs of this variant in the study: {len(runs)} ({counts})"
    yield f"- record: `{record.fingerprint}`, {record.steps} steps on {run.device}"
    yield f"- code: commit {run.commit}; {_join(run.versions)}"
    yield f"- command of the study: `{redact_secrets(chosen.study.command)}`"
    yield f"- exported by: `{facts.command}`"


def _join(values: Mapping[str, object]) -> str:
    shown = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
