"""A password in --tracking-uri is used, and neither kept nor shown: by a study whose configurations are all
known, against a real MLflow server."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import Server

from orchestrator.record.store import Store
from orchestrator.record.study_file import find_study
from orchestrator.record.sync import sync
from orchestrator.record.tracking_uri import check_uri, shown
from orchestrator.schedule import run
from orchestrator.study.command import typed
from orchestrator.study.errors import BadInput
from orchestrator.study.options import StudyOptions

PLANTED = "pl4nted"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    made.start()
    yield made
    made.kill()


def files_with(word: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and word.encode() in p.read_bytes()]


def test_it_is_in_no_file_and_in_nothing_that_is_printed(
    server: Server,
    output: Path,
    make_record,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri = server.uri.replace("://", f"://me:{PLANTED}@")
    masked = server.uri.replace("://", "://me:***@")
    monkeypatch.setattr(sys, "argv", ["study.py", "--dry-run", f"--tracking-uri={uri}"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store, record = Store(output / "store"), make_record(seed=1)
    store.put(record)
    experiment = run.Experiment("script", "Which?", ("lora",), "letters", "letters")
    options = StudyOptions(dry_run=True, output=output, tracking_uri=uri, study="known")
    assert run.run_study(experiment, options, wanted=[record.configuration]) == 0

    printed = "".join(capfd.readouterr())
    assert "1 of 1 known, nothing to train" in printed
    assert "delayed" not in printed, "the server has it all"
    assert PLANTED not in printed
    assert files_with(PLANTED, output) == []
    assert files_with(PLANTED, server.folder) == [], "the tags of the study's run"
    assert files_with("me:***@", server.folder), "its command, without the password"
    study = find_study(output, "known")[1]
    assert study.tracking_uri == masked
    assert study.command == f"python study.py --dry-run '--tracking-uri={masked}'"

    said: list[str] = []
    with pytest.raises(
        BadInput, match="passwords are kept nowhere; give the option with its own again"
    ) as no:
        sync(store, output, None, said.append)
    assert "\n" not in str(no.value)
    assert sync(store, output, uri, said.append) == 0
    assert PLANTED not in "".join(said)
    assert files_with(PLANTED, output) == []


def test_ctrl_c_prints_the_command_without_it() -> None:
    program = (
        "import time\nfrom orchestrator.study.command import main\n"
        "def run():\n    print('started', flush=True)\n    time.sleep(60)\nmain(run)\n"
    )
    words = [
        "--tracking-uri",
        f"postgresql://me:{PLANTED}@host/db",
        f"--other=https://h?token={PLANTED}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error.endswith("--tracking-uri 'postgresql://me:***@host/db' '--other=https://h?token=***'\n")
    assert PLANTED not in error


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("postgresql://u:p@h/db", "postgresql://u:***@h/db"),
        ("mysql+pymysql://u:p/a@b@h:1/db?x=1", "mysql+pymysql://u:***@h:1/db?x=1"),
        ("postgresql://h/db?user=u&Password=p&x=1", "postgresql://h/db?user=u&Password=***&x=1"),
        ("http://host:5000/x", "http://host:5000/x"),
        ("https://host/x:y@z", "https://host/x:y@z"),
        ("sqlite:////folder/a:b@c.db", "sqlite:////folder/a:b@c.db"),
    ],
)
def test_what_is_shown_of_a_uri(uri: str, words: str) -> None:
    assert shown(uri) == words
    assert typed(["a b", uri]).startswith("python 'a b' ")


def test_a_server_that_does_not_answer_is_named_without_it() -> None:
    with pytest.raises(BadInput) as caught:
        check_uri(f"http://me:{PLANTED}@127.0.0.1:9")
    assert PLANTED not in str(caught.value)
