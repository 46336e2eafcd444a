"""Files with the options of a study: `--config FILE`, the study.yaml of a study, and the studies that ship.

The keys are the names of options or of hyperparameters, flat or grouped as in the sections of `--help`.
Values are read as they are written, like words of a command line: `on`, `off` and `1e-4` are text until the
option gives them a type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from orchestrator.study.configuration import HYPERPARAMETERS
from orchestrator.study.expected import read_entry
from orchestrator.study.names import CONFIG_NAME
from orchestrator.study.option import Options, convert, defaults, find_option, flag, sections
from orchestrator.study.space import parse_value, setting_key
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import with_full_path
from variants.variant_settings import FILE_SUFFIX, canonical_name

SHIPPED_FOLDER = Path(__file__).parents[1] / "published"
"""Folder of the studies that come with the program: NAME.yaml."""
EXPERIMENT = "experiment"
"""The key with the experiment of a study."""
EXPECTED = "expected"
"""The key with the published numbers of a study."""
_PROTOCOL_SECTIONS = ("grid", "data", "training")
_DESIGN = {"variants", "learning_rates", "seeds", "select", "accumulation", "gradient_checkpointing"}
"""Options of these sections that do not change what a published number is about."""
_NULL = "tag:yaml.org,2002:null"
_OPTION = re.compile(r"--([a-z][a-z0-9-]*)")
_Options = TypeVar("_Options", bound=Options)


@dataclass(frozen=True)
class ConfigFile:
    """The options in a file."""

    path: Path
    values: dict[str, Any]
    """Option -> value, with the type of the option."""
    lines: dict[str, int]
    """Option -> line of its key, from 1."""

    def locate(self, error: UsageError, typed: Collection[str]) -> UsageError:
        """Add this file and a line to an error about an option whose value comes from the file.

        Args:
            error: The error.
            typed: The options that replace those of the file.

        Returns:
            The error with file and line, or `error` itself if it names no option of the file.
        """
        for found in _OPTION.findall(str(error)):
            name = found.replace("-", "_")
            if name in self.lines and name not in typed:
                return UsageError(f"{self.path}, line {self.lines[name]}: {error}")
        return error


def shipped_studies() -> dict[str, Path]:
    """Return the studies that come with the program: name -> file."""
    return {path.stem: path for path in sorted(SHIPPED_FOLDER.glob("*.yaml"))}


OptionsOf = Callable[[str], type[Options]]


def make_options(
    options_class: type[_Options],
    typed: Mapping[str, Any],
    experiment: str = "",
    options_of: OptionsOf | None = None,
) -> tuple[_Options, ConfigFile | None]:
    """Make options from typed values, over those of the file that the option `config` names.

    Without `config`, a study whose task, data and model are not typed takes the class's `default_config`.
    If a typed option changes the protocol of a file, its published numbers do not apply any more.

    Args:
        options_class: Class of the options.
        typed: Option or hyperparameter -> value. A hyperparameter without an option of its own, such as
            `weight_decay`, becomes a word of `set`.
        experiment: The experiment that is run.
        options_of: Returns the class of the options of an experiment, for a file of another one. Such a file
            gives the options that both use, except the study's name.

    Returns:
        The options, and the file or None.

    Raises:
        UsageError: An option is unknown or has a wrong value, or the file cannot be read.
    """
    names = {find_option(key, options_class, HYPERPARAMETERS): value for key, value in typed.items()}
    checked = {name: _check(options_class, name, value, flag(name)) for name, value in names.items()}
    values = _fold_hyperparameters(options_class, checked)
    if options_class.default_config and not any(map(values.get, ("config", *options_class.own_protocol))):
        values["config"] = Path(options_class.default_config)
    if values.get("config") is None:
        return options_class(**values), None
    file = read_config(str(values["config"]), options_class, experiment, options_of)
    merged = _merge(options_class, file.values, values)
    if EXPECTED in file.values and EXPECTED not in names:
        changes = _changes(options_class, file.values, values)
        merged[EXPECTED] = tuple(replace(e, untested=e.untested or changes) for e in merged[EXPECTED])
    try:
        return options_class(**merged), file
    except UsageError as error:
        raise file.locate(error, names) from None


def _changes(options_class: type[Options], file: Mapping[str, Any], typed: Mapping[str, Any]) -> str:
    """Return the typed options that change the protocol of a file, in words; empty if none does."""
    usual, titles = defaults(options_class), sections(options_class)
    protocol = {name for title in _PROTOCOL_SECTIONS for name in titles.get(title, ())} - _DESIGN
    found = []
    for name in typed.keys() & protocol:
        before, now = file.get(name, usual[name]), typed[name]
        if isinstance(now, tuple) and options_class.declared()[name].is_pairs:
            before, now = (), tuple(word for word in now if word not in before)
        if before != now:
            shown = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (now, before)]
            found.append(f"{flag(name)} {shown[0]}" + (f" in place of {shown[1]}" if before else ""))
    return ", ".join(sorted(found))


def _fold_hyperparameters(options_class: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Write hyperparameters without an option of their own as words of `set`."""
    options = defaults(options_class)
    folded = {name: value for name, value in values.items() if name in options}
    words = [f"{name}={value}" for name, value in values.items() if name not in options]
    return folded | ({"set": (*folded.get("set", ()), *words)} if words else {})


def _check(options_class: type[Options], name: str, value: object, label: str) -> Any:
    """Return the value of an option with its type, or that of a hyperparameter as it is."""
    if name in defaults(options_class):
        return convert(options_class, name, value, label)
    try:
        parse_value(HYPERPARAMETERS[name], str(value))
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from None
    return value


def _merge(options_class: type[Options], file: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file with the typed ones before them.

    A typed value replaces the same option, its rival, and what sets the same hyperparameter. Typed words
    NAME=VALUE are added to those of the file. Words for variants that are not typed are left out, and so are
    options that have no meaning any more.
    """
    facts = options_class.declared()
    pairs = [name for name in {*file, *typed} if facts[name].is_pairs]
    added = {name: typed[name] or () for name in pairs if name in typed}
    rivals = {facts[name].rival for name in typed}
    keys = {sets for name in typed if (sets := facts[name].sets)}
    keys |= {setting_key(word) for words in added.values() for word in words}
    variants = typed.get("variants") or ()
    owners = {"", *map(canonical_name, variants), *options_class.always}
    result = {
        name: value
        for name, value in file.items()
        if name not in rivals and facts[name].rival not in typed and facts[name].sets not in keys
    } | dict(typed)
    for name in pairs:
        kept = [word for word in file.get(name) or () if setting_key(word) not in keys]
        if variants:
            kept = [word for word in kept if setting_key(word).rpartition(".")[0] in owners]
        result[name] = (*kept, *added.get(name, ()))
    usual = defaults(options_class)
    absent = {name for name in usual if result.get(name, usual[name]) in (usual[name], None, ())}
    return {
        name: value
        for name, value in result.items()
        if name in typed or (value != () and facts[name].needs not in absent)
    }


def read_config(
    name: str, options_class: type[Options], experiment: str = "", options_of: OptionsOf | None = None
) -> ConfigFile:
    """Read a file of options.

    Args:
        name: The file, or the name of a study that comes with the program.
        options_class: Class of the options.
        experiment: See `make_options`.
        options_of: See `make_options`.

    Raises:
        UsageError: The file cannot be read, is no YAML, or has an option that is unknown, of another type or
            given twice. The error names the file and the line.
    """
    path = find_config(name)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    line, written_for = 1, options_class
    entries = list(_entries(_compose(path), path, sections(options_class)))
    entries.sort(key=lambda entry: entry[0].value != EXPERIMENT)  # it says which options there are
    try:
        for key, node in entries:
            line, option = key.start_mark.line + 1, key.value
            if option != EXPERIMENT:
                option = find_option(option, written_for, HYPERPARAMETERS)
            if option in lines:
                raise UsageError(f"{option} is in line {lines[option]} already; take one of the two away.")
            lines[option] = line
            if option == "config":
                raise UsageError("config: a file cannot name another one; leave it out.")
            if option == EXPERIMENT:
                if options_of is not None and node.value != experiment:
                    written_for = options_of(str(_plain(node)))
                continue
            if option == EXPECTED and isinstance(node, yaml.SequenceNode):
                values[option] = ()
                for entry in node.value:
                    line = entry.start_mark.line + 1
                    values[option] += tuple(read_entry(_plain(entry), path.parent))
                continue
            values[option] = _check(written_for, option, _plain(node), option)
    except UsageError as error:
        raise UsageError(f"{path}, line {line}: {error}") from None
    values = _fold_hyperparameters(written_for, values)
    folder = path.parent if path.parent.name not in ("", "..") else Path(os.path.abspath(path)).parent
    # The file of a study, whose folder may have been moved.
    if path.name == CONFIG_NAME and (folder / "study.json").exists():
        values = {"study": folder.name, "output": folder.parent, **values}
    if written_for is not options_class:
        shared = defaults(options_class).keys() - {"study", *options_class.unused}
        values = {name: value for name, value in values.items() if name in shared}
    return ConfigFile(path, values, lines)


def find_config(name: str) -> Path:
    """Return the file that --config names; the study of this name that comes with the program, if any."""
    is_file = os.path.exists(name) and not os.path.isdir(name)
    return Path(name) if is_file else shipped_studies().get(name, Path(name))


def _compose(path: Path) -> Any:
    """Return the root node of a YAML file, whose nodes know their lines."""
    try:
        is_special = os.path.exists(path) and not path.is_file() and not path.is_dir()
        # A shell writes `--config <(command)` as a path in one of the two folders.
        is_open = path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) or path == Path("/dev/stdin")
        if is_special and not is_open:
            raise UsageError(f"--config {str(path)!r}: is a pipe or a device; name a YAML file.")
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        others = [*map(str, path.parent.glob("*.yaml")), *shipped_studies()]
        hint = suggest_nearest(str(path), others, "Name a YAML file.")
        raise UsageError(f"--config {str(path)!r}: {error.strerror}. {hint}") from None
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(problem or error).split())
        raise UsageError(f"{path}{where}: not YAML ({reason}); write one NAME: VALUE a line.") from None


def _entries(root: Any, path: Path, titles: Collection[str]) -> Iterator[tuple[Any, Any]]:
    """Yield the nodes of each key and its value, with the groups of these titles flattened."""
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line {root.start_mark.line + 1}: must be NAME: VALUE, as in `rank: 16`.")
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{path}, line {key.start_mark.line + 1}: a key must be the name of an option.")
        is_group = key.value.removesuffix(" options") in titles
        if is_group and isinstance(value, yaml.MappingNode):
            yield from _entries(value, path, ())  # a group holds no group, not even itself
        elif not (is_group and value.tag == _NULL):  # a group without any option has the value null
            yield key, value


def _plain(node: Any) -> Any:
    """Return a node as text, None, or a list or mapping of texts.

    Raises:
        UsageError: Lists or mappings are inside others, or a mapping has a key twice.
    """
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
    if not all(isinstance(each, yaml.ScalarNode) for each in nodes):
        raise UsageError(f"a list inside a list (line {node.start_mark.line + 1}); write plain words.")
    if isinstance(node, yaml.SequenceNode):
        return [each.value for each in nodes]
    values = {key.value: value.value for key, value in node.value}
    if len(values) < len(node.value):
        raise UsageError("a key of the mapping occurs twice; name it once.")
    return values


def write_config(
    folder: Path, experiment: str, options: Options, comment: str, built_in_models: Collection[str] = ()
) -> None:
    """Write study.yaml into the folder of a study: all options that differ from their defaults.

    Files and folders are written with their full paths, so that the file repeats the study from any folder.
    An option with a secret is left out, with a comment.

    Args:
        folder: The folder of the study.
        experiment: The experiment of the study.
        options: Its options.
        comment: The first line.
        built_in_models: Names of base models, which are no folders even if there are folders of these names.
    """
    values: dict[str, Any] = {}
    lines = [f"# {comment}"]
    given = options.given()
    ordered = [name for names in sections(type(options)).values() for name in names if name in given]
    for name, value in ((name, given[name]) for name in ordered):
        if redact_secrets(str(value)) != str(value):
            lines.append(f"# {name} is left out, because it holds a secret.")
        elif name == EXPECTED:
            continue
        elif options.declared()[name].saved:
            values[name] = _full_paths(type(options), name, value, built_in_models)
    for name, value in {EXPERIMENT: experiment, **values}.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        lines.append(f"{name}: {text.removesuffix('...' + chr(10)).strip()}")
    if EXPECTED in given:
        entries = [each.to_entry() for each in given[EXPECTED]]
        texts = (yaml.safe_dump(e, default_flow_style=True, width=10_000, sort_keys=False) for e in entries)
        lines += [f"{EXPECTED}:", *(f"- {text.strip()}" for text in texts)]
    atomic_files.write_atomically(folder / CONFIG_NAME, "\n".join([*lines, ""]).encode())


def _full_paths(options_class: type[Options], name: str, value: Any, names: Collection[str] = ()) -> Any:
    """Return a value with full paths in place of files and folders other than `names`, for YAML."""
    if isinstance(value, tuple):
        return [_full_paths(options_class, name, word, names) for word in value]
    is_name = name in ("model", "levels") and (value in names or str(value).isdecimal())
    if is_name or not isinstance(value, (str, Path)):
        return value
    word = str(value)
    if name == "tracking_uri":
        return with_full_path(word)
    may_be_path = options_class.declared()[name].paths or word.endswith((FILE_SUFFIX, ".toml"))
    return os.path.abspath(word) if may_be_path and os.path.exists(word) else word
