from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from orchestrator.record import schema


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_marked_dirty_if_a_source_differs(tmp_path):
    source = tmp_path / "orchestrator" / "__init__.py"
    source.parent.mkdir()
    source.write_text("")
    assert schema.read_commit(tmp_path) == "unknown"  # There is no repository.
    _git(tmp_path, "init", "-q")
    assert schema.read_commit(tmp_path) == "unknown"  # The repository does not track the sources.
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "start")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert schema.read_commit(tmp_path) == head
    (tmp_path / "results.csv").write_text("not a source")
    assert schema.read_commit(tmp_path) == head
    (tmp_path / "orchestrator" / "new.py").write_text("a new file counts")
    assert schema.read_commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "orchestrator" / "new.py").unlink()
    source.write_text("changed = True")
    assert schema.read_commit(tmp_path) == f"{head}-dirty"


def test_provenance_has_versions_without_importing_the_packages():
    code = (
        "import sys; from orchestrator.record.schema import current_provenance\n"
        "p = current_provenance('cpu', lane_group_size=3, workers=2, attempt=1, resumed_from=(5,),"
        " started=1.0, ended=2.0)\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "print(p.versions['torch'], p.versions['python'], p.lane_group_size, p.workers, p.attempt)\n"
        "print(p.resumed_from)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{version('torch')} {sys.version.split()[0]} 3 2 1\n(5,)"


def test_the_version_of_the_nvidia_driver_is_read_from_proc(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 11.4.0\n"
    )
    assert schema._nvidia_driver(file) == "535.104.05"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert schema._nvidia_driver(file) == "570.86.15"
    assert schema._nvidia_driver(tmp_path / "none") == ""
