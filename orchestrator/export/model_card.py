"""The model card of an export: README.md with the metadata of the Hugging Face hub.

The Python code of a card runs after its reader has replaced FOLDER, INPUT, SECOND INPUT and FILE.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.analyze.formatting import redact_secrets
from orchestrator.export.lane_choice import ChosenLane
from orchestrator.record.schema import Record
from orchestrator.study.configuration import VariantChoice
from variants.variant_settings import FILE_SUFFIX

if TYPE_CHECKING:
    from orchestrator.finetune.tasks.base import Task

Form = Literal["peft", "merged", "raw"]
"""The forms of an export: an adapter of PEFT, a plain model of transformers, or the exact tensors."""
InputForm = Literal["text", "pair", "chat", "lines"]
"""The form of a lane's inputs. "text": single texts, or those of a user's task, which may be pairs. "pair":
pairs of texts. "chat": chats in the tokenizer's chat template. "lines": chats as lines of text, because the
tokenizer has no chat template."""
_PIPELINES = {"text": "text-classification", "image": "image-classification"}
_LEFT_OUT = ("variant", "task", "model", "model_content", "dtype", "seed", "task_revision", "task_content")


@dataclass(frozen=True)
class CardFacts:
    """Facts about an export that its model card states besides the study's results."""

    form: Form
    base: str
    """The base model for `from_pretrained`: a name on the hub, or a folder."""
    base_revision: str | None
    """The commit of the base model on the hub; None for a folder."""
    heads: tuple[str, ...]
    """Names of the modules of the task's head."""
    command: str
    """The command that wrote this export."""
    inputs: InputForm = "text"
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """The content of adapter_config.json; empty without such a file."""
    lora_error: str = ""
    """What a LoRA in place of the lane's own adapter leaves out, as a sentence."""


def format_scores(record: Record) -> str:
    """Return the scores at the end of training as text: "validation 0.9550, test 0.9400"."""
    scores = {split: record.score(split) for split in ("validation", "test")}
    return ", ".join(f"{split} {score:.4f}" for split, score in scores.items() if score is not None)


def render_card(chosen: ChosenLane, task: Task, facts: CardFacts) -> str:
    """Return the text of README.md: Markdown after a YAML block with the metadata of the hub."""
    own = chosen.record.configuration
    title = getattr(task, "title", own.task.name)  # a user's task may have none
    labels = f"Classes, in the order of the outputs: {', '.join(task.labels)}." if task.labels else ""
    return f"""{_metadata(chosen, task, facts)}

# {own.variant.name} on {title}

One fine-tune of `{own.model.name}` on the task `{own.task.name}` ({title}), trained with the variant
`{own.variant.name}` in the study `{chosen.study.name}`. This lane was exported because {chosen.reason}.

License: fill in. The licenses of the base model and of the data apply.

## Use

{facts.lora_error}

```python
{_loading(task, facts, own.variant)}
```

{_prediction(task, facts)}

{_other_programs(task, facts, own.model.compute_dtype)}

{labels}

## Scores

{_scores(chosen.record)}

## How it was made

{_provenance(chosen, facts)}
"""


def _metadata(chosen: ChosenLane, task: Task, facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    record = chosen.record
    own, pipeline = record.configuration, _PIPELINES[task.inputs] if task.has_head else "text-generation"
    results = [
        EvalResult(
            pipeline, own.task.name, own.task.name, own.task.metric, score, dataset_split=split,
            dataset_revision=own.task.revision,
        )
        for split in ("validation", "test")
        if (score := record.score(split)) is not None
        and not facts.lora_error
    ]  # fmt: skip
    data = ModelCardData(
        base_model=facts.base if facts.base_revision is not None else None,
        library_name="peft" if facts.form == "peft" else "transformers",
        pipeline_tag=pipeline,
        tags=["lora-orchestrator", own.variant.name],
        model_name=f"{chosen.study.name}-{record.fingerprint[:12]}",
        eval_results=results or None,
    )
    return f"---\n# license: fill in\n{data.to_yaml().strip()}\n---"


def _loading(task: Task, facts: CardFacts, variant: VariantChoice) -> str:
    """Return the Python code that loads the export."""
    head = "ImageClassification" if task.inputs == "image" else "SequenceClassification"
    model_class = f"AutoModelFor{head if task.has_head else 'CausalLM'}"
    if facts.form == "merged":
        return f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("FOLDER")'
    # The base model may have a head of another size. The adapter replaces this head.
    labels = f", num_labels={task.num_labels}, ignore_mismatched_sizes=True" if task.has_head else ""
    revision = f", revision={facts.base_revision!r}" if facts.base_revision else ""
    base = f"base = {model_class}.from_pretrained({facts.base!r}{revision}{labels})"
    if facts.form == "peft":
        return f"""from peft import PeftModel
from transformers import {model_class}

{base}
model = PeftModel.from_pretrained(base, "FOLDER")"""
    name = f"FOLDER/{variant.name}" if variant.name.endswith(FILE_SUFFIX) else variant.name
    values = variant.rank, variant.alpha, variant.dropout, dict(variant.extra)
    return f"""from transformers import {model_class}
from variants import catalogue
from variants.api import VariantSettings
from variants.adapters import attach
from variants.storage import load_lane

{base}
variant = catalogue.get({name!r})
settings = VariantSettings({", ".join(map(repr, values))})
adapters = attach(base, variant, settings, {variant.targets!r}, {facts.heads!r})
load_lane(adapters, "lane", "FOLDER/lane.safetensors")
# with adapters.activate_lanes(["lane"], None): base(...)"""


def _prediction(task: Task, facts: CardFacts) -> str:
    """Return the Python code that prints the loaded model's answer to an input; empty for raw tensors."""
    if facts.form == "raw":
        return ""
    if task.inputs == "image":
        text, loader = "With an image:", "AutoImageProcessor"
        encode = """image = Image.open("FILE").convert("RGB")
inputs = AutoImageProcessor.from_pretrained("FOLDER")(image, return_tensors="pt")"""
        encode = f"from PIL import Image\nfrom transformers import {loader}\n\n{encode}"
    else:
        text = "With a text such as the training data have (INPUT):"
        encode = f"""from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{_encoding(task, facts)}"""
    if task.output == "regression":
        answer = "print(model(**inputs).logits.item())"
    elif task.has_head:
        labels = list(task.labels or map(str, range(task.num_labels)))
        answer = f"labels = {labels!r}\nprint(labels[int(model(**inputs).logits.argmax())])"
    else:
        answer = f"""output = model.generate(**inputs, max_new_tokens={task.max_new_tokens or 32})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    return f"{text}\n\n```python\n{encode}\n{answer}\n```"


def _encoding(task: Task, facts: CardFacts) -> str:
    """Return the Python code that encodes a text as in the lane's training."""
    if facts.inputs == "chat":
        return """messages = [{"role": "user", "content": "INPUT"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
    if facts.inputs == "lines":
        return 'inputs = tokenizer("user: INPUT\\nassistant:", return_tensors="pt")'
    if facts.inputs == "pair":
        return 'inputs = tokenizer("INPUT", "SECOND INPUT", return_tensors="pt")'
    note = "  # or two texts, for a task of pairs" if task.has_head else ""
    return f'inputs = tokenizer("INPUT", return_tensors="pt"){note}'


def _other_programs(task: Task, facts: CardFacts, dtype: str) -> str:
    """Return the commands that score and serve the export; empty if these programs cannot load it."""
    from variants.describe import VLLM_RANKS, vllm_obstacle  # torch

    if task.has_head or facts.form == "raw":
        return ""
    arguments, serve, obstacle = "pretrained=FOLDER", ["vllm", "serve", "FOLDER"], ""
    if facts.adapter:
        revision = facts.base_revision
        arguments = (
            f"pretrained={facts.base}{f',revision={revision}' if revision else ''},dtype={dtype},peft=FOLDER"
        )
        if not (obstacle := vllm_obstacle(facts.adapter)):
            rank = next(each for each in VLLM_RANKS if each >= facts.adapter["r"])
            serve = ["vllm", "serve", facts.base, *(["--revision", revision] if revision else [])]
            serve += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", "tuned=FOLDER"]
    score = shlex.join(["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "TASKS"])
    lines = score if obstacle else f"{score}\n{shlex.join(serve)}"
    note = f"\n\nvLLM does not serve this adapter: {obstacle}." if obstacle else ""
    return f"In other programs:\n\n```sh\n{lines}\n```{note}"


def _scores(record: Record) -> str:
    metric = record.configuration.task.metric
    lines = [f"| split | {metric} | untrained base model |", "| --- | --- | --- |"]
    for split in ("validation", "test"):
        score, before = record.score(split), record.baseline_scores.get(split, {}).get(metric)
        if score is not None:
            lines.append(f"| {split} | {score:.4f} | {'-' if before is None else f'{before:.4f}'} |")
    note = "The best lane's validation score is optimistic, because it chose the lane. No test score did."
    return "\n".join([*lines, "", note])


def _provenance(chosen: ChosenLane, facts: CardFacts) -> str:
    own, run = chosen.record.configuration, chosen.record.provenance
    columns = {k: v for k, v in own.to_columns().items() if k not in _LEFT_OUT and v is not None}
    revision = f", commit {facts.base_revision}" if facts.base_revision else ""
    return f"""- base model: `{own.model.name}`, content `{own.model.content}`{revision}, {own.model.dtype}
- task: `{own.task.name}`, {own.task.metric}, data revision `{own.task.revision}`
- hyperparameters: {_join(columns)}; seed {own.seed}
- record: `{chosen.record.fingerprint}`, {chosen.record.steps} steps on {run.device}
- code: commit {run.commit}; {_join(run.versions)}
- command of the study: `{redact_secrets(chosen.study.command)}`
- exported by: `{facts.command}`"""


def _join(values: Mapping[str, object]) -> str:
    shown = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
