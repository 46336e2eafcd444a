"""A small file system that a test can fill or make read-only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

LINUX = sys.platform == "linux"


class Disk:
    """A file system at `folder`, which a file can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = 1

    def fill(self) -> None:
        with (self.folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        assert shutil.disk_usage(self.folder).free == 0

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def close(self) -> None:
        """Mount an empty read-only file system over this one."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(self.folder)], check=True)
        self.mounts += 1


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Disk]:
    """Mount a disk of this size at the new folder `folder`. Skip the test if mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if LINUX else None
    if done is None or done.returncode:
        why = "needs the right to mount a file system, as root has on Linux"
        # pytest prints warnings even where it does not print the reasons of skipped tests.
        warnings.warn(f"a full disk is not tested here: {why} ({done.stderr if done else ''})", stacklevel=2)
        pytest.skip(why)
    disk = Disk(folder)
    try:
        yield disk
    finally:
        # The file system is detached lazily, because checkpoints that were read are still mapped into memory.
        for _ in range(disk.mounts):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
