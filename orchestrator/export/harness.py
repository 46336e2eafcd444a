"""Scores of a study's lanes in lm-evaluation-harness, taking turns on a base model that is loaded once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.analyze.analysis import find_best_lanes
from orchestrator.export.export import adapters_of, attach_lane, find_code, load_base
from orchestrator.export.lane_choice import LaneQuery, choose_lane
from orchestrator.record.harness import HarnessResult, base_subject, read_result, whole_scores, write_result
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError, format_error, require_package, suggest_nearest

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel

SEED = 1234
"""The harness's own seed, of few-shot examples and of sampled answers."""


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the harness, with its own names."""

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False

    @property
    def settings(self) -> str:
        """The options that change scores, in words."""
        parts = (
            (self.num_fewshot is not None, f"{self.num_fewshot} shots"),
            (self.limit is not None, f"{self.limit} items"),
            (self.apply_chat_template, "chat template"),
        )
        return ", ".join(words for is_set, words in parts if is_set)


def evaluate_lanes(
    store: Store,
    output: Path,
    study_name: str,
    lanes: Sequence[str] | None,
    options: HarnessOptions,
    notify: Callable[[str], None] = print,
) -> int:
    """Score lanes and their untrained base models, and write the results that the store does not have.

    Args:
        store: The store, which gets the results.
        output: The output folder with the studies' folders.
        study_name: The study.
        lanes: First digits of fingerprints; empty for the best lane of each variant, task and base model.
            None for every finished lane whose adapter is kept.
        options: The options of the harness.
        notify: Called with a line of text before and after each evaluation.

    Returns:
        The number of evaluations.

    Raises:
        UsageError: The harness is not installed or refuses a task, there is no such lane, its adapter was not
            kept, or its base model is missing or no language model.
    """
    require_package("--harness lm_eval", "lm_eval", "lm-eval")
    study = find_study(output, study_name)
    records = _choose(store, output, study, lanes, notify)
    files = dict(zip(records, adapters_of(store, study, list(records)), strict=True))
    code = {fingerprint: find_code(record.configuration, store) for fingerprint, record in records.items()}
    for fingerprint, (own_task, _) in code.items():
        if own_task.has_head:
            name = records[fingerprint].configuration.task.name
            raise UsageError(
                f"task {name!r} has a head for classes or numbers; lm_eval scores answers in text"
            )
    tasks = _load_tasks(options)
    models: dict[ModelChoice, list[str]] = {}
    for fingerprint, record in records.items():
        models.setdefault(record.configuration.model, []).append(fingerprint)
    todo = [
        (model, subject, task)
        for model, own in models.items()
        for subject in (base_subject(model), *own)
        for task in tasks
        if not task.is_known(store, subject)
    ]
    done = 0
    for model, group in groupby(todo, key=itemgetter(0)):
        first = models[model][0]
        base_model = load_base(store, records[first].configuration, code[first][0], _device())
        lm = _wrap(base_model, options)
        for _, subject, task in group:
            lane = records.get(subject)
            who = f"{lane.configuration.variant.name} {subject[:12]}" if lane else f"untrained {model.name}"
            notify(f"{done}/{len(todo)} done; {who}: {task.name} ...")
            if lane is None:
                result = task.score(lm, subject)
            else:
                adapters = attach_lane(base_model, lane.configuration, code[subject][1], files[subject])
                with adapters.activate_lanes([subject], None):
                    result = task.score(lm, subject)
                adapters.detach()
            write_result(store.harness, result)
            done += 1
            notify(f"{who}: {_in_words(result)}")
    notify(f"{done} evaluations; {len(tasks) * (len(models) + len(records)) - done} were known")
    return done


def _choose(
    store: Store,
    output: Path,
    study: StudyFile,
    lanes: Sequence[str] | None,
    notify: Callable[[str], None],
) -> dict[str, Record]:
    """Return fingerprint -> record of the lanes to score.

    Raises:
        UsageError: There is no such lane, or none.
    """
    if lanes:
        chosen = [choose_lane(store, output, LaneQuery(study.name, each)).record for each in lanes]
        return {record.fingerprint: record for record in chosen}
    found = [study.rename(record) for record in map(store.get, study.configurations) if record is not None]
    finished = {record.fingerprint: record for record in found if record.state == "finished"}
    if lanes is None:
        kept = {name: record for name, record in finished.items() if store.find_adapter(name) is not None}
        notify(
            f"{len(kept)} of {len(finished)} finished lanes have an adapter; --save-adapters all keeps all"
        )
    else:
        kept = {name: finished[name] for name in find_best_lanes(study, found)["fingerprint"]}
    if not kept:
        raise UsageError(f"study {study.name!r}: no lane to score; run it: {study.command}")
    return kept


@dataclass(frozen=True)
class _Task:
    """A task of the harness, or a group or tag of several."""

    name: str
    loaded: Any
    """The harness's tasks and groups of this name."""
    digest: str
    options: HarnessOptions

    def is_known(self, store: Store, subject: str) -> bool:
        """Return whether the store has the result of a lane or base model."""
        known = read_result(store.harness, subject, self.name, self.options.settings)
        return known is not None and known.digest == self.digest

    def score(self, lm: Any, subject: str) -> HarnessResult:
        """Score the model as it is, with or without the adapter of a lane.

        Raises:
            UsageError: The harness refuses the task or the model.
        """
        import torch
        from lm_eval.evaluator import evaluate

        torch.manual_seed(SEED)
        for each in self.loaded["tasks"].values():
            each.set_fewshot_seed(SEED)
        options = self.options
        try:
            found = evaluate(
                lm=lm, task_dict=self.loaded, limit=options.limit, bootstrap_iters=0,
                apply_chat_template=options.apply_chat_template,
            )  # fmt: skip
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--tasks {self.name}: lm_eval fails: {format_error(error)}") from error
        rows = {**found["results"], **found.get("groups", {})}
        scores = {
            name: {key: float(value) for key, value in row.items() if "," in key and _is_score(key, value)}
            for name, row in rows.items()
        }
        items = {name: _item_values(samples) for name, samples in found["samples"].items()}
        return HarnessResult(subject, self.name, options.settings, self.digest, scores, items)


def _is_score(key: str, value: object) -> bool:
    return "_stderr," not in key and isinstance(value, int | float)


def _item_values(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return "METRIC,FILTER" -> value of each item, in their order, for metrics whose values are numbers."""
    found: dict[str, list[Any]] = {}
    for sample in sorted(samples, key=itemgetter("doc_id")):
        for metric in sample["metrics"]:
            found.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {
        key: [float(value) for value in values]
        for key, values in found.items()
        if all(isinstance(value, int | float) for value in values)
    }


def _load_tasks(options: HarnessOptions) -> list[_Task]:
    """Load the tasks, with the few-shot examples that the options ask for.

    Raises:
        UsageError: The harness does not have a task, or cannot load it.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--include-path {folder}: must be a folder with the YAML files of tasks")
    manager, tasks = TaskManager(include_path=folder), []
    for name in options.tasks:
        if name not in manager.all_tasks:
            hint = suggest_nearest(name, manager.all_tasks, "`lm_eval ls tasks` lists them.")
            raise UsageError(f"--tasks {name!r}: no task of lm_eval or of --include-path. {hint}")
        try:
            loaded = manager.load([name])
            for each in loaded["tasks"].values():
                own = each.get_config("num_fewshot")
                if own is None or (own and options.num_fewshot is not None):  # as the harness itself does
                    each.set_config("num_fewshot", options.num_fewshot or 0)
            digest = _digest(loaded["tasks"], options.limit)
        except Exception as error:  # of the hub, of `datasets`, and of the YAML file
            raise UsageError(f"--tasks {name}: lm_eval cannot load it: {format_error(error)}") from error
        tasks.append(_Task(name, loaded, digest, options))
    return tasks


def _digest(tasks: Mapping[str, Any], limit: int | None) -> str:
    """Return a digest of tasks, of their items up to a limit, and of the version of the harness."""
    digest = hashlib.sha256(version("lm_eval").encode())
    for name, task in sorted(tasks.items()):
        for part in (name, task.dump_config(), *islice(task.eval_docs, limit)):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wrap(base_model: BaseModel, options: HarnessOptions) -> Any:
    """Wrap a base model for the harness. Adapters that are attached later take part in its calls."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(base_model.model, tokenizer=base_model.tokenizer, batch_size=options.batch_size)


def _in_words(result: HarnessResult) -> str:
    """Return the scores of a result that stand for the whole task: "gsm8k: exact_match,strict-match 0.42"."""
    shown = whole_scores(result)
    return "; ".join(
        f"{name}: {', '.join(f'{metric} {score:.4f}' for metric, score in own.items())}"
        for name, own in shown.items()
    )
