"""`--config study.yaml`: the options of a study from a YAML file, and the file that repeats a study.

The keys are the names of options, flat or grouped as in the sections of `--help`. Values are read as they are
written, like words of a command line: `on`, `off` and `1e-4` are text until the option gives them a type.
Values from Python are converted in the same way, with errors that name the option and the rule.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from orchestrator.study.options import StudyOptions
from orchestrator.study.presets import preset_defaults
from orchestrator.study.study_name import CONFIG_NAME
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import with_full_path
from variants.variant_names import FILE_SUFFIX

PATH_OPTIONS = ("data", "validation_data", "test_data", "model", "output", "store")
"""Options whose words may be files or folders."""
UNSAVED = ("config", "output", "only", "plan", "plan_gpu", "price_per_hour", "retry_failed")
"""Options that concern one run, and the output folder, which is that of the study's folder."""
CODE_OPTIONS = ("task", "variants")
"""Options whose words are files if they end in .py, and names otherwise."""
_NULL = "tag:yaml.org,2002:null"
_OPTION = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True)
class ConfigFile:
    """The options in a file."""

    path: Path
    values: dict[str, Any]
    """Field -> value, with the type of the field."""
    lines: dict[str, int]
    """Field -> line of its key, from 1."""

    def locate(self, error: UsageError, words: Sequence[str]) -> UsageError:
        """Add this file and a line to an error about an option whose value comes from the file.

        Args:
            error: The error.
            words: The words of the command line, whose options replace those of the file.

        Returns:
            The error with file and line, or `error` itself if it names no option of the file.
        """
        typed = {word.partition("=")[0].replace("_", "-") for word in words}
        for name in _OPTION.findall(str(error)):
            line = self.lines.get(name.replace("-", "_"))
            if line is not None and f"--{name}" not in typed:
                return UsageError(f"{self.path}, line {line}: {error}")
        return error


def group_title(group: type[Any]) -> str:
    """Return the title of a group of options: "grid" for `GridOptions`."""
    return group.__name__.removesuffix("Options").lower()


def option_groups(options_class: type[StudyOptions]) -> list[type[Any]]:
    """Return the groups of options: the dataclasses among the bases, in the order of `--help`."""
    bases = options_class.__mro__
    return [each for each in bases if is_dataclass(each) and not issubclass(each, StudyOptions)]


def read_config(path: Path, options_class: type[StudyOptions]) -> ConfigFile:
    """Read a file of options.

    Args:
        path: The file.
        options_class: Class of the options.

    Raises:
        UsageError: The file cannot be read, is no YAML, or has an option that is unknown, of another type or
            given twice. The error names the file and the line.
    """
    try:
        is_special = os.path.exists(path) and not path.is_file() and not path.is_dir()
        # A shell writes `--config <(command)` as a path in one of the two folders.
        is_open = path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) or path == Path("/dev/stdin")
        if is_special and not is_open:
            raise UsageError(f"--config {str(path)!r}: is a pipe or a device; name a YAML file.")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        others = path.parent.glob("*.yaml") if isinstance(error, FileNotFoundError) else ()
        hint = suggest_nearest(str(path), map(str, others), "Name a YAML file.")
        raise UsageError(f"--config {str(path)!r}: {error.strerror}. {hint}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text in UTF-8; name a YAML file.") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(problem or error).split())
        raise UsageError(f"{path}{where}: not YAML ({reason}); write one NAME: VALUE a line.") from None
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    titles = {group_title(group) for group in option_groups(options_class)}
    for key, node in _entries(root, path, titles):
        line = key.start_mark.line + 1
        try:
            name = field_name(key.value, options_class)
            if name == "config":
                raise UsageError("config: a file cannot name another one; leave it out.")
            if name in lines:
                raise UsageError(f"{name} is in line {lines[name]} already; take one of the two away.")
            values[name], lines[name] = convert(name, _plain(node), options_class), line
        except UsageError as error:
            raise UsageError(f"{path}, line {line}: {error}") from None
    if (path.parent / "study.json").exists():  # the file is that of a study, whose folder may have moved
        values = {"study": path.parent.name, "output": path.parent.parent, **values}
    return ConfigFile(path, values, lines)


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
        UsageError: Lists or mappings are inside others.
    """
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
    if not all(isinstance(each, yaml.ScalarNode) for each in nodes):
        raise UsageError(f"a list inside a list (line {node.start_mark.line + 1}); write plain words.")
    if isinstance(node, yaml.SequenceNode):
        return [each.value for each in nodes]
    return {key.value: value.value for key, value in node.value}


def write_config(
    folder: Path, command: str, given: Mapping[str, Any], built_in_models: Collection[str] = ()
) -> None:
    """Write the file that repeats a study into its folder.

    Files and folders are written with their full paths, so that the file repeats the study from any folder.
    An option with a secret is left out, with a comment.

    Args:
        folder: The folder of the study.
        command: The command that continues the study by this file.
        given: The options of the command that differ from their defaults: field -> value.
        built_in_models: Names of base models, which are no folders even if there are folders of these names.
    """
    values = {
        name: value if name == "model" and value in built_in_models else _writable(name, value)
        for name, value in given.items()
        if name not in UNSAVED
    }
    secret = [name for name, value in values.items() if redact_secrets(str(value)) != str(value)]
    shown = {name: value for name, value in values.items() if name not in secret}
    text = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=10_000, allow_unicode=True)
    lines = [f"# The options of this study. To go on: {command}"]
    lines += [f"# {name} is left out, because it holds a secret." for name in secret]
    atomic_files.write_atomically(folder / CONFIG_NAME, "\n".join([*lines, text if shown else ""]).encode())


def _writable(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_full_path(name, str(each)) for each in value]
    return _full_path(name, str(value)) if isinstance(value, (str, Path)) else value


def _full_path(name: str, word: str) -> str:
    """Return the full path of a file or folder that an option names, any other word as it is."""
    if name == "tracking_uri":
        return with_full_path(word)
    may_be_path = name in PATH_OPTIONS or (name in CODE_OPTIONS and word.endswith(FILE_SUFFIX))
    return os.path.abspath(word) if may_be_path and os.path.exists(word) else word


def given_values(options: StudyOptions, existing: Collection[str]) -> dict[str, Any]:
    """Return the options that differ from their defaults: field -> value.

    The defaults are those of the class, or those of the preset if one is chosen. An option that is None is
    left out. A command with the result as its options has the same options.

    Args:
        options: The options.
        existing: Names of this project's variants.
    """
    defaults = {each.name: getattr(type(options)(), each.name) for each in fields(options)}
    if options.preset is not None:
        defaults |= {**preset_defaults(options.preset, type(options), existing), "preset": None}
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: value for name, value in values.items() if value is not None and value != defaults[name]}


def option_words(values: Mapping[str, Any]) -> list[str]:
    """Return options (field -> value) as words of a command: `--learning-rates 1e-4 1e-3`."""
    words: list[str] = []
    for name, value in values.items():
        words.append(option_flag(name))
        if isinstance(value, tuple):
            words += map(str, value)
        elif not isinstance(value, bool):
            words.append(str(value))
    return words


def option_flag(name: str) -> str:
    """Return the option of a field: `learning_rates` -> `--learning-rates`."""
    return f"--{name.replace('_', '-')}"


LISTS = ("variants", "task", "learning_rates", "factors", "tracker", "only")
"""Options that accept several words in one, separated by commas."""
PAIRS = ("set", "space", "columns")
"""Options of NAME=VALUE words, which a file or Python may give as a mapping."""
_RULES = {int: "must be a whole number", float: "must be a number", bool: "must be true or false"}


def field_name(key: str, options_class: type[Any]) -> str:
    """Return the name of the field of an option.

    Args:
        key: The option in any spelling: `learning-rates`, `--learning_rates`.
        options_class: The class of the options.

    Raises:
        UsageError: There is no such option; the error names the nearest one.
    """
    name = key.removeprefix("--").replace("-", "_")
    names = {each.name for each in fields(options_class)}
    if name in names:
        return name
    raise UsageError(f"{quote_value(key)} is no option here. {suggest_nearest(name, names)}")


def convert(name: str, value: object, options_class: type[Any]) -> Any:
    """Return the value of an option with the type of its field.

    Args:
        name: Name of the field.
        value: Text, a number, a truth value, None, a path, or a list of them; for NAME=VALUE words also a
            mapping.
        options_class: Class of the options.

    Raises:
        UsageError: The value has another type.
    """
    import pydantic

    annotation = get_type_hints(options_class)[name]
    if isinstance(value, Mapping) and name in PAIRS:
        value = [f"{key}={each}" for key, each in value.items()]
    accepted = _accepted(annotation)
    if any(get_origin(each) is tuple for each in accepted):
        words = [value] if isinstance(value, (str, int, float, os.PathLike)) else value
        value = [_text(word) for word in words] if isinstance(words, (list, tuple)) else words
    elif str in accepted and not isinstance(value, bool):
        value = _text(value)
    if value == "" and Path in accepted:
        raise UsageError(f"{name} is empty; name a path, or leave it out.")
    try:
        return pydantic.TypeAdapter(annotation).validate_python(value)
    except pydantic.ValidationError:
        shown = f"{name} has no value;" if value is None else f"{name}: {quote_value(str(value))}"
        raise UsageError(f"{shown} {_rule(name, accepted)}.") from None


def split_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options (field -> value) in which a word such as `lora,dora` is split at its commas.

    This concerns the options in `LISTS`. A word that is the path of a file is not split.
    """
    return {
        name: tuple(part for word in value for part in _split(word))
        if name in LISTS and isinstance(value, tuple)
        else value
        for name, value in values.items()
    }


def _split(word: str) -> list[str]:
    if "," not in word or os.path.exists(word):
        return [word]
    return [part.strip() for part in word.split(",") if part.strip()]


def _accepted(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type that is none."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _text(value: object) -> object:
    """Return a number or a path as a word of a command line; any other value as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, os.PathLike) else value


def _rule(name: str, accepted: tuple[Any, ...]) -> str:
    if name in PAIRS:
        return "must be a list of NAME=VALUE, or a mapping"
    for each in accepted:
        if get_origin(each) is tuple:
            return "must be a list of words"
        if get_origin(each) is Literal:
            return f"must be one of: {', '.join(map(str, get_args(each)))}"
        if each in _RULES:
            return _RULES[each]
    return "must be one word"
