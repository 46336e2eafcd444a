"""`python -m orchestrator check`: whether a study with these options could run, before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.cluster.preflight import availability, capacity, shared_storage
from orchestrator.cluster.preflight.check_result import Finding, failed, later, ok
from orchestrator.execution.ray import autoscaler
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.finetune import resolve
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.resolve import Names
from orchestrator.finetune.sources import hub_data
from orchestrator.launch.plan import LANES
from orchestrator.record.mlflow.tracking_uri import checked, shown
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import BadInput, refused_by_disk
from orchestrator.util.redaction import without_secrets

TASK, REHEARSAL = "metamathqa", "letters"  # those of lr_sensitivity.py
VARIANTS = ("lora", "rslora", "dora", "hira", "pissa")


@dataclass
class Check:
    """`fit` gets False with the first failure."""

    options: StudyOptions
    probe: bool
    fit: bool = True

    def say(self, finding: Finding) -> bool:
        print(without_secrets(finding.line()), flush=True)
        self.fit &= not finding.failed
        return not finding.failed

    def all(self) -> int:
        """Returns the exit code. Raises BadInput for options that no study could have."""
        options = self.options = autoscaler.suited(self.options)
        usual = REHEARSAL if options.dry_run else TASK
        # With a model that is known in any case: its own is looked for below, where it may fail.
        chosen = resolve.names(replace(options, model=loading.names()[0]), usual, VARIANTS, Path())
        with as_it_was(options.output, options.store_folder):
            try:
                store = Store(options.store_folder)
            except (BadInput, OSError) as error:
                self.say(failed("storage", refused_by_disk(error) or str(error)))
                return 1
            self.tracking(store)
            configurations = self.sources(store, chosen)
            self.cluster(store, configurations)
        return 0 if self.fit else 1

    def tracking(self, store: Store) -> None:
        try:
            uri = checked(self.options.tracking_uri, store)
        except BadInput as error:
            self.say(failed("tracking", str(error)))
        else:
            self.say(ok("tracking", shown(uri)))

    def sources(self, store: Store, chosen: Names) -> list[Configuration] | None:
        """What a study would train, but for rates and seeds; None when model or data cannot be had."""
        name = self.options.model or resolve.default_model(chosen.task)
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # as nodes have to find it
        hub_data.keep_pins_in(store.bases, new=False)
        model, content = availability.model(name, store.bases)
        data, _ = availability.data(chosen.task)
        if not (self.say(model) & self.say(data)):
            return None
        return resolve.templates(self.options, replace(chosen, model=name), content, store.bases)

    def cluster(self, store: Store, configurations: list[Configuration] | None) -> None:
        joined = ray_cluster.address() is not None
        try:
            with ray_cluster.connect() as cluster:
                self.nodes(cluster, store, configurations)
        except BadInput as error:
            if not joined:  # another study's Ray is on this machine
                raise
            self.say(failed(capacity.NAME, str(error)))

    def nodes(self, cluster: Cluster, store: Store, configurations: list[Configuration] | None) -> None:
        from orchestrator.cluster.preflight.node_agent import witnesses
        from orchestrator.cluster.preflight.nodes import look

        with witnesses(cluster.nodes) as there:
            facts = there.ask("facts")
            to_come = next((one.kinds for one in facts.values() if one.kinds), ())  # nodes may share a home
            finding, seats = capacity.judge(cluster, self.options, to_come)
            self.say(finding)
            for finding in look(there, facts, store.root):
                self.say(finding)
            if to_come and not shared_storage.is_shared(store.root):
                advice = "put --output on storage that all nodes mount (NFS, EFS, Lustre)"
                own = f"{store.root} is on this machine's own disk: nodes that may come would not see it"
                self.say(failed("storage", f"{own}; {advice}"))
            if configurations:
                known = configurations[0].model if configurations[0].model.content != UNPREPARED else None
                asked = (known, configurations[0].task, str(store.bases))
                self.say(availability.judge(there.ask("reach", lambda name: asked)))
        if seats is not None:
            self.memory(cluster, seats, store, configurations)

    def memory(
        self,
        cluster: Cluster,
        seats: capacity.Seats,
        store: Store,
        configurations: list[Configuration] | None,
    ) -> None:
        if not self.probe:
            return
        from orchestrator.cluster.preflight.memory_task import ask
        from orchestrator.execution.trainers.trainer import SeatPlan

        if not configurations:
            self.say(later("memory", "not probed: model or data are not there"))
        elif configurations[0].model.content == UNPREPARED:
            self.say(later("memory", "not probed: the model is not in the store yet"))
        else:
            options = self.options
            plan = SeatPlan(
                lanes=options.lanes_per_seat or LANES,
                gpus=seats.gpus,
                store=str(store.root),
                scratch="",
                workers=options.workers_per_seat,
                gradient_checkpointing=options.gradient_checkpointing,
                device=options.device,
            )
            self.say(ask(cluster, seats, plan, configurations))


@contextmanager
def as_it_was(*folders: Path) -> Iterator[None]:
    """Folders that were not there are gone afterwards, unless there is something in them by then."""
    made = [
        parent for folder in folders for parent in (folder / "records", *_up(folder)) if not parent.exists()
    ]
    try:
        yield
    finally:
        for folder in sorted(set(made), key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()


def _up(folder: Path) -> tuple[Path, ...]:
    whole = folder.absolute()
    return (whole, *whole.parents)


def check(options: StudyOptions, probe: bool = True) -> int:
    """A line for each thing that a study needs. Returns 0 when none failed, else 1; trains nothing and leaves
    nothing. Raises BadInput for options that no study could have."""
    return Check(options, probe).all()
