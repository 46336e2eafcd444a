"""`python -m orchestrator check`: check whether a study with the given options could run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.cluster.preflight import availability, capacity, shared_storage
from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result
from orchestrator.execution.ray import autoscaler
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.option_names import ResolvedOptions, default_model, resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.sources import hub_data
from orchestrator.record.mlflow.tracking_uri import redact_uri, resolve_uri
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError, describe_disk_error
from orchestrator.util.redaction import redact_secrets

DEFAULT_TASK, DRY_RUN_TASK = "metamathqa", "letters"
"""The tasks of lr_sensitivity.py."""
DEFAULT_VARIANTS = ("lora", "rslora", "dora", "hira", "pissa")
"""The variants of lr_sensitivity.py."""


@dataclass
class PreflightCheck:
    """All checks of one study. Each result is printed as soon as it is known."""

    options: StudyOptions
    passed: bool = True
    """Whether no check has failed so far."""

    def print_result(self, result: CheckResult) -> bool:
        """Print a result without secrets. Returns whether the check did not fail."""
        print(redact_secrets(result.format_line()), flush=True)
        self.passed &= not result.failed
        return not result.failed

    def run(self) -> int:
        """Run all checks.

        Returns:
            The exit code: 0, or 1 if a check failed.

        Raises:
            UsageError: The options are wrong for every study.
        """
        options = self.options = autoscaler.adapt_options(self.options)
        default_task = DRY_RUN_TASK if options.dry_run else DEFAULT_TASK
        # Resolve with a built-in model. Whether the requested model exists is a check of its own.
        resolved = resolve_options(
            replace(options, model=model_catalogue.built_in_names()[0]),
            default_task,
            DEFAULT_VARIANTS,
            Path(),
        )
        with remove_created_folders(options.output, options.store_folder):
            try:
                store = Store(options.store_folder)
            except (UsageError, OSError) as error:
                self.print_result(failed_result("storage", describe_disk_error(error) or str(error)))
                return 1
            self.check_tracking(store)
            configurations = self.check_model_and_data(store, resolved)
            self.check_cluster(store, configurations)
        return 0 if self.passed else 1

    def check_tracking(self, store: Store) -> None:
        """Check whether MLflow's server answers, or its file can be written."""
        try:
            uri = resolve_uri(self.options.tracking_uri, store)
        except UsageError as error:
            self.print_result(failed_result("tracking", str(error)))
        else:
            self.print_result(ok_result("tracking", redact_uri(uri)))

    def check_model_and_data(self, store: Store, resolved: ResolvedOptions) -> list[Configuration] | None:
        """Check whether this process can read model and data.

        Args:
            store: The store of the study, which may hold the base model.
            resolved: Task and variants of the study; their model is ignored.

        Returns:
            One configuration per variant, without learning rate and seed; None if model or data are missing.
        """
        name = self.options.model or default_model(resolved.task)
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # other nodes look for it under this path
        hub_data.set_pin_folder(store.bases, add_pins=False)
        model_result, content = availability.check_model(name, store.bases)
        data_result, _ = availability.check_data(resolved.task)
        if not (self.print_result(model_result) & self.print_result(data_result)):
            return None
        return build_configuration_templates(
            self.options, replace(resolved, model=name), content, store.bases
        )

    def check_cluster(self, store: Store, configurations: list[Configuration] | None) -> None:
        """Join the running cluster, or start Ray on this machine, and check its nodes.

        Raises:
            UsageError: Another study uses Ray on this machine.
        """
        joins_cluster = ray_cluster.running_cluster_address() is not None
        try:
            with ray_cluster.connect() as cluster:
                self.check_nodes(cluster, store, configurations)
        except UsageError as error:
            if not joins_cluster:
                raise
            self.print_result(failed_result(capacity.CHECK_NAME, str(error)))

    def check_nodes(self, cluster: Cluster, store: Store, configurations: list[Configuration] | None) -> None:
        """Check capacity, then versions, storage, disks, clocks and the availability of model and data."""
        from orchestrator.cluster.preflight.node_agent import start_node_agents
        from orchestrator.cluster.preflight.nodes import check_node_access, check_nodes

        with start_node_agents(cluster.nodes) as agents:
            node_infos = agents.call("node_info")
            # The file of the autoscaler is on the head; nodes that share its home directory see it, too.
            startable = (info.startable_node_types for info in node_infos.values())
            startable_node_types = next(filter(None, startable), ())
            self.print_result(capacity.check_capacity(cluster, self.options, startable_node_types))
            for result in check_nodes(agents, node_infos, store.root):
                self.print_result(result)
            if startable_node_types and not shared_storage.is_shared(store.root):
                problem = (
                    f"{store.root} is on this machine's own disk, which nodes that start later do not see"
                )
                advice = "put --output on storage that all nodes mount (NFS, EFS, Lustre)"
                self.print_result(failed_result("storage", f"{problem}; {advice}"))
            if configurations:
                model = configurations[0].model
                known_model = None if model.content == UNPREPARED else model
                self.print_result(check_node_access(agents, known_model, configurations[0].task, store.bases))


@contextmanager
def remove_created_folders(*folders: Path) -> Iterator[None]:
    """On exit, remove the folders that did not exist on entry, and their new parents, if they are empty."""
    missing = {
        parent
        for folder in folders
        for parent in (folder / "records", folder.absolute(), *folder.absolute().parents)
        if not parent.exists()
    }
    try:
        yield
    finally:
        for folder in sorted(missing, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()


def check(options: StudyOptions) -> int:
    """Print a line for each thing that a study needs. Trains nothing and leaves no files.

    Returns:
        The exit code: 0, or 1 if a check failed.

    Raises:
        UsageError: The options are wrong for every study.
    """
    return PreflightCheck(options).run()
