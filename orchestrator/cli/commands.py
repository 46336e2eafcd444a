"""The commands on records, stores and models. Libraries are imported in `run`, so that --help is fast."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.experiments import Init
from orchestrator.experiments.published import Published
from orchestrator.study.option import Count, Option, Text
from orchestrator.study.options import HarnessOptions, StoreOptions, StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError


def _open_store(options: StoreOptions) -> Any:
    from orchestrator.record.store import Store

    return Store(options.store_folder, create=False)


@dataclass(frozen=True, kw_only=True)
class Sync(StoreOptions):
    """Rebuild records.parquet and the MLflow runs of every study from the store."""

    tracking_uri: Text | None = None
    """MLflow tracking server. Default: the one that each study used."""

    def run(self) -> int:
        """Rebuild the projections and return the exit code."""
        from orchestrator.analyze.report import describe_study
        from orchestrator.record.maintenance import sync_projections

        return sync_projections(_open_store(self), self.output, self.tracking_uri, print, describe_study)


@dataclass(frozen=True, kw_only=True)
class Show(StoreOptions):
    """Print records, with the traceback of a failed one and the command that trains it again."""

    fingerprints: Annotated[tuple[str, ...], Option("FINGERPRINT", position=True)] = ()
    """Fingerprints, or their first digits."""

    def run(self) -> int:
        """Print the records and return the exit code."""
        from orchestrator.record.show import format_record

        if not self.fingerprints:
            raise UsageError("show: name at least one fingerprint; the report lists them.")
        store = _open_store(self)
        print("\n\n".join(format_record(store, self.output, prefix) for prefix in self.fingerprints))
        return 0


@dataclass(frozen=True, kw_only=True)
class Report(StoreOptions):
    """Write a study's report again."""

    study: Annotated[Text, Option("STUDY", position=True)]
    """The study's name."""

    def run(self) -> int:
        """Write the report and return the exit code."""
        from orchestrator.analyze import report
        from orchestrator.record.mlflow import study_uri
        from orchestrator.record.study_file import find_study
        from orchestrator.util.redaction import redact_secrets

        store = _open_store(self)
        study = find_study(self.output, self.study)
        folder = study.folder
        uri = redact_secrets(study_uri(study.tracking_uri, store))
        # The digest is taken before the records are read. A record that is written in between then changes
        # the next digest, so that the report is made again.
        inputs = report.digest_inputs(study, store, uri, folder)
        records = [r for r in map(store.get, study.configurations) if r is not None]
        if not records:
            raise UsageError(
                f"study {study.name!r}: no record of it in {store.root}; run it: {study.command}"
            )
        if not report.is_written(folder, inputs):
            report.write_report(study, records, folder, uri, store.root)
            report.remember(folder, inputs)
        print(f"{folder / 'report.html'}: {len(records)} of {len(study.configurations)} configurations")
        return 0


@dataclass(frozen=True, kw_only=True)
class FetchModel(StoreOptions):
    """Prepare a base model before a study needs it, for example for `--plan`, which then counts tokens.

    A model of a Python package is downloaded, and a task's own model is pretrained; both are kept in the
    store. A model of the Hugging Face hub is pinned to a commit; its weights are downloaded when they are
    loaded, or in advance by `hf download NAME`. A study prepares its model itself.
    """

    name: Annotated[Text, Option("NAME", position=True)]
    """The model's name."""

    def run(self) -> int:
        """Prepare the base model and return the exit code."""
        from orchestrator.finetune.models.catalogue import prepare_base_model
        from orchestrator.record.store import Store

        with atomic_files.remove_created_folders(self.output, self.store_folder, after=UsageError):
            content = prepare_base_model(self.name, Store(self.store_folder).bases, progress=print)
        print(f"{self.name}: ready, content {content[:12]}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Gc(StoreOptions):
    """Remove what a crash left in the store.

    A study removes its temporary data itself, unless it was killed. This command removes checkpoints of
    lanes whose record is finished or diverged, temporary files, and folders of dead studies. It may run while
    a study runs.
    """

    dry_run: bool = False
    """Only print what would be removed."""
    older_than: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Hours. Temporary files that were written since then are kept, because they may be in use."""

    def run(self) -> int:
        """Remove the files and return the exit code."""
        from orchestrator.record.maintenance import describe_garbage, find_garbage, remove_garbage

        store = _open_store(self)
        found = find_garbage(store, self.output, self.older_than * 3600)
        lines = [*describe_garbage(found)]
        print("\n".join(["would remove" if self.dry_run else "removes", *lines]) if lines else "no garbage")
        if not self.dry_run:
            remove_garbage(store, found)
        return 0


@dataclass(frozen=True, kw_only=True)
class Check(StoreOptions):
    """Check whether a study's trainers have room, and whether all nodes are alike and share the store.

    A running cluster is joined, else this machine is checked. Each requirement is a line: ok, or FAILED with
    a fix. Nothing is trained or left behind. Exit code 0, or 1 when a line says FAILED. Data, model and
    settings are checked by --plan of the study.
    """

    trainers: Count | None = None
    """Number of trainers of the study. Default: as many as fit."""
    gpus_per_worker: Annotated[float | None, Field(ge=0, le=1)] = None
    """GPUs of a worker, as in the study."""
    workers_per_trainer: Count = 1
    """Workers of a trainer, as in the study."""

    def run(self) -> int:
        """Check the machines and return the exit code."""
        from orchestrator.cluster.check import check_machines

        asked = {name: getattr(self, name) for name in ("trainers", "gpus_per_worker", "workers_per_trainer")}
        StudyOptions(**asked)  # for the rules that involve several of them
        return int(not check_machines(self.store_folder, **asked))


@dataclass(frozen=True, kw_only=True)
class Export(StoreOptions):
    """Export a trained lane of a study: an adapter in PEFT's format, or a merged plain model.

    A variant without such an adapter, such as `full`, is merged, or written as exact tensors.
    Without FINGERPRINT, the lane with the best validation score is exported, which `--save-adapters best`
    keeps. A lane whose adapter was not kept is refused with the command that trains it with its adapter.
    """

    study: Annotated[Text, Option("STUDY", position=True)]
    """The study's name."""
    fingerprint: Annotated[str, Option("[FINGERPRINT]", position=True)] = ""
    """First digits of the fingerprint of a lane, in place of the best one."""
    variant: Text | None = None
    """The best lane of this variant."""
    task: Text | None = None
    """The best lane on this task; needed in a study of several tasks."""
    merge: bool = False
    """Write a plain model of transformers, with the adapter in its weights, in place of the adapter."""
    as_lora: Annotated[Count | None, Option("RANK")] = None
    """Write a plain LoRA of this rank that is near to the lane, for servers that take nothing else, such as
    vLLM, and print its error."""
    raw: bool = False
    """Write the exact tensors of the lane, which every variant has, for `variants.storage.load_lane`."""
    to: Path | None = None
    """The new folder. Default: VARIANT-FINGERPRINT in the folder `export` of the study's folder."""

    def run(self) -> int:
        """Export the lane and return the exit code."""
        from rich.filesize import decimal

        from orchestrator.export.export import export_lane
        from orchestrator.export.lane_choice import LaneQuery

        forms = {"--merge": self.merge, "--raw": self.raw, "--as-lora": self.as_lora}
        asked = [option for option, value in forms.items() if value]
        if len(asked) > 1:
            raise UsageError(f"{' with '.join(asked)}: an export has one form; name one of them.")
        form: Literal["merged", "raw"] | None = "merged" if self.merge else "raw" if self.raw else None
        query = LaneQuery(self.study, self.fingerprint, self.variant, self.task)
        done = export_lane(_open_store(self), self.output, query, form, self.to, lora_rank=self.as_lora)
        print(f"{shlex.quote(str(done.folder))}: {decimal(done.bytes)}; README.md says how to load it")
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate(HarnessOptions):
    """Score trained lanes of a study by tasks of lm-evaluation-harness, beside the untrained base model.

    The base model is loaded once, and the adapters take turns on it, also those that PEFT does not have.
    Without FINGERPRINT, the best lane of each variant is scored. The same command again evaluates only what
    is missing. The report then shows the scores.
    """

    def run(self) -> int:
        """Score the lanes, write the report again, and return the exit code."""
        from orchestrator.export.harness import evaluate_lanes

        evaluate_lanes(_open_store(self), self)
        return Report(study=self.study, output=self.output, store=self.store).run()


COMMANDS: dict[str, type[Any]] = {
    "init": Init,
    "check": Check,
    "show": Show,
    "report": Report,
    "export": Export,
    "evaluate": Evaluate,
    "sync": Sync,
    "gc": Gc,
    "fetch-model": FetchModel,
    "published": Published,
}
"""Name of each command -> the class of its options, whose method `run` returns the exit code."""
