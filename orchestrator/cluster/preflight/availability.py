"""Check whether model and data are available: to the driver, and to a worker on every node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import format_node_count, shorten_list
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.sources import hub_data, hub_models
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice, TaskChoice
from orchestrator.util import user_code
from orchestrator.util.errors import UsageError


def find_model(name: str, bases: Path) -> str | None:
    """Return the content hash or hub revision of a base model. Downloads nothing.

    Args:
        name: A known name, a folder, or a name on the hub. The hub is asked even if the model is stored,
            because the token may have lost its access.
        bases: The store's folder of base models.

    Returns:
        None if the study prepares the model first.

    Raises:
        UsageError: The driver cannot read the model.
    """
    content = model_catalogue.find_content(name, bases)
    if name in model_catalogue.built_in_names() or Path(name).is_dir():
        return content
    return hub_models.resolve_commit(name, content)


def check_data(task: Task) -> str:
    """Read the task's data as a study does. Returns the text of the check's line.

    Raises:
        UsageError: The data cannot be read.
    """
    try:
        with user_code.report_user_errors(task.source, "gives no examples"):
            choice = task.choice()
    except Exception as error:
        raise UsageError(_first_line(error)) from error
    sizes = f"{choice.train_size} + {choice.validation_size} + {choice.test_size} examples"
    return f"{task.name}, {sizes}, revision {choice.revision}"


def unavailable_reason(
    model: ModelChoice | None, task: TaskChoice, bases: Path, entry: Mapping[str, str] | None = None
) -> str:
    """Return why a worker on this node could not read model or data; empty if it could.

    Examples that the driver has prepared in the store are sufficient: the node then needs neither the hub nor
    the file from which they were read. The examples of a user's own task always come from the store.

    Args:
        model: The base model; None skips it.
        task: The data.
        bases: The store's folder of base models.
        entry: The `entry()` of a user's own task, which may not be in the store yet.
    """
    try:
        from orchestrator.finetune.data import dataset_cache

        hub_data.set_pin_folder(bases, add_pins=False)
        implementation = tasks.find(task, bases.parent / "data", entry)
        if not task.content and not dataset_cache.has_examples(bases.parent / "data", task, implementation):
            implementation.load(task)
        if model is not None:
            _, commit = model_catalogue.locate_pretrained(model, bases)
            if commit is not None:
                hub_models.resolve_commit(model.name, commit)
    except Exception as error:
        return _first_line(error)
    return ""


def check_availability(reasons: Mapping[str, str]) -> str:
    """Return the line of the check that all nodes can read the model and the data.

    Args:
        reasons: Node address -> result of `unavailable_reason` there.

    Raises:
        UsageError: A node cannot read model or data.
    """
    if failures := [f"{node}: {reason}" for node, reason in reasons.items() if reason]:
        raise UsageError(f"from {shorten_list(failures, '; ')}")
    return f"model and data are available from {format_node_count(len(reasons))}"


def _first_line(error: Exception) -> str:
    message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    return message.splitlines()[0]
