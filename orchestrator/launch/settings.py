"""What a command takes from earlier studies: settings that stay, files that may have changed, --only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.names import DEFAULT_STORE_NAME
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from variants import catalogue
from variants.traits import VerifiedBy
from variants.variant_names import FILE_SUFFIX

PLANNED_KINDS = frozenset({"replicates", "factors"})
"""Kinds of studies whose settings are fixed before there are results."""
SHORT_FINGERPRINT = 12
"""Digits of a fingerprint in a message."""


def fix_settings(
    settings: AnalysisSettings, study: StudyFile, is_search: bool, replicates: int, variants: Iterable[str]
) -> AnalysisSettings:
    """Complete the settings of the analysis, and check that they agree with earlier runs of the study.

    Args:
        settings: Settings of this command. If `max_replicates` is 0, because the command does not give it, it
            is taken from the first run of the study, else it is `replicates`.
        study: The study before this command.
        is_search: True if a sampler chooses the points.
        replicates: Number of replicates of this command.
        variants: Names of the variants of the study.

    Returns:
        The settings to use.

    Raises:
        UsageError: The first run of the study had another kind, selection, margin or planned maximum, or this
            command has more replicates than planned.
    """
    before = study.settings if study.configurations else None
    if before is not None and before.kind != settings.kind and {before.kind, settings.kind} & PLANNED_KINDS:
        raise UsageError(
            f"--study {study.name!r}: it is a study of another kind ({before.kind}, not {settings.kind}); "
            "take another --study."
        )
    if settings.kind not in PLANNED_KINDS:
        # The points of a search are not a curve over the learning rate.
        return replace(settings, kind="search") if is_search else settings
    unverified = tuple(name for name in variants if catalogue.traits(name).verified_by is VerifiedBy.NONE)
    found = replace(settings, unverified=unverified)
    planned = settings.max_replicates or (before.max_replicates if before else 0) or replicates
    if settings.kind == "replicates":
        found = replace(found, max_replicates=planned)
    for name in ("select", "margin", "max_replicates"):
        option, new, then = (
            f"--{name.replace('_', '-')}",
            getattr(found, name),
            getattr(before or found, name),
        )
        if new != then:
            raise UsageError(
                f"{option} {new}: study {study.name!r} began with {then}, which is fixed before there are "
                f"results; take {option} {then}, or another --study."
            )
    if settings.kind == "replicates" and replicates > planned:
        raise UsageError(
            f"--replicates {replicates}: study {study.name!r} was planned for at most {planned} "
            f"(--max-replicates), over which its error rate is shared out; take {planned}, or another "
            "--study."
        )
    return found


def refuse_other_runs(
    study: StudyFile,
    requested: Iterable[Configuration],
    templates: Iterable[Configuration],
    replicates: int,
    store: Store,
) -> None:
    """Check that a comparison has no earlier runs of the same tunings that this command does not request.

    A tuning consists of the runs of one task, variant and replicate. If some of them had other settings, the
    best one would be chosen among runs that are not comparable.

    Args:
        study: The study before this command.
        requested: Configurations of this command.
        templates: One configuration per task and variant.
        replicates: Number of replicates of this command.
        store: The records.

    Raises:
        UsageError: The study has such runs.
    """
    asked = {c.fingerprint for c in requested}
    tuned = {(template.task.name, template.variant.name) for template in templates}
    records = [store.get(fingerprint) for fingerprint in study.configurations if fingerprint not in asked]
    others = [record.configuration for record in records if record is not None]
    unlike = sum((c.task.name, c.variant.name) in tuned and c.seed < replicates for c in others)
    if unlike:
        raise UsageError(
            f"--study {study.name!r}: it has {unlike} runs of the same tunings that this command does not "
            "ask for (other steps, rates, rank, ..., or other numerics), and a choice among "
            "both would compare unlike runs; repeat its options, or take another --study."
        )


def find_sources(templates: Sequence[Configuration]) -> list[Source]:
    """Return the base models of configurations, and their tasks and variants in users' files."""
    models = []
    for model in dict.fromkeys(template.model for template in templates):
        path = str(Path(model.name).resolve()) if Path(model.name).is_dir() else ""
        models.append(Source(model.content, model.name, path))
    own_tasks = {t.task.content: (t.task, tasks.get(t.task.name)) for t in templates if t.task.content}
    own_variants = {t.variant.name for t in templates if t.variant.name.endswith(FILE_SUFFIX)}
    variants = [catalogue.get(name) for name in sorted(own_variants)]
    return [
        *models,
        *(
            Source(content, t.name, t.source, getattr(t, "title", ""), choice.revision, tuple(t.warnings))
            for content, (choice, t) in own_tasks.items()
        ),
        *(Source(variant.revision, variant.name, variant.source_path) for variant in variants),
    ]


def refuse_other_files(study: StudyFile, sources: Sequence[Source]) -> None:
    """Check that a study was not made from other files of the same names as those of this command.

    Two projects may each have a `train.csv`, and their studies must stay apart. Files with equal contents
    count as the same file, so that a file may be moved.

    Args:
        study: The study before this command.
        sources: The models, tasks and variants of this command; see `StudyFile.sources`.

    Raises:
        UsageError: It was.
    """
    mine = {source.name: source.path for source in sources if source.path}
    for theirs in _earlier_contents(study, sources):
        path = mine[theirs.name]
        if _place(theirs.path) != _place(path):
            raise UsageError(
                f"--study {study.name!r} has results of {theirs.path}; {path} is another file of this name: "
                "take another --study, or rename the file."
            )


def drop_replaced(
    study: StudyFile, sources: Sequence[Source], store: Store, notify: Callable[[str], None]
) -> StudyFile:
    """Return a study without the configurations that used a file whose content or data have changed.

    The results of two contents under one name must not be compared. The records stay in the store.

    Args:
        study: The study before this run.
        sources: The models, tasks and variants of this run; see `StudyFile.sources`.
        store: The store.
        notify: Called with one line for each changed file.
    """
    earlier = _earlier_contents(study, sources)
    kept = set(study.configurations)
    for source in earlier:
        used = {fingerprint for fingerprint in kept if _uses(store, fingerprint, source)}
        kept -= used
        if used:
            notify(
                f"{source.name} has changed: {len(used)} configurations of its earlier content leave the "
                "study; their records stay in the store"
            )
    others = tuple(each for each in study.sources if each not in earlier)
    return replace(study.keep(kept), sources=others)


def drop_abandoned(
    study: StudyFile, settings: AnalysisSettings, requested: Iterable[str], store: Store
) -> StudyFile:
    """Return the study without configurations that have no record and that this command does not request.

    An earlier command with other options requested them. A comparison of tuned variants and a study of
    factors have no final answer while one of their configurations has not ended, and the abandoned ones would
    never end.
    """
    if settings.kind not in PLANNED_KINDS:
        return study
    return study.keep({*requested, *store.states()})


def _earlier_contents(study: StudyFile, sources: Sequence[Source]) -> list[Source]:
    """Return the sources of a study that have another content, or other data, in this run."""
    names = {each.name for each in sources if each.path}
    present = {(each.content, each.revision) for each in sources}
    return [s for s in study.sources if s.name in names and (s.content, s.revision) not in present]


def _place(path: str) -> str:
    """Return what identifies a file or folder; for a dataset of the hub, its name."""
    return os.path.realpath(path) if os.path.isabs(path) else path


def _uses(store: Store, fingerprint: str, source: Source) -> bool:
    """Return whether a configuration was trained with `source`; True if the store has no record of it."""
    record = store.get(fingerprint)
    if record is None:
        return True  # if this run requests it, it is added again
    task = record.configuration.task
    if source.content == task.content:
        return source.revision == task.revision
    return source.content in (record.configuration.model.content, record.configuration.variant.revision)


def find_only(
    options: StudyOptions,
    study: StudyFile,
    named: Iterable[Configuration],
    templates: Sequence[Configuration],
    store: Store,
) -> list[Configuration]:
    """Return the configurations that --only names.

    Each is looked up among those that the study requests without --only, then among the recorded ones of the
    study, then among those of the study whose study.yaml --config names.

    Args:
        options: Options of the study.
        study: The study before this command.
        named: The configurations that its design or its search requests.
        templates: One configuration per task and variant.
        store: The records.

    Raises:
        UsageError: No configuration, or more than one, begins with some digits, or this command cannot
            train it.
    """
    requested = {configuration.fingerprint: configuration for configuration in named}
    places = [(list(requested), store), (study.configurations, store), *_study_of_config(options)]
    found = {}
    for digits in options.only or ():
        fingerprint, place = _find_fingerprint(digits, places, study.name)
        found[fingerprint] = requested.get(fingerprint) or _recall(fingerprint, place, templates)
    return list(found.values())


def _find_fingerprint(
    digits: str, places: Iterable[tuple[Sequence[str], Store]], name: str
) -> tuple[str, Store]:
    """Return the only fingerprint that begins with these digits, and its store."""
    seen: list[str] = []
    for fingerprints, store in places:
        matching = [fingerprint for fingerprint in fingerprints if fingerprint.startswith(digits.lower())]
        if len(matching) == 1:
            return matching[0], store
        if matching:
            length = next(
                n for n in range(SHORT_FINGERPRINT, 65) if len({f[:n] for f in matching}) == len(matching)
            )
            raise UsageError(
                f"--only {digits!r}: {len(matching)} configurations of study {name!r} begin with it; give "
                f"more digits: {_list_some(matching, length)}."
            )
        seen += fingerprints
    raise UsageError(
        f"--only {digits!r}: no configuration of study {name!r} begins with it; take one of: "
        f"{_list_some(seen, SHORT_FINGERPRINT)}."
    )


def _list_some(fingerprints: Iterable[str], length: int, most: int = 4) -> str:
    short = list(dict.fromkeys(fingerprint[:length] for fingerprint in fingerprints))
    more = f" and {len(short) - most} more" if len(short) > most else ""
    return f"{', '.join(short[:most])}{more}"


def _study_of_config(options: StudyOptions) -> Iterator[tuple[Sequence[str], Store]]:
    """Yield the fingerprints and the store of the study whose study.yaml --config names, if it is one."""
    if options.config is None:
        return
    folder = Path(os.path.abspath(options.config)).parent
    study = StudyFile.read(folder)
    if study is None:
        return
    store = (yaml.safe_load(options.config.read_text()) or {}).get("store")  # it was checked before
    root = folder.parent / DEFAULT_STORE_NAME if store is None else Path(store)
    if root.is_dir():
        yield study.configurations, Store(root, create=False)


def _recall(fingerprint: str, store: Store, templates: Sequence[Configuration]) -> Configuration:
    """Return a configuration from its record, with the names that its files have in this study.

    Raises:
        UsageError: There is no record, or this command has other data, another model or other numerics.
    """
    digits, record = fingerprint[:SHORT_FINGERPRINT], store.get(fingerprint)
    if record is None:
        raise UsageError(
            f"--only {digits}: {store.root} has no record of it, and the options do not request it; repeat "
            "the options of its study."
        )
    names = StudyFile("", "", "").with_sources(find_sources(templates))
    configuration = names.rename(record).configuration
    if _origin(configuration) not in map(_origin, templates):
        raise UsageError(
            f"--only {digits}: {configuration.variant.name} on {configuration.task.name} was trained with "
            "other data, another base model or another version of the program; repeat the options and files "
            "of its study."
        )
    return configuration


def _origin(configuration: Configuration) -> tuple[object, ...]:
    """Return what identifies the data, the base model and the code that a configuration is trained with."""
    task, variant, model = configuration.task, configuration.variant, configuration.model
    return (
        *(task.name, task.content, task.revision, task.numerics, model.content),
        *(variant.name, variant.revision, variant.numerics, configuration.loop_numerics),
    )
