"""Titles of the user's tasks in reports: a file's name says little, and the same task may have had others."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

_MAX_LENGTH = 60  # characters; a longer title would not fit above a plot


def entitle(study: StudyFile, records: Iterable[Record]) -> list[Record]:
    """Return records with the names that a reader of the study's report sees.

    A task of the user has its title as its name. If another task of the study would have the same name, the
    name of the file is added. Other names are those of the study, see `StudyFile.rename`.

    Args:
        study: The study, which has the titles.
        records: Records of the study.
    """
    renamed = [study.rename(record) for record in records]
    titles = {
        source.content: textwrap.shorten(source.title, _MAX_LENGTH, placeholder=" ...")
        for source in study.sources
        if source.title
    }
    names = {(task.content, task.name) for record in renamed if (task := record.configuration.task)}
    counts = Counter(titles.get(content, name) for content, name in names)

    def named(record: Record) -> Record:
        task = record.configuration.task
        title = titles.get(task.content) if task.content else None
        if title is None or title == task.name:
            return record
        shown = title if counts[title] == 1 else f"{title} ({task.name})"
        return replace(record, configuration=replace(record.configuration, task=replace(task, name=shown)))

    return [named(record) for record in renamed]
