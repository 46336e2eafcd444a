"""The catalogue of variants: what each one computes, and what it was checked against.

python -m variants                  # all entries by axis
python -m variants lora_plus        # one entry: equation, hyperparameters, an example
python -m variants peft:LOHA        # a tuner of the PEFT library; likewise ./my_variant.py, a file of yours
python -m variants --taxonomy       # the survey's methods, with the reason where one has no entry
python -m variants --json           # all entries for programs (also with a name or --taxonomy)
python -m variants --write-docs     # the tables of docs/variants.md, from the same source
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from variants.variant_names import FILE_SUFFIX, canonical_name

EXIT_USAGE = 2
"""Exit code for a name that does not exist, and for options that exclude each other."""


def main(words: Sequence[str]) -> int:
    """Run the command line `words`, and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m variants", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help="the entry, tuner (peft:TYPE) or .py file to explain; without it the whole catalogue is listed",
    )
    for option, text in (
        ("--taxonomy", "list the methods of the survey, of its code and of the PEFT library"),
        ("--json", "print JSON: an object for an entry, a list of objects otherwise"),
        ("--write-docs", "write the tables of docs/variants.md again; only in a checkout of the repository"),
    ):
        parser.add_argument(option, action="store_true", help=text)
    arguments = parser.parse_args(words)
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


def _text(arguments: argparse.Namespace) -> str:
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
