"""What a command takes from earlier studies: settings that stay, files that may have changed, --only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from orchestrator.finetune.models import loading
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.designs import FixedDesign
from orchestrator.launch.study import Study
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile
from orchestrator.study.config import find_config
from orchestrator.study.configuration import Configuration
from orchestrator.study.levels import MODEL
from orchestrator.study.names import CONFIG_NAME, DEFAULT_STORE_NAME
from orchestrator.study.option import flag
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from variants import catalogue
from variants.variant_settings import FILE_SUFFIX, VerifiedBy

PLANNED_KINDS = frozenset({"replicates", "factors", "transfer"})
"""Kinds of studies whose settings are fixed before there are results."""


def fix_settings(study: Study) -> AnalysisSettings:
    """Return the settings of the analysis, after a check that they agree with earlier runs of the study.

    Raises:
        UsageError: The first run of the study had another kind, selection or margin.
    """
    file = study.file
    settings = study.experiment.settings(study.options)
    before = file.settings if file.configurations else None
    if before is not None and before.kind != settings.kind and {before.kind, settings.kind} & PLANNED_KINDS:
        raise UsageError(
            f"--study {file.name!r}: it is a study of another kind ({before.kind}, not {settings.kind}); "
            "take another --study."
        )
    if settings.kind not in PLANNED_KINDS:
        # The points of a search are not a curve over the learning rate.
        return settings if study.options.search == "grid" else replace(settings, kind="search")
    variants = dict.fromkeys(template.variant.name for template in study.templates)
    unverified = tuple(name for name in variants if catalogue.traits(name)["verified_by"] == VerifiedBy.NONE)
    found = replace(settings, unverified=unverified)
    if settings.factor == MODEL:
        models = {template.model.name: template.model for template in study.templates}
        widths = {name: loading.hidden_size(model, study.store.bases) for name, model in models.items()}
        found = replace(found, widths={**(before or found).widths, **widths})
    for name in ("select", "margin", "by", "factor"):
        option, new, then = flag(name), getattr(found, name), getattr(before or found, name)
        if new != then:
            raise UsageError(
                f"{option} {new}: study {file.name!r} began with {then}, which is fixed before there are "
                f"results; take {option} {then}, or another --study."
            )
    return found


def refuse_other_runs(study: Study) -> None:
    """Check that a comparison has no earlier runs of the same tunings that this command does not request.

    A tuning consists of the runs of one task, variant and replicate. If some of them had other settings, the
    best one would be chosen among runs that are not comparable.

    Raises:
        UsageError: The study has such runs.
    """
    asked = {c.fingerprint for c in study.requested}
    tuned = {(template.task.name, template.variant.name) for template in study.templates}
    earlier = [fingerprint for fingerprint in study.file.configurations if fingerprint not in asked]
    others = [r.configuration for fingerprint in earlier if (r := study.store.get(fingerprint)) is not None]
    replicates = study.options.replicate_count
    unlike = sum((c.task.name, c.variant.name) in tuned and c.seed < replicates for c in others)
    if unlike:
        raise UsageError(
            f"--study {study.name!r}: it has {unlike} runs of the same tunings that this command does not "
            "ask for (other steps, rates, rank, ..., or other numerics), and a choice among "
            "both would compare unlike runs; repeat its options, or take another --study."
        )


def find_sources(templates: Sequence[Configuration]) -> list[Source]:
    """Return the base models of configurations, and their tasks and variants in users' files."""
    found = []
    for model in dict.fromkeys(template.model for template in templates):
        path = str(Path(model.name).resolve()) if Path(model.name).is_dir() else ""
        found.append(Source(model.content, model.name, path))
    for choice in {t.task.content: t.task for t in templates if t.task.content}.values():
        task = tasks.get(choice.name)
        title = getattr(task, "title", "")
        found.append(
            Source(choice.content, task.name, task.source, title, choice.revision, tuple(task.warnings))
        )
    for name in sorted({t.variant.name for t in templates if t.variant.name.endswith(FILE_SUFFIX)}):
        variant = catalogue.get(name)
        found.append(Source(variant.revision, variant.name, variant.source_path))
    return found


def drop_replaced(study: Study) -> StudyFile:
    """Return the file of a study without configurations that used a file whose content or data have changed.

    The results of two contents under one name must not be compared. The records stay in the store. A file
    that was moved has the same content. A line is printed for each changed file.

    Returns:
        The file of the study, also with the sources of this run.
    """
    file, sources = study.file, find_sources(study.templates)
    names = {each.name for each in sources if each.path}
    present = {(each.content, each.revision) for each in sources}
    earlier = [s for s in file.sources if s.name in names and (s.content, s.revision) not in present]
    kept = set(file.configurations)
    for source in earlier:
        used = {fingerprint for fingerprint in kept if _uses(study.store, fingerprint, source)}
        kept -= used
        (now,) = {each.path for each in sources if each.name == source.name}
        change = "has changed" if now == source.path else f"is {now} now, not {source.path}"
        if used:
            study.console.print(
                f"{source.name} {change}: {len(used)} configurations of its earlier content leave the study; "
                "their records stay in the store"
            )
    others = tuple(each for each in file.sources if each not in earlier)
    return replace(file.keep(kept), sources=others).with_sources(sources)


def drop_abandoned(study: Study) -> StudyFile:
    """Return the study's file without configurations that an earlier command requested and did not train.

    They have no record, and this command, which has other options, does not train them either. A comparison
    of tuned variants, or a study of factors, has a final answer only when all of its configurations have
    ended. These would never end.
    """
    if study.file.settings.kind not in PLANNED_KINDS:
        return study.file
    return study.file.keep({*(c.fingerprint for c in study.requested), *study.store.states()})


def _uses(store: Store, fingerprint: str, source: Source) -> bool:
    """Return whether a configuration was trained with `source`; True if the store has no record of it."""
    record = store.get(fingerprint)
    if record is None:
        return True  # if this run requests it, it is added again
    task = record.configuration.task
    if source.content == task.content:
        return source.revision == task.revision
    return source.content in (record.configuration.model.content, record.configuration.variant.revision)


def keep_only(study: Study) -> None:
    """Reduce a study to the configurations that --only names, and look it up again.

    Each is one that the study requests without --only, or one that has a record: in this study, or in the
    study whose study.yaml --config names.

    Args:
        study: The study, after `look_up`.

    Raises:
        UsageError: No configuration, or more than one, begins with some digits, or this command cannot
            train it.
    """
    by_fingerprint = {configuration.fingerprint: configuration for configuration in study.requested}
    own = dict.fromkeys((*by_fingerprint, *study.file.configurations), study.store)
    stores = _study_of_config(study.options) | own
    found = {}
    for digits in study.options.only or ():
        matching = [fingerprint for fingerprint in stores if fingerprint.startswith(digits.lower())]
        if len(matching) != 1:
            some = ", ".join(each[:12] for each in (matching or list(stores))[:4])
            fix = f"{'give more digits' if matching else 'take one of these'}{f': {some}' if some else ''}"
            raise UsageError(
                f"--only {digits!r}: {len(matching) or 'no'} configurations of study {study.name!r} begin "
                f"with it; {fix}."
            )
        (fingerprint,) = matching
        known = by_fingerprint.get(fingerprint)
        found[fingerprint] = known or _recall(fingerprint, stores[fingerprint], study)
    study.design, study.search = FixedDesign(tuple(found.values())), None
    study.look_up()


def _study_of_config(options: StudyOptions) -> dict[str, Store]:
    """Return fingerprint -> store of the study whose study.yaml --config names, if it is one."""
    path = Path(os.path.abspath(find_config(str(options.config or ""))))
    if path.name != CONFIG_NAME or (file := StudyFile.read(path.parent)) is None:
        return {}
    store = (yaml.safe_load(path.read_text()) or {}).get("store")  # it was checked before
    root = path.parent.parent / DEFAULT_STORE_NAME if store is None else Path(store)
    return dict.fromkeys(file.configurations, Store(root, create=False)) if root.is_dir() else {}


def _recall(fingerprint: str, store: Store, study: Study) -> Configuration:
    """Return a configuration from its record, with the names that its files have in this study.

    Raises:
        UsageError: There is no record, or this command has other data, another model or other numerics.
    """
    digits, record = fingerprint[:12], store.get(fingerprint)
    if record is None:
        raise UsageError(
            f"--only {digits}: {store.root} has no record of it, and the options do not request it; repeat "
            "the options of its study."
        )
    named = study.file.with_sources(find_sources(study.templates))
    configuration = named.rename(record).configuration
    model = configuration.model
    prepared = {replace(model, content=UNPREPARED): model}  # a plan prepares no base model
    templates = [replace(each, model=prepared.get(each.model, each.model)) for each in study.templates]
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
