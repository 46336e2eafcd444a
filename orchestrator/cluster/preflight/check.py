"""`python -m orchestrator check`: whether a study with these options could run, before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.cluster.preflight import availability, capacity, shared_storage
from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    ok_result,
    undetermined_result,
)
from orchestrator.execution.ray import autoscaler
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.finetune import resolve
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.resolve import ResolvedOptions
from orchestrator.finetune.sources import hub_data
from orchestrator.launch.plan import DEFAULT_LANES_PER_TRAINER
from orchestrator.record.mlflow.tracking_uri import redact_uri, resolve_uri
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError, describe_disk_error
from orchestrator.util.redaction import redact_secrets

DEFAULT_TASK, DRY_RUN_TASK = "metamathqa", "letters"  # those of lr_sensitivity.py
VARIANTS = ("lora", "rslora", "dora", "hira", "pissa")


@dataclass
class PreflightCheck:
    """`fit` gets False with the first failure."""

    options: StudyOptions
    probe_memory: bool
    passed: bool = True

    def print_result(self, result: CheckResult) -> bool:
        print(redact_secrets(result.format_line()), flush=True)
        self.passed &= not result.failed
        return not result.failed

    def run(self) -> int:
        """Returns the exit code. Raises BadInput for options that no study could have."""
        options = self.options = autoscaler.adapt_options(self.options)
        usual = DRY_RUN_TASK if options.dry_run else DEFAULT_TASK
        # With a model that is known in any case: its own is looked for below, where it may fail.
        names = resolve.resolve_options(
            replace(options, model=loading.built_in_names()[0]), usual, VARIANTS, Path()
        )
        with remove_created_folders(options.output, options.store_folder):
            try:
                store = Store(options.store_folder)
            except (UsageError, OSError) as error:
                self.print_result(failed_result("storage", describe_disk_error(error) or str(error)))
                return 1
            self.check_tracking(store)
            configurations = self.check_model_and_data(store, names)
            self.check_cluster(store, configurations)
        return 0 if self.passed else 1

    def check_tracking(self, store: Store) -> None:
        try:
            uri = resolve_uri(self.options.tracking_uri, store)
        except UsageError as error:
            self.print_result(failed_result("tracking", str(error)))
        else:
            self.print_result(ok_result("tracking", redact_uri(uri)))

    def check_model_and_data(self, store: Store, names: ResolvedOptions) -> list[Configuration] | None:
        """What a study would train, but for rates and seeds; None when model or data cannot be had."""
        name = self.options.model or resolve.default_model(names.task)
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # as nodes have to find it
        hub_data.set_pin_folder(store.bases, add_pins=False)
        model_result, content = availability.check_model(name, store.bases)
        data_result, _ = availability.check_data(names.task)
        if not (self.print_result(model_result) & self.print_result(data_result)):
            return None
        return resolve.build_configuration_templates(
            self.options, replace(names, model=name), content, store.bases
        )

    def check_cluster(self, store: Store, configurations: list[Configuration] | None) -> None:
        is_joined = ray_cluster.running_cluster_address() is not None
        try:
            with ray_cluster.connect() as cluster:
                self.check_nodes(cluster, store, configurations)
        except UsageError as error:
            if not is_joined:  # another study's Ray is on this machine
                raise
            self.print_result(failed_result(capacity.CHECK_NAME, str(error)))

    def check_nodes(self, cluster: Cluster, store: Store, configurations: list[Configuration] | None) -> None:
        from orchestrator.cluster.preflight.node_agent import start_node_agents
        from orchestrator.cluster.preflight.nodes import check_nodes

        with start_node_agents(cluster.nodes) as agents:
            node_infos = agents.call("node_info")
            startable_node_types = next(
                (one.startable_node_types for one in node_infos.values() if one.startable_node_types), ()
            )  # nodes may share a home
            result, allocation = capacity.check_capacity(cluster, self.options, startable_node_types)
            self.print_result(result)
            for result in check_nodes(agents, node_infos, store.root):
                self.print_result(result)
            if startable_node_types and not shared_storage.is_shared(store.root):
                advice = "put --output on storage that all nodes mount (NFS, EFS, Lustre)"
                problem = f"{store.root} is on this machine's own disk: nodes that may come would not see it"
                self.print_result(failed_result("storage", f"{problem}; {advice}"))
            if configurations:
                model = configurations[0].model if configurations[0].model.content != UNPREPARED else None
                arguments = (model, configurations[0].task, str(store.bases))
                self.print_result(
                    availability.check_availability(agents.call("unavailable_reason", lambda name: arguments))
                )
        if allocation is not None:
            self.check_memory(cluster, allocation, store, configurations)

    def check_memory(
        self,
        cluster: Cluster,
        allocation: capacity.TrainerAllocation,
        store: Store,
        configurations: list[Configuration] | None,
    ) -> None:
        if not self.probe_memory:
            return
        from orchestrator.cluster.preflight.memory_task import run_memory_probe
        from orchestrator.execution.trainers.trainer import TrainerSpec

        if not configurations:
            self.print_result(undetermined_result("memory", "not probed: model or data are not there"))
        elif configurations[0].model.content == UNPREPARED:
            self.print_result(undetermined_result("memory", "not probed: the model is not in the store yet"))
        else:
            options = self.options
            spec = TrainerSpec(
                lanes_per_trainer=options.lanes_per_trainer or DEFAULT_LANES_PER_TRAINER,
                gpus_per_worker=allocation.gpus_per_worker,
                store=str(store.root),
                scratch="",
                workers_per_trainer=options.workers_per_trainer,
                gradient_checkpointing=options.gradient_checkpointing,
                device=options.device,
            )
            self.print_result(run_memory_probe(cluster, allocation, spec, configurations))


@contextmanager
def remove_created_folders(*folders: Path) -> Iterator[None]:
    """Folders that were not there are gone afterwards, unless there is something in them by then."""
    made = [
        parent
        for folder in folders
        for parent in (folder / "records", *_with_parents(folder))
        if not parent.exists()
    ]
    try:
        yield
    finally:
        for folder in sorted(set(made), key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()


def _with_parents(folder: Path) -> tuple[Path, ...]:
    whole = folder.absolute()
    return (whole, *whole.parents)


def check(options: StudyOptions, probe_memory: bool = True) -> int:
    """A line for each thing that a study needs. Returns 0 when none failed, else 1; trains nothing and leaves
    nothing. Raises BadInput for options that no study could have."""
    return PreflightCheck(options, probe_memory).run()
