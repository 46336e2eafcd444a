"""Promise 2: whatever is killed or interrupted, the same command continues the study to the same results.

A process is killed after a random number of optimizer steps. The lanes of watched.py log each step, and train
slowly until the process is killed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import as_a_user
import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

WATCHED = Path(__file__).with_name("watched.py")
NAME, STEPS, SEED = "faults", 60, 20
STUDY = (
    *("study", "--dry-run", "--study", NAME, "--variants", WATCHED, "--learning-rates", "1e-3", "1e-2"),
    *("--seeds", "2", "--steps", str(STEPS), "--evaluations", "1", "--lr-schedule", "constant"),
    *("--set", "warmup=0", "--widen", "0", "--trainers", "1", "--lanes-per-trainer", "2"),
)


def lives(number: int) -> bool:
    """Return whether a process with this id exists and is no zombie."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Study:
    """A study in a folder of its own, whose command is started as often as needed."""

    home: Path
    temporary: Path
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))

    def __post_init__(self) -> None:
        self.watched.mkdir()

    @property
    def watched(self) -> Path:
        return self.home / "watched"

    def start(self) -> subprocess.Popen[str]:
        return as_a_user.start(*STUDY, cwd=self.home, WATCHED=str(self.watched), TMPDIR=str(self.temporary))

    def slow_down(self) -> None:
        (self.watched / "slow").touch()

    def run_free(self) -> None:
        (self.watched / "slow").unlink(missing_ok=True)

    def steps(self, trainer: int | None = None) -> list[tuple[str, int]]:
        """Return (lane, step number) of each step that all trainers, or one of them, have begun."""
        found = []
        for path in self.watched.glob(f"{trainer or '*'}.steps"):
            for line in path.read_text().splitlines():
                rate, seed, step = line.split()
                found.append((f"{rate} {seed}", int(step)))
        return found

    def trainers(self) -> list[int]:
        """Return the ids of the living processes that have trained."""
        return [number for path in self.watched.glob("*.steps") if lives(number := int(path.stem))]

    def processes(self) -> dict[int, str]:
        """Return the study's living processes: process id -> command line.

        A process of the study has the study's folders as working folder, in its environment or in its
        command line. (A process of Ray that sets its own title loses its environment.)
        """
        found = {}
        for process in psutil.process_iter():
            try:
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                told = " ".join([process.cwd(), *process.cmdline(), *process.environ().values()])
            except psutil.Error:
                continue
            if any(str(folder) in told for folder in (self.home, self.temporary)):
                found[process.pid] = " ".join(process.cmdline())
        return found

    def wait_for_steps(self, process: subprocess.Popen[str], wanted: int | None = None) -> int:
        """Wait until a trainer has begun `wanted` steps (None: a random number); return its process id."""
        count = wanted or self.rng.randint(3, 12)
        as_a_user.wait_until(
            lambda: any(len(self.steps(trainer)) >= count for trainer in self.trainers()), process
        )
        return next(number for number in self.trainers() if len(self.steps(number)) >= count)

    def assert_nothing_runs(self) -> None:
        deadline = time.monotonic() + as_a_user.HANG_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.2)

    def assert_equals(self, undisturbed: Path) -> None:
        found, expected = as_a_user.records(self.home), as_a_user.records(undisturbed)
        assert found.keys() == expected.keys()
        for fingerprint, record in expected.items():
            assert as_a_user.results(found[fingerprint]) == as_a_user.results(record)
        as_a_user.assert_one_finished_run_each(self.home, NAME, expected)


@pytest.fixture(scope="module")
def undisturbed(made_once: Callable[..., Path], with_base: Path) -> Path:
    """Return the working folder of the study, trained without a fault."""

    def make(folder: Path) -> None:
        shutil.copytree(with_base, folder, dirs_exist_ok=True)
        (folder / "watched").mkdir()
        as_a_user.succeed(*STUDY, cwd=folder, WATCHED=str(folder / "watched"))
        assert len(as_a_user.records(folder)) == 4

    return made_once("undisturbed", make)


@pytest.fixture
def study(home: Path) -> Iterator[Study]:
    """Yield a new study for one test, and kill the processes that a failed test leaves."""
    temporary = Path(tempfile.mkdtemp(prefix="p2-"))
    made = Study(home, temporary)
    yield made
    for number in made.processes():
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    shutil.rmtree(temporary, ignore_errors=True)


def test_ctrl_c_once_and_twice(study: Study, undisturbed: Path) -> None:
    study.slow_down()
    process = study.start()
    trainer = study.wait_for_steps(process)
    assert {process.pid, trainer} <= study.processes().keys(), "the tests see what runs"

    held = study.watched / "held"
    held.touch()
    second = as_a_user.run(*STUDY, cwd=study.home, WATCHED=str(study.temporary))
    assert second.code not in (0, 130), f"one command a study: {second}"
    assert f"results/{NAME}" in second.err, "it names the folder"
    assert len(second.err.splitlines()) == 1
    assert process.poll() is None
    held.unlink()

    os.killpg(process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    result = as_a_user.end(process)
    assert result.code == 130, result
    assert f"--study {NAME}" in result.err.splitlines()[-1], "the command that goes on"
    assert f"report {NAME}" in result.out, "the command that writes the report"
    study.assert_nothing_runs()
    last = dict(sorted(study.steps(trainer)))
    assert max(last.values()) < STEPS

    process = study.start()
    trainer = study.wait_for_steps(process)
    first = dict(sorted(study.steps(trainer), reverse=True))
    assert first.keys() & last.keys()
    for lane, step in first.items():
        assert step == last.get(lane, 0) + 1, "a lane goes on where it was interrupted"
    while process.poll() is None:  # as a user who presses Ctrl-C again and again
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert as_a_user.end(process).code in (130, -signal.SIGINT)
    study.assert_nothing_runs()

    study.run_free()
    result = as_a_user.end(study.start())
    assert result.code == 0, result
    study.assert_nothing_runs()
    study.assert_equals(undisturbed)


def test_killed_processes(study: Study, undisturbed: Path) -> None:
    """Kill a trainer, another process of Ray, the driver, and at last the raylet, which ends the node."""
    study.slow_down()
    process = study.start()
    trainer = study.wait_for_steps(process)
    os.kill(trainer, signal.SIGKILL)
    assert study.wait_for_steps(process) != trainer, "a new trainer trains its lanes"

    others = {number for number, words in study.processes().items() if words.startswith("ray::")}
    os.kill(study.rng.choice(sorted(others.difference(study.trainers()))), signal.SIGKILL)
    before = len(study.steps())
    as_a_user.wait_until(lambda: process.poll() is not None or len(study.steps()) >= before + 6, process)
    if process.poll() is not None:  # not every process is replaced while a study runs
        assert as_a_user.end(process).code != 0
        study.assert_nothing_runs()
        process = study.start()
        study.wait_for_steps(process)

    # Ray's agents would end by themselves, but only after a minute.
    agents = [number for number, words in study.processes().items() if re.search("Agent|agent.py", words)]
    assert len(agents) >= 2
    for number in agents:
        os.kill(number, signal.SIGSTOP)
    process.kill()  # kill -9 of the driver
    as_a_user.end(process)
    study.assert_nothing_runs()
    assert len(as_a_user.records(study.home)) < 4, "it was killed in the middle"

    process = study.start()
    study.wait_for_steps(process)
    raylets = [number for number, words in study.processes().items() if "/raylet " in words]
    assert raylets
    for number in raylets:
        os.kill(number, signal.SIGKILL)
    study.run_free()
    ended = as_a_user.end(process)
    study.assert_nothing_runs()

    for _ in range(2):
        if ended.code != 0:
            ended = as_a_user.end(study.start())
    assert ended.code == 0, ended
    study.assert_nothing_runs()
    study.assert_equals(undisturbed)
