"""A trained lane in memory: its base model, and its adapter as a file holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util.atomic_files import DamagedFileError
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from variants.api import Variant
    from variants.attach import Adapters


@dataclass(frozen=True)
class LaneCode:
    """The task and the variant of a configuration, as objects."""

    task: Task
    variant: Variant

    @classmethod
    def find(cls, configuration: Configuration, store: Store) -> LaneCode:
        """Load the task and the variant of a configuration.

        Those of a user's files come from the store, so the files need not exist on this machine.

        Args:
            configuration: The configuration.
            store: The store, which has a copy of the code in users' files.

        Raises:
            UsageError: The task or the variant is not here, or it is another version than that of the
                configuration.
        """
        from orchestrator.finetune.engine.engine import check_versions
        from orchestrator.finetune.sources import own_variants
        from orchestrator.finetune.tasks import catalogue as tasks

        task = tasks.find(configuration.task, store.data)
        try:
            variant = own_variants.find(configuration.variant, store.data)
            check_versions(configuration, variant, task)
        except (ValueError, RuntimeError) as error:
            name = configuration.variant.name
            raise UsageError(f"The lane of {name!r} cannot be used here: {error}") from error
        return cls(task, variant)


@dataclass(frozen=True)
class TrainedLane:
    """A base model with the adapters of one trained lane."""

    configuration: Configuration
    code: LaneCode
    base_model: BaseModel
    adapters: Adapters


def load_trained_lane(store: Store, configuration: Configuration, code: LaneCode, file: Path) -> TrainedLane:
    """Load the base model of a lane on the CPU, and add the adapter in a file.

    Args:
        store: The store, which has the base model.
        configuration: The configuration of the lane.
        code: The lane's task and variant.
        file: The file with the lane's adapter.

    Raises:
        UsageError: The base model is missing or has changed, or the file is damaged or was just removed.
    """
    from orchestrator.finetune.engine import adapter_file
    from orchestrator.finetune.engine.lane import variant_settings
    from orchestrator.finetune.models import loading
    from variants.attach import attach

    base_model = loading.load_base_model(configuration.model, store.bases, "cpu", code.task)
    settings, targets = variant_settings(configuration), configuration.variant.targets
    adapters = attach(base_model.model, code.variant, settings, targets, base_model.head_names)
    try:
        adapter_file.restore(file, adapters, configuration)
    except DamagedFileError as error:
        raise UsageError(f"{error}; remove the file, and the same command trains the lane again") from error
    except FileNotFoundError as error:  # a study has removed it while the base model was loaded
        raise UsageError(f"{file} was removed by a running study; run the same command again") from error
    return TrainedLane(configuration, code, base_model, adapters)
