"""Whether model and data can be had: by the driver as a study has them, and from every node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import Finding, failed, later, listed, ok
from orchestrator.cluster.preflight.check_result import nodes as count
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.sources import hub_data, hub_models
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice, TaskChoice
from orchestrator.util import user_code
from orchestrator.util.errors import BadInput


def model(name: str, bases: Path) -> tuple[Finding, str]:
    """And its content; keeps nothing. The hub is asked in any case: the token may have been taken back."""
    try:
        content = loading.resolve(name, bases)
        if name not in loading.names() and not Path(name).is_dir():
            content = hub_models.reach(name, content)
    except BadInput as error:
        return failed("model", str(error)), UNPREPARED
    if content is not None:
        return ok("model", f"{name}, content {content[:12]}"), content
    if name in loading.PACKAGES:
        command = f"python -m orchestrator fetch-model {name}"
        return later(
            "model", f"{name} is not in the store yet: {command} fetches it, or the study does"
        ), UNPREPARED
    return later("model", f"{name} is not in the store yet: the study pretrains it first"), UNPREPARED


def data(task: Task) -> tuple[Finding, TaskChoice | None]:
    """Reads it, as a study does."""
    try:
        with user_code.told(task.name, "gives no examples"):
            choice = task.choice()
    except Exception as error:
        said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        return failed("data", said.splitlines()[0]), None
    sizes = f"{choice.train_size} + {choice.validation_size} + {choice.test_size} examples"
    return ok("data", f"{Path(task.name).stem}, {sizes}, revision {choice.revision}"), choice


def reach(model: ModelChoice | None, task: TaskChoice | None, bases: Path) -> str:
    """On a node: why a worker there could not have them; empty when it could. Examples that the driver has
    prepared are enough: a node needs neither a hub nor the file that they came from."""
    try:
        if task is not None:
            from orchestrator.finetune.data import dataset_cache

            hub_data.keep_pins_in(bases, new=False)
            own = tasks.get(task.name)
            if not dataset_cache.has_examples(bases.parent / "data", task, own):
                own.load(task)
        if model is not None:
            _, commit = loading.where(model, bases)
            if commit is not None:
                hub_models.reach(model.name, commit)
    except Exception as error:
        said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        return said.splitlines()[0]
    return ""


def judge(nodes: Mapping[str, str]) -> Finding:
    """`nodes`: what `reach` said, by address."""
    wrong = [f"{node}: {why}" for node, why in nodes.items() if why]
    if wrong:
        return failed("reach", f"from {listed(wrong, '; ')}")
    return ok("reach", f"model and data can be had from {count(len(nodes))}")
