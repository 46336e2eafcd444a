"""JSON files with a checksum: a read returns what was written, or fails with an error in one line."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from full_disk import mounted

from orchestrator.finetune.sources import base_store
from orchestrator.record.store import Store
from orchestrator.record.study_file import STUDY_FILE, StudyFile
from orchestrator.record.tables import write_parquet
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

FULL = OSError(errno.ENOSPC, "full")


def study(folder: Path) -> tuple[Path, Callable[[], object]]:
    folder /= "s"
    StudyFile("s", "which?", "python x.py", ("a" * 64, "b" * 64)).write(folder)
    return folder / STUDY_FILE, lambda: StudyFile.read(folder)


def pointer(folder: Path) -> tuple[Path, Callable[[], object]]:
    base_store.base_entries(folder).write_entry("b", {"name": "base", "content": "0123456789ab"}, "content")
    return folder / "b.json", lambda: base_store.base_entries(folder).read_entry("b", "content")


@pytest.mark.parametrize("kind", [study, pointer])
def test_no_flipped_bit_gives_something_else(
    kind: Callable[[Path], tuple[Path, Callable[[], object]]], tmp_path: Path
) -> None:
    path, read = kind(tmp_path)
    original, expected = path.read_bytes(), read()
    noticed = 0
    for place in range(len(original)):
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << place % 8]) + original[place + 1 :])
        try:
            found = read()
        except UsageError:
            noticed += 1
            continue
        # If the flipped bit is in the key of the checksum, the content before the key is unchanged.
        assert found == expected, place
    assert noticed > 0.6 * len(original)


def test_the_checksum_covers_all_bytes_before_it() -> None:
    written = atomic_files.add_checksum('{\n "a": 1\n}\n')
    assert atomic_files.verify_checksum(written) == b'{\n "a": 1}'
    assert written.endswith(b'"}\n')
    assert written.startswith(b'{\n "a": 1,"sha256":"')
    with pytest.raises(atomic_files.DamagedFileError):
        atomic_files.verify_checksum(written.replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(atomic_files.DamagedFileError):
        atomic_files.verify_checksum(b'{"a": 1}\n')


def test_a_file_with_a_checksum_that_another_program_has_rewritten_is_refused(tmp_path: Path) -> None:
    path, read = study(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    with pytest.raises(UsageError, match="another program has rewritten it"):
        read()


@pytest.mark.parametrize("error", [TimeoutError("late"), ConnectionRefusedError(111, "no"), FULL])
def test_only_an_error_of_a_disk_gets_the_name_of_a_folder(error: OSError, tmp_path: Path) -> None:
    with (
        pytest.raises(type(error), match=str(error.args[-1])) as raised,
        atomic_files.report_unwritable_folders(tmp_path),
    ):
        raise error
    assert raised.value.filename == (str(tmp_path) if error is FULL else None)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    path.write_bytes(b"old")

    def fail(file: Path) -> None:
        file.write_bytes(b"ne")
        raise ValueError("no table")

    with pytest.raises(ValueError, match="no table"), atomic_files.replace_atomically(path) as draft:
        fail(draft)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    """The error names the folder, not the temporary file beside it, which the user does not know."""
    store = Store(tmp_path / "store")
    report, parquet = tmp_path / "report.html", store.root / "records.parquet"
    for path in (report, parquet):
        path.mkdir()
    for path, write in (
        (report, lambda: atomic_files.write_atomically(report, b"x")),
        (parquet, lambda: write_parquet(store)),
    ):
        with pytest.raises(OSError, match="Is a directory") as caught:
            write()
        assert caught.value.filename == str(path)


def test_a_study_file_of_another_study_is_refused(tmp_path: Path) -> None:
    """If two files were swapped, or one was copied, the study's name would give another study's results."""
    for name in ("a", "b"):
        StudyFile(name, "", "", (name * 64,)).write(tmp_path / name)
    (tmp_path / "a" / STUDY_FILE).write_bytes((tmp_path / "b" / STUDY_FILE).read_bytes())
    with pytest.raises(UsageError, match=r"a/study.json: .*'b'.*not 'a'.*") as caught:
        StudyFile.read(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_pointer_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    """If two files were swapped, or one was renamed, a recipe would get another recipe's base model."""
    for key, content in (("base.r1", "0123456789ab"), ("base.r2", "ba9876543210")):
        base_store.base_entries(tmp_path).write_entry(key, {"name": "base", "content": content}, "content")
    (tmp_path / "base.r2.json").write_bytes((tmp_path / "base.r1.json").read_bytes())
    with pytest.raises(UsageError, match=r"base\.r2\.json: .*base\.r1.*remove it"):
        base_store.base_entries(tmp_path).read_entry("base.r2", "content")
    assert base_store.base_entries(tmp_path).read_entry("base.r1", "content") == "0123456789ab"


def test_an_error_of_a_read_only_disk_names_the_file(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 1) as disk:
        disk.close()
        path = disk.folder / "report.html"
        with (
            pytest.raises(OSError, match="Read-only") as refused,
            atomic_files.replace_atomically(path) as draft,
        ):
            draft.write_bytes(b"x")
        assert refused.value.filename == str(path)
        with pytest.raises(OSError, match="Read-only") as refused:
            atomic_files.write_atomically(path, b"x")
        assert refused.value.filename == str(path)
