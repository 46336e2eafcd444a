"""Files of other users in the temporary folder of a machine are not trusted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.execution.ray import cleanup, runtime
from orchestrator.util.errors import UsageError

NOBODY = 65534


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a temporary folder that only this test uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def list_of(process: subprocess.Popen[bytes]) -> str:
    """Return the process list of a dead driver, with `process` as its Ray."""
    with subprocess.Popen(["true"]) as driver:
        driver.wait()
    known = json.loads(cleanup.serialize_processes([psutil.Process(process.pid)] * 2))
    known["processes"][0] = (driver.pid, 0.0)
    return json.dumps(known)


def another_users(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("not root: cannot make a file that belongs to another user")
    os.chown(path, NOBODY, NOBODY)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def writable(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize("plant", [another_users, writable, linked])
def test_a_list_of_processes_that_another_user_may_have_written_ends_none(
    temporary: Path, sleeper: subprocess.Popen[bytes], plant: Callable[[Path], None]
) -> None:
    folder = temporary / f"lora-orchestrator-{os.getuid()}"
    folder.mkdir(mode=0o700)
    (folder / "1.json").write_text(list_of(sleeper))
    plant(folder)
    with pytest.raises(UsageError) as refused:
        cleanup.end_orphaned_rays()
    message = str(refused.value)
    assert message.startswith(f"{folder} is not a folder that only you can write to (")
    assert message.endswith("; remove it, or set TMPDIR to a folder of your own.")
    assert "\n" not in message
    assert sleeper.poll() is None
    assert (folder / "1.json").exists()


def test_the_processes_in_a_users_own_list_are_ended(
    temporary: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = temporary / f"lora-orchestrator-{os.getuid()}"
    assert cleanup.state_folder() == folder
    folder.mkdir(mode=0o700)
    (folder / "1.json").write_text(list_of(sleeper))
    cleanup.end_orphaned_rays()
    sleeper.wait()
    assert list(folder.iterdir()) == []


def test_a_list_that_is_written_again_stays_whole_for_its_readers(
    temporary: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    def listed(text: str) -> set[int]:
        return {number for number, _ in json.loads(text)["processes"]}

    cleanup.state_folder().mkdir(mode=0o700)
    cleanup.record_processes()
    (file,) = cleanup.state_folder().iterdir()
    with file.open() as reader:
        cleanup.record_processes([psutil.Process(sleeper.pid)])
        assert {os.getpid(), sleeper.pid} <= listed(reader.read())
    assert os.getpid() in listed(file.read_text())
    assert sleeper.pid not in listed(file.read_text())
    assert list(cleanup.state_folder().iterdir()) == [file]


def test_a_cluster_that_another_user_has_announced_is_not_joined_unasked(temporary: Path) -> None:
    address_file = temporary / "ray" / "ray_current_cluster"
    address_file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        address_file.write_text(where)
        assert runtime.running_cluster_address() == where
        another_users(address_file)
        with pytest.raises(UsageError) as refused:
            runtime.running_cluster_address()
    assert f"RAY_ADDRESS={where}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert runtime.running_cluster_address() is None, "one that does not answer is ignored"


def pipe(address_file: Path) -> None:
    os.mkfifo(address_file)


def link(address_file: Path) -> None:
    address_file.with_name("elsewhere").write_text("127.0.0.1:1")
    address_file.symlink_to("elsewhere")


def text(address_file: Path) -> None:
    address_file.write_text("no address")


@pytest.mark.timeout(60)  # opening a pipe without a writer would block for ever
@pytest.mark.parametrize("plant", [pipe, link, Path.mkdir, text])
def test_an_address_file_without_an_address_names_no_cluster(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(runtime, "is_listening", lambda host, port: True)
    address_file = temporary / "ray" / "ray_current_cluster"
    address_file.parent.mkdir()
    plant(address_file)
    assert runtime.running_cluster_address() is None


def test_an_invalid_port_does_not_listen() -> None:
    assert not runtime.is_listening("127.0.0.1", 10**30)
