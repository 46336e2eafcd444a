"""Hook of MkDocs: files outside `docs` that pages link to become part of the site; two lists become tables.

The pages are also read on git hosts, so their links to other files of the repository are relative
(`../README.md`). On the site such a file is below `repository/`: a Markdown file as a page, any other file as
a download. Links of these pages are followed in the same way. A link to a file that does not exist stays as
it is, and MkDocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from variants.__main__ import (
    AXES,
    checked_text,
    describe_all,
    form_text,
    paper_link,
    read_methods,
    value_text,
)
from variants.variant_settings import USER_AXIS

LINK = re.compile(r"(?<=\]\()[^)#\s]+")
OPTIONS = "<!-- options -->"
"""The place of the tables in options.md."""
VARIANTS, TAXONOMY = "<!-- variants -->", "<!-- taxonomy -->"
"""The places of the tables in variants.md."""
ELSEWHERE = "repository/"
"""Folder of the site for files outside `docs`."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add each file that a page, or an added page, links to and that is outside `docs`."""
    root = Path(config.docs_dir).parent
    pending = list(files.documentation_pages())
    while pending:
        page = pending.pop()
        for link in LINK.findall(Path(page.abs_src_path or "").read_text()):
            target = _target(page.src_uri, link)
            outside = not target.startswith(("docs/", "../")) and (root / target).is_file()
            if not outside or ELSEWHERE + target in files.src_uris:
                continue
            file = File.generated(config, ELSEWHERE + target, abs_src_path=str(root / target))
            files.append(file)
            if file.is_documentation_page():
                pending.append(file)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with the links that leave `docs`, or come from outside, as the site has them."""
    here = posixpath.dirname(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[0])
        on_site = target.removeprefix("docs/") if target.startswith("docs/") else ELSEWHERE + target
        return posixpath.relpath(on_site, here or ".") if on_site in files.src_uris else match[0]

    markdown = LINK.sub(rewrite, markdown)
    for mark, table in ((OPTIONS, _option_tables), (VARIANTS, _variant_tables), (TAXONOMY, _taxonomy_table)):
        markdown = markdown.replace(mark, table()) if mark in markdown else markdown
    return markdown


def _option_tables() -> str:
    """Return a table of the options of each section of the commands that train, from their fields."""
    from orchestrator.cli.commands import COMMANDS
    from orchestrator.cli.parsing import free_hyperparameters
    from orchestrator.experiments import MODULES, options_of
    from orchestrator.study.option import defaults, flag, help_texts, sections

    lines, done = [], set()
    commands = {**{name: options_of(name) for name in MODULES}, "published": COMMANDS["published"]}
    for command, options_class in commands.items():
        values, texts = defaults(options_class), help_texts(options_class)
        for title, names in sections(options_class).items():
            if title in done:
                continue
            done.add(title)
            lines += [
                "",
                f"### {title.capitalize()} options of `{command}`",
                "",
                "| option | default | meaning |",
                "| --- | --- | --- |",
            ]
            for each in (each for each in names if each not in options_class.unused):
                default = (
                    " ".join(map(str, values[each])) if isinstance(values[each], tuple) else values[each]
                )
                shown = "" if default is None or default is False or default == "" else f"`{default}`"
                lines.append(f"| `{flag(each)}` | {shown} | {texts[each].replace('|', chr(92) + '|')} |")
    lines += ["", "### Hyperparameters", "", "| option | meaning |", "| --- | --- |"]
    for name, each in free_hyperparameters(options_of("study")).items():
        lines.append(f"| `{flag(name)}` | {each.help} |")
    return "\n".join(lines)


def _variant_tables() -> str:
    """Return a table for each axis of the catalogue, without the variants of other packages."""
    header = ("variant", "what it does", "values", "lanes", "PEFT", "vLLM", "merged", "checked", "settings")
    entries = [each for each in describe_all() if each["axis"] != USER_AXIS]
    parts = []
    for axis, group in groupby(entries, lambda each: each["axis"]):
        rows = [
            (
                f"`{each['name']}`{_paper(each['paper'])}",
                each["summary"],
                "" if each["parameter_count"] is None else f"{each['parameter_count']:,}",
                each["batching"],
                *map(form_text, each["exports"].values()),
                checked_text(each),
                ", ".join(f"`{own['name']}` {value_text(own['default'])}" for own in each["hyperparameters"]),
            )
            for each in group
        ]
        parts.append(f"### {axis.capitalize()}: {AXES[axis]}\n\n{_table(header, rows)}")
    return "\n\n".join(parts)


def _taxonomy_table() -> str:
    rows = (
        (
            f"{each['axis']}: {each['leaf']}".replace("_", " "),
            each["title"] + _paper(each["paper"]),
            "trained" if each["evaluated"] else "code" if each["survey_code"] else "",
            f"`{each['variant']}`" if each["variant"] else each["reason"],
        )
        for each in read_methods()
    )
    return _table(("axis: leaf", "method", "survey", "entry, or why there is none"), rows)


def _paper(paper: str) -> str:
    link, number = paper_link(paper), paper.rpartition(" ")[2]
    return f" ([{number}]({link}))" if link else f" ({paper})" if paper else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _target(page: str, link: str) -> str:
    """Return the path, from the root of the repository, that a link of a page of the site leads to."""
    source = page.removeprefix(ELSEWHERE) if page.startswith(ELSEWHERE) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
