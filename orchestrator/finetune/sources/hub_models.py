"""Base models of the Hugging Face hub: `organisation/model`, or `organisation/model@revision`.

The name is pinned to a commit the first time it is prepared, in a file beside the other bases; every worker
loads that commit from its own cache or from the hub. Remove the file to move on to a newer commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from orchestrator.finetune.sources.base_store import read_pointer, write_pointer
from orchestrator.util.errors import UsageError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


def repo_id(name: str) -> str:
    return name.partition("@")[0]


def pinned_commit(name: str, root: Path) -> str | None:
    """The commit that `name` is pinned to in this store."""
    return read_pointer(root, _pin_key(name), "commit")


def pin(name: str, root: Path, progress: Callable[[str], None]) -> str:
    """Asks for the commit and keeps it. Raises BadInput when the model may not be read."""
    if (commit := pinned_commit(name, root)) is not None:
        return commit
    progress(f"{name}: asking the model hub")
    return write_pointer(root, _pin_key(name), {"name": name, "commit": resolve_commit(name)}, "commit")


def resolve_commit(name: str, commit: str | None = None) -> str:
    """Asks the hub, or its local cache when the hub is out of reach, for the commit (or whether it has this
    one). Fetching config.json shows at once whether the model may be read. Raises BadInput when it may not.
    """
    repository, _, revision = name.partition("@")
    wanted = commit or revision or None
    try:
        return _fetch_commit(repository, wanted)
    except Exception as error:  # of many kinds: no network, no such model, gated, switched off
        found = _cached_commit(repository, wanted)
        if found is None:
            raise unreachable_error(name, error) from error
        return found


def _fetch_commit(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, hf_hub_download

    # model_info is tried once; a download without a network is tried six times in 23 s.
    commit = HfApi().model_info(repository, revision=revision, timeout=10).sha
    assert commit is not None
    hf_hub_download(repository, "config.json", revision=commit)
    return commit


def _cached_commit(repository: str, revision: str | None) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = hf_hub_download(repository, "config.json", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(path).parent.name  # the cache keeps a commit's files in snapshots/<commit>/


def cached_snapshot(name: str, commit: str) -> Path | None:
    """Return the folder of the local cache with this commit's files, None where config.json is not in it.

    Files that were not downloaded yet are missing there.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id(name), "config.json", revision=commit)
    return Path(path).parent if isinstance(path, str) else None


def unreachable_error(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"Model {name!r} cannot be read from the model hub ({type(error).__name__}). Set HF_TOKEN if it is "
        "gated, or HF_HUB_OFFLINE=1 with the model in the local cache, or give a local folder."
    )


def _pin_key(name: str) -> str:
    return "hub-" + name.replace("/", "--")
