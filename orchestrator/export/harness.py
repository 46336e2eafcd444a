"""Scores of a study's lanes in lm-evaluation-harness, taking turns on a base model that is loaded once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from orchestrator.analyze.analysis import find_best_lanes
from orchestrator.export.export import attach_lane, find_adapters, find_code
from orchestrator.export.lane_choice import LaneQuery, choose_lane
from orchestrator.record.harness import HarnessResult, HarnessScore, base_subject, read_results, write_result
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.study.options import HarnessOptions
from orchestrator.util.errors import UsageError, format_error, require_package, suggest_nearest

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel

SEED = 1234
"""The harness's own seed, of few-shot examples and of sampled answers."""


@dataclass(frozen=True)
class _Task:
    """A task of the harness, or a group or tag of several."""

    name: str
    loaded: Any
    """The harness's tasks and groups of this name."""
    digest: str


def evaluate_lanes(store: Store, options: HarnessOptions, notify: Callable[[str], None] = print) -> None:
    """Score lanes and their untrained base models, and write the results that the store does not have.

    Args:
        store: The store, which gets the results.
        options: The study, its lanes, and the tasks.
        notify: Called with a line of text before each evaluation, for each score, and at the end.

    Raises:
        UsageError: The harness is not installed or refuses a task, there is no such lane, its adapter was not
            kept, or its base model is missing or no language model.
    """
    for package in ("lm_eval", "accelerate"):
        require_package("evaluate", package, "lm-eval")
    import torch
    from lm_eval.models.huggingface import HFLM

    from orchestrator.finetune.models.loading import load_base_model

    study = find_study(options.output, options.study)
    records = _choose_lanes(store, study, options)
    tasks, device = _load_tasks(options), "cuda" if torch.cuda.is_available() else "cpu"
    done = known = 0
    for base, group in groupby(records, key=_base_of):
        lanes = {base: None, **{lane.fingerprint: lane for lane in group}}
        digests = {
            subject: {each.digest for each in read_results(store.harness, subject)} for subject in lanes
        }
        todo = [(subject, task) for subject in lanes for task in tasks if task.digest not in digests[subject]]
        known += len(lanes) * len(tasks) - len(todo)
        if not todo:
            continue
        own = next(lane.configuration for lane in lanes.values() if lane)
        base_model = load_base_model(own.model, store.bases, device, find_code(own, store)[0])
        # The harness calls this model, also after adapters were attached to it.
        lm = HFLM(base_model.model, tokenizer=base_model.tokenizer, batch_size=options.batch_size)
        for number, (subject, task) in enumerate(todo, 1):
            lane = lanes[subject]
            who = (
                f"{lane.configuration.variant.name} {subject[:12]}" if lane else f"untrained {own.model.name}"
            )
            notify(f"{number} of {len(todo)}: {who}: {task.name} ...")
            with _lane_on(base_model, store, study, lane):
                scores = _score(task, lm, options)
            result = HarnessResult(subject, task.name, options.settings, task.digest, scores)
            write_result(store.harness, result)
            done += 1
            for each in result.whole():
                notify(f"{who}: {each.subtask}: {each.metric} {each.score:.4f}")
    notify(f"{done} evaluations; {known} were known")


def _base_of(record: Record) -> str:
    return base_subject(record.configuration.model)


def _choose_lanes(store: Store, study: StudyFile, options: HarnessOptions) -> list[Record]:
    """Return the records of the lanes to score, those of a base model in a row.

    Raises:
        UsageError: There is no such lane, or none, its adapter was not kept, or its task trains a head.
    """
    queries = [LaneQuery(study.name, prefix) for prefix in dict.fromkeys(options.fingerprints)]
    chosen = [choose_lane(store, options.output, query).record for query in queries]
    if not chosen:
        found = [study.rename(each) for each in map(store.get, study.configurations) if each is not None]
        best = set(find_best_lanes(study, found)["fingerprint"])
        chosen = [each for each in found if each.fingerprint in best]
    if not chosen:
        raise UsageError(f"study {study.name!r}: no lane to score; run it: {study.command}")
    find_adapters(store, study, [each.fingerprint for each in chosen])
    for own in (each.configuration for each in chosen):
        if find_code(own, store)[0].has_head:
            raise UsageError(f"task {own.task.name!r} trains a head; lm_eval scores language models alone")
    return sorted(chosen, key=_base_of)


@contextmanager
def _lane_on(base_model: BaseModel, store: Store, study: StudyFile, lane: Record | None) -> Iterator[None]:
    """Let calls of the base model compute a lane; None for the base model alone."""
    if lane is None:
        yield
        return
    (file,) = find_adapters(store, study, [lane.fingerprint])
    adapters = attach_lane(base_model, lane.configuration, find_code(lane.configuration, store)[1], file)
    with adapters.activate_lanes([lane.fingerprint], None):
        yield
    adapters.detach()


def _score(task: _Task, lm: Any, options: HarnessOptions) -> list[HarnessScore]:
    """Return the scores of the harness's model as it is, with or without the adapter of a lane.

    Raises:
        UsageError: The harness refuses the task or the model.
    """
    import torch
    from lm_eval.evaluator import evaluate

    torch.manual_seed(SEED)
    for each in task.loaded["tasks"].values():
        each.set_fewshot_seed(SEED)
    try:
        found = evaluate(
            lm=lm, task_dict=task.loaded, limit=options.limit, bootstrap_iters=0,
            apply_chat_template=options.apply_chat_template,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--tasks {task.name}: lm_eval fails: {format_error(error)}") from error
    items: dict[tuple[str, str], list[Any]] = {}
    for name, samples in found["samples"].items():
        for sample in sorted(samples, key=itemgetter("doc_id")):
            for metric in sample["metrics"]:
                items.setdefault((name, f"{metric},{sample['filter']}"), []).append(sample[metric])
    rows = {key: values for key, values in items.items() if _are_numbers(values)}
    return [
        HarnessScore(name, metric, value, rows.get((name, metric), ()))
        for name, row in (found["results"] | found.get("groups", {})).items()
        for metric, value in row.items()
        if "," in metric and "_stderr," not in metric and _are_numbers([value])
    ]


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


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
    if not options.tasks:
        raise UsageError("--tasks: name at least one, such as gsm8k; `lm_eval ls tasks` lists them")
    manager, tasks = TaskManager(include_path=folder), []
    for name in dict.fromkeys(options.tasks):
        if name not in manager.all_tasks:
            hint = suggest_nearest(name, manager.all_tasks, "`lm_eval ls tasks` lists them.")
            raise UsageError(f"--tasks {name!r}: no task of lm_eval or of --include-path. {hint}")
        try:
            loaded = manager.load([name])
            for each in loaded["tasks"].values():
                own = each.get_config("num_fewshot")
                if own is None or (own and options.num_fewshot is not None):  # as the harness itself does
                    each.set_config("num_fewshot", options.num_fewshot or 0)
            digest = _digest(name, loaded["tasks"], options)
        except Exception as error:  # of the hub, of `datasets`, and of the YAML file
            raise UsageError(f"--tasks {name}: lm_eval cannot load it: {format_error(error)}") from error
        tasks.append(_Task(name, loaded, digest))
    return tasks


def _digest(name: str, tasks: Mapping[str, Any], options: HarnessOptions) -> str:
    """Return a digest of what decides a score: tasks, their items, settings, the version of the harness."""
    parts: list[Any] = [version("lm_eval"), name, options.settings]
    for key, task in sorted(tasks.items()):
        own = {field: value for field, value in task.dump_config().items() if field != "metadata"}
        parts += [key, own, *islice(task.eval_docs, options.limit)]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", text).encode()).hexdigest()  # addresses of functions
