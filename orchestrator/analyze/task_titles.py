"""The titles of users' tasks, which reports show in place of file names."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

_MAX_LENGTH = 60  # characters; a longer title would not fit above a plot


def entitle(study: StudyFile, records: Iterable[Record]) -> list[Record]:
    """Return copies of records with the names that the study's report shows.

    A task in a user's file gets its title as its name; if two tasks would have the same name, the name of the
    file is added. All other names are those of `StudyFile.rename`.

    Args:
        study: The study, whose `sources` have the titles.
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
