"""Base models of the Hugging Face hub: `organization/model`, or `organization/model@revision`.

A name is pinned to a commit when the model is first prepared, in an entry beside the other base models; every
worker loads that commit from its own cache or from the hub. If the entry is removed, the next study uses the
newest commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestrator.finetune.sources.base_store import base_entries
from orchestrator.util.errors import UsageError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


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
    """Return the commit that `name` is pinned to, and pin it to the newest one first if necessary.

    Args:
        name: The name of a hub model.
        root: The store's folder of base models.
        progress: Called with a line before the hub is asked.

    Raises:
        UsageError: The model cannot be read.
    """
    if (commit := pinned_commit(name, root)) is not None:
        return commit
    progress(f"{name}: asking the model hub")
    data = {"name": name, "commit": resolve_commit(name)}
    return base_entries(root).write_entry(_pin_key(name), data, "commit")


def resolve_commit(name: str, commit: str | None = None) -> str:
    """Ask the hub for a commit, or the local cache if the hub cannot be reached.

    config.json is downloaded, which shows at once whether the model may be read.

    Args:
        name: The name of a hub model.
        commit: The commit to look for. Default: the revision in `name`, or else the newest commit.

    Raises:
        UsageError: The model cannot be read.
    """
    repository, _, revision = name.partition("@")
    try:
        return find_commit(repository, "model", commit or revision or None)[0]
    except Exception as error:  # of many classes: no network, no such model, gated, disabled
        raise unreachable_error(name, error) from error


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


def cached_snapshot(name: str, commit: str) -> Path | None:
    """Return the local cache's folder with the files of a commit, None if it has no config.json.

    Files that have not been downloaded yet are missing in the folder.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id(name), "config.json", revision=commit)
    return Path(path).parent if isinstance(path, str) else None


def unreachable_error(name: str, error: Exception) -> UsageError:
    """Return the error that tells the user what to set after `error` has prevented reading the model."""
    return UsageError(
        f"Model {name!r} cannot be read from the model hub ({type(error).__name__}). Set HF_TOKEN if it is "
        "gated, or HF_HUB_OFFLINE=1 with the model in the local cache, or give a local folder."
    )


def _pin_key(name: str) -> str:
    return "hub-" + name.replace("/", "--")
