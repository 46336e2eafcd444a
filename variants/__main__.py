"""The catalogue of variants: what each one computes, and what it was checked against.

python -m variants                  # all entries by axis
python -m variants lora_plus        # one entry: equation, hyperparameters, an example
python -m variants peft:LOHA        # a tuner of the PEFT library; likewise ./my_variant.py, a file of yours
python -m variants --taxonomy       # the survey's methods, with the reason where one has no entry
python -m variants --json           # all entries for programs (also with a name or --taxonomy)
python -m variants --write-docs     # the tables of docs/variants.md, from the same source
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from variants.variant_names import FILE_SUFFIX, canonical_name

EXIT_USAGE = 2
"""Exit code for a name that does not exist, and for options that exclude each other."""


@dataclass(frozen=True)
class Arguments:
    """What is printed."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """The entry, tuner (peft:TYPE) or .py file to explain; without it the whole catalogue is listed."""
    taxonomy: bool = False
    """List the methods of the survey, of its code and of the PEFT library."""
    json: bool = False
    """Print JSON: an object for an entry, a list of objects otherwise."""
    write_docs: bool = False
    """Write the tables of docs/variants.md again. Only in a checkout of the repository."""


def main(words: Sequence[str]) -> int:
    """Run the command line `words`, and return the exit code."""
    arguments = tyro.cli(
        Arguments,
        args=list(words),
        prog="python -m variants",
        description="\n".join(f" {line}" for line in (__doc__ or "").strip().splitlines()),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        text = _text(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `python -m variants | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _text(arguments: Arguments) -> str:
    """Return what a command prints.

    Raises:
        ValueError: There is no entry of the given name, or the options exclude each other.
    """
    if sum((bool(arguments.name), arguments.taxonomy, arguments.write_docs)) > 1:
        raise ValueError("a name, --taxonomy and --write-docs exclude each other")
    if arguments.taxonomy:
        from variants.describe_text import format_taxonomy
        from variants.taxonomy import read_methods

        methods = read_methods()
        return _to_json(list(methods)) if arguments.json else format_taxonomy(methods)
    if arguments.write_docs:
        from variants.describe_docs import write_docs

        return write_docs()
    from variants import catalogue
    from variants.describe import describe, describe_all
    from variants.describe_text import format_catalogue, format_entry

    if not arguments.name:
        entries = describe_all()
        return _to_json(entries) if arguments.json else format_catalogue(entries)
    if arguments.name.endswith(FILE_SUFFIX):
        catalogue.load(arguments.name)
    entry = describe(canonical_name(arguments.name))
    return _to_json(entry) if arguments.json else format_entry(entry)


def _to_json(found: object) -> str:
    """Return a dataclass, or a list of dataclasses, as JSON."""
    values = [asdict(each) for each in found] if isinstance(found, list) else asdict(found)  # type: ignore[call-overload]
    return json.dumps(values, indent=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
