"""Text of one record for a terminal of 80 columns, and commands derived from a study's command."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import Source, StudyFile, read_studies
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import ALL, load_factors
from orchestrator.study.program_names import (
    CURVE_SCRIPT,
    FACTOR_SCRIPT,
    TUNED_SCRIPT,
    find_script,
    own_command,
    replace_script,
)
from orchestrator.study.space import format_value, get_value
from orchestrator.util.errors import UsageError
from variants.variant_names import canonical_key

_OTHER_SCRIPTS = (TUNED_SCRIPT, FACTOR_SCRIPT)
# Options that `lr_sensitivity.py` lacks, or that would train more than one configuration.
_OTHER_OPTIONS = (
    *("--margin", "--replicates", "--max-replicates", "--factors", "--levels", "--widen"),
    "--rates-per-decade",
)


def format_record(store: Store, output: Path, prefix: str) -> str:
    """Return a record as text.

    The text has state, scores, cost, provenance, evaluations, the traceback of a failed lane, the command
    that exports the adapter of a finished lane, and the command that trains the configuration again.

    Args:
        store: The store.
        output: The output folder with the studies' folders; the studies that requested the configuration are
            looked up there.
        prefix: First digits of the fingerprint.

    Raises:
        UsageError: No fingerprint, or more than one, begins with `prefix`, or the record's file is damaged.
    """
    fingerprint = store.resolve_prefix(prefix)
    record = store.get(fingerprint)
    if record is None:  # `resolve_prefix` reads the first bytes of files only
        raise UsageError(
            f"fingerprint {prefix!r}: {store.records_folder / fingerprint[:2]} no longer holds a "
            "whole record of it; its study's command trains it again"
        )
    studies = [s for _folder, s in read_studies(output).values() if fingerprint in s.configurations]
    header = _format_header(record, store.count_failures(fingerprint))
    lines = [*header, *_format_scores(record), *_format_cost(record)]
    if record.traceback:
        lines += ["", record.traceback.rstrip()]
    if record.state == "finished" and studies:
        words = ["export", studies[0].name, fingerprint[:12]]
        command = own_command(words, studies[0].command, output, store.root)
        lines += ["", "To export its adapter:", f"  {command}"]
    return "\n".join([*lines, "", *_format_rerun(record, studies, output)])


def narrow_command(command: str, configuration: Configuration, sources: Sequence[Source] = ()) -> str:
    """Narrow a study's command to one of its configurations.

    The values of --data, --task, --variants, --learning-rates and --seeds are replaced. The hyperparameters
    that a search or a study of factors varies are set to the configuration's values with --set. All other
    options stay. The command trains the seeds before the configuration's too, because no option requests one
    seed alone.

    Args:
        command: The study's command.
        configuration: The configuration to train, with the names that it has in the study.
        sources: The study's sources; see `narrow_task`.
    """
    is_named = any(len(_option_values(command, option)) > 1 for option in ("--task", "--data"))
    is_named |= bool(_option_values(command, "--preset"))
    varied = [*_option_values(command, "--space"), *_factor_names(command)]
    return replace_options(
        command,
        {
            **(narrow_task(command, configuration.task.name, sources) if is_named else {}),
            "--variants": [find_typed(command, "--variants", configuration.variant.name)],
            "--learning-rates": [repr(configuration.optimizer.learning_rate)],
            "--seeds": [str(configuration.seed + 1)],
            "--set": [
                *_select_fixed_values(_option_values(command, "--set"), varied, configuration),
                *_format_values(varied, configuration),
            ],
            **dict.fromkeys(("--search", "--sampler", "--points", "--space"), ()),
        },
    )


def replace_options(command: str, replacements: Mapping[str, Sequence[str]]) -> str:
    """Replace options in a study's command, such that the command trains only the configurations named.

    A script whose design would train further configurations is replaced by `lr_sensitivity.py`, and options
    of such designs are removed. The new options come last.

    Args:
        command: The study's command.
        replacements: Option -> its new values. An option without values is removed.
    """
    changed = change_options(command, {**replacements, **dict.fromkeys(_OTHER_OPTIONS, ())})
    return replace_script(changed, CURVE_SCRIPT) if find_script(changed) in _OTHER_SCRIPTS else changed


def change_options(command: str, replacements: Mapping[str, Sequence[str]]) -> str:
    """Replace options in a study's command. The script and all other options stay; the new options come last.

    Args:
        command: The study's command.
        replacements: Option -> its new values. An option without values is removed.
    """
    kept = [word for option, word in _words_by_option(command) if option not in replacements]
    return shlex.join([*kept, *(w for o, values in replacements.items() if values for w in (o, *values))])


def _words_by_option(command: str) -> Iterator[tuple[str, str]]:
    """Yield (option, word) for each word of a command. Words before the first option have the option ""."""
    option = ""
    for word in shlex.split(command):
        if word.startswith("--"):
            option = word.partition("=")[0].replace("_", "-")
        yield option, word


def narrow_task(command: str, name: str, sources: Sequence[Source]) -> dict[str, list[str]]:
    """Return the option that narrows a study's command to one of its tasks: --data or --task, and its value.

    Args:
        command: The study's command.
        name: The name of the task in the study.
        sources: The study's sources; see `StudyFile.sources`. They say which path or dataset of --data has
            become which task: `a/b:c` of the hub, for example, becomes the task `b-c`.
    """
    words = _option_values(command, "--data")
    if not words:
        return {"--task": [find_typed(command, "--task", name)]}
    path = next((source.path for source in sources if source.name == name), "")
    path = path or find_typed(command, "--data", name)
    return {"--data": [next((word for word in words if os.path.abspath(word) == path), path)]}


def find_typed(command: str, option: str, name: str) -> str:
    """Find the word in a study's command that names a task or a variant.

    Args:
        command: A study's command.
        option: The option that has the word, such as --task.
        name: The name of the task or variant in the study.

    Returns:
        The path of its file as it was typed; `name` if no file has this name.
    """
    words = _option_values(command, option)
    return next((word for word in words if os.path.basename(word) == name), name)


def _option_values(command: str, wanted: str) -> list[str]:
    """Return the values of an option in a command, in either form: `--name value` or `--name=value`."""
    words = [word for option, word in _words_by_option(command) if option == wanted]
    values = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    return [value for value in values if value]


def _select_fixed_values(words: list[str], varied: list[str], configuration: Configuration) -> list[str]:
    """Return the words of --set without the learning rate, the varied values and those of other variants."""
    dropped = {"learning_rate", *map(_key, varied)}
    variants = ("", configuration.variant.name)
    keys = [_key(word) for word in words]
    return [
        word
        for word, key in zip(words, keys, strict=True)
        if key.rpartition(".")[0] in variants and not {key, key.rpartition(".")[2]} & dropped
    ]


def _key(word: str) -> str:
    """Return the hyperparameter's key of a word NAME=VALUE."""
    return canonical_key(word.partition("=")[0])


def _factor_names(command: str) -> list[str]:
    """Return the factors that a study of factors may vary, in the order of the command or of the table."""
    if find_script(command) != FACTOR_SCRIPT:
        return []
    names = _option_values(command, "--factors")
    return names if names and ALL not in names else list(load_factors())


def _format_values(words: list[str], configuration: Configuration) -> list[str]:
    """Return the configuration's values of the hyperparameters that `words` name, as words of --set.

    Args:
        words: Names, or NAME=SPEC as in --space.
        configuration: The configuration; a hyperparameter that its variant does not have is left out.
    """
    keys = [_key(word) for word in words]
    values = {key: get_value(configuration, key) for key in keys if key.rpartition(".")[2] != "learning_rate"}
    return [
        f"{key}={value!r}" if isinstance(value, float) else f"{key}={format_value(value)}"
        for key, value in values.items()
        if value is not None
    ]


def _format_header(record: Record, failures: int) -> Iterator[str]:
    configuration = record.configuration
    state = f"{record.state} after {record.steps} of {configuration.lr_schedule.steps} steps"
    yield f"fingerprint  {record.fingerprint}"
    yield f"state        {state}{f', {failures} failures' if failures > 1 else ''}"
    if record.reason:
        yield f"reason       {record.reason}"
    yield ""
    columns = configuration.to_columns().items()
    yield _wrap_pairs([f"{name} {_shorten(value)}" for name, value in columns if value is not None])


def _format_scores(record: Record) -> Iterator[str]:
    metric = record.configuration.task.metric
    yield ""
    for split in ("validation", "test"):
        score = record.score(split)
        untrained = record.baseline_scores.get(split, {}).get(metric)
        before = f" (untrained {untrained:.4f})" if untrained is not None else ""
        yield f"{split:<12} {metric} {'none' if score is None else f'{score:.4f}'}{before}"
    if not record.evaluations:
        return
    names = list(dict.fromkeys(name for e in record.evaluations for name in e.scores))
    yield ""
    yield f"{'step':>8}  {'split':<10}" + "".join(f"  {name:>12}" for name in names)
    for e in record.evaluations:
        cells = [f"{e.scores[name]:12.4f}" if name in e.scores else " " * 12 for name in names]
        yield f"{e.step:>8}  {e.split:<10}" + "".join(f"  {cell}" for cell in cells)


def _format_cost(record: Record) -> Iterator[str]:
    cost, provenance = record.cost, record.provenance
    yield ""
    yield (
        f"cost         {cost.train_seconds:.1f} s training, {cost.evaluate_seconds:.1f} s evaluating, "
        f"{cost.tokens} tokens, {cost.trainable_parameters} parameters"
    )
    if cost.start_seconds or cost.other_seconds:
        yield (
            f"time         {cost.generate_seconds:.1f} s of the evaluation for generated answers; also "
            f"{cost.start_seconds:.1f} s for the trainer's start, {cost.other_seconds:.1f} s for other work"
        )
    if cost.peak_memory:
        yield f"memory       {cost.peak_memory / 2**20:.0f} MiB at most, the lane group and its base model"
    if provenance.ended:
        ended = datetime.fromtimestamp(provenance.ended, UTC)
        yield f"made         {ended:%Y-%m-%d %H:%M:%S} UTC on {provenance.host}"
    yield f"with         {provenance.device}, {provenance.kernels} kernels, commit {provenance.commit}"
    if provenance.versions:
        yield _wrap_pairs([f"{k} {v}" for k, v in provenance.versions.items()])
    steps = ", ".join(map(str, provenance.resumed_from))
    resumed = f", resumed from step {steps}" if steps else ""
    group = f"{provenance.lane_group_size} lanes, {provenance.workers} workers"
    yield f"             attempt {provenance.attempt}{resumed}, {group}"


def _format_rerun(record: Record, studies: list[StudyFile], output: Path) -> Iterator[str]:
    if not studies:
        yield f"No study under {output} requests this configuration, so no command trains it again."
    else:
        study = studies[0]
        configuration = study.rename(record).configuration
        yield f"To train it again (study {study.name}):"
        yield f"  {narrow_command(study.command, configuration, study.sources)}"


def _wrap_pairs(pairs: Sequence[str]) -> str:
    """Return the pairs in indented lines of at most 78 columns, which break between pairs only."""
    text = ", ".join(pair.replace(" ", "\0") for pair in pairs)
    indent = " " * 13
    lines = textwrap.wrap(text, 78, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _shorten(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
