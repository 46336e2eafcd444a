"""Base models: by name, found or made once, known by content.

A name is one of
- `<task>-base`: the small base that a task pretrains itself (`letters-base`);
- `smollm2-135m`: a real model from a Python package (`smollm2.py`);
- a folder with a transformers model and its tokenizer;
- `organisation/model` or `organisation/model@revision` of the Hugging Face hub (`hub.py`).

`root` is the store's folder `bases` (`bases.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune import bases, hub, smollm2
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.study.errors import BadInput, nearest

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """A frozen base ready to carry adapters: eval mode, no gradients, the dtype of the choice. The tokenizer
    always has an end and a padding token; the padding side is the loop's business."""

    model: Any
    tokenizer: Any
    device: torch.device


def names() -> tuple[str, ...]:
    """The bases that come with the project; folders and hub names work besides."""
    return (*_task_bases(), smollm2.NAME)


def resolve(name: str, root: Path) -> str | None:
    """The content (SHA-256, or a hub commit) of a base, None when it has yet to be prepared. Reads only.
    Raises BadInput for a name that is none."""
    if (task := _task_bases().get(name)) is not None:
        return bases.made(root, name, task.pretrain_recipe())
    if name == smollm2.NAME:
        return bases.made(root, name, smollm2.RECIPE)
    if Path(name).is_dir():
        return bases.content_of(Path(name))
    if hub.is_hub_name(name):
        return hub.pinned(name, root)
    raise BadInput(
        f"Unknown model {name!r}: no such folder, nor a name known here. {nearest(name, names())} "
        "A hub model is written organisation/model."
    )


def prepare(name: str, root: Path, progress: Progress = print) -> str:
    """Makes or finds the base once and returns its content; at once when that was done before. Two processes
    may do it together. Raises BadInput when the model cannot be had."""
    content = resolve(name, root)
    if (task := _task_bases().get(name)) is not None:
        return content or prepare_task_base(task, root, progress)
    if name == smollm2.NAME:
        build = lambda folder: smollm2.build(folder, progress)  # noqa: E731
        return content or bases.make_once(root, name, smollm2.RECIPE, build)
    if content is not None and Path(name).is_dir():
        # A worker has another working folder: it finds the model by content, whatever the path was called.
        where = {"folder": str(Path(name).resolve())}
        bases.write_pointer(root, f"folder-{content[:12]}", where, replace=True)
        return content
    return content or hub.pin(name, root, progress)


def prepare_task_base(task: Task, root: Path, progress: Progress) -> str:
    """The base that a task pretrains itself, as `<task name>-base`."""

    def make(folder: Path) -> None:
        with bases.quiet():
            task.pretrain(folder, progress)

    return bases.make_once(root, f"{task.name}-base", task.pretrain_recipe(), make)


def load(choice: ModelChoice, root: Path, device: str | torch.device | None = None) -> Bench:
    """The base on `device` (by default a CUDA device where there is one, else the CPU).

    Attention is transformers' own choice: PyTorch's scaled dot product where the architecture has it. On a
    CPU a row's result then does not depend on the other rows (to the bit, from 8 rows on). Raises BadInput
    when the base is not there or is not the one that `choice` names."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, revision = _where(choice, root)
    try:
        with bases.quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=getattr(torch, choice.dtype)
            )
    except (OSError, ValueError) as error:
        if revision is not None:
            raise hub.unreachable(choice.name, error) from error
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"Model {choice.name!r} in {source} does not load: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"Model {choice.name!r}: its tokenizer has no end token (eos_token), which answers need."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Bench(model.eval().requires_grad_(False).to(place), tokenizer, place)


def skeleton(choice: ModelChoice, root: Path) -> Any:
    """The base's modules with shapes but no weights (torch's meta device), to check options against."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source, revision = _where(choice, root)
    with bases.quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=revision))


def _where(choice: ModelChoice, root: Path) -> tuple[str, str | None]:
    """What from_pretrained is given: a folder whose content was checked, or a hub repository and a commit."""
    if choice.name in names():
        folder = bases.folder_of(root, choice.name, choice.content)
    elif (pointer := bases.read_pointer(root, f"folder-{choice.content[:12]}")) is not None:
        folder = Path(pointer["folder"])
    elif Path(choice.name).is_dir():
        folder = Path(choice.name)
    elif hub.is_hub_name(choice.name):
        return hub.repository_of(choice.name), choice.content
    else:
        folder = Path(choice.name)
    if not folder.is_dir():
        raise BadInput(f"Model {choice.name!r} is not in {folder}: prepare it there first.")
    if (here := bases.content_of(folder)) != choice.content:
        raise BadInput(
            f"Model {choice.name!r}: {folder} holds content {here[:12]}, the configuration names "
            f"{choice.content[:12]}. Put the old files back, or start a study of the new ones."
        )
    return str(folder), None


def _task_bases() -> dict[str, Task]:
    tasks = [catalogue.get(name) for name in catalogue.names()]
    return {f"{task.name}-base": task for task in tasks if task.pretrain_recipe()}
