"""Kill processes of a running study at random moments, and compare its results with an undisturbed run.

    python -m tests.execution.chaos                  5 kills, one of each kind of process
    python -m tests.execution.chaos --kills 20       what .ci/nightly runs

The kill of a driver or of the broker ends the command, which is then started again; no other kill may. A
killed process cannot report how many steps it took, so `counted_task.py` writes each step to a file when the
step is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

try:
    import alone
    import study
    from steps import FOLDER, TASK, Steps
except ModuleNotFoundError:  # run as a module from the project's folder
    from tests.execution import alone, study
    from tests.execution.steps import FOLDER, TASK, Steps

from orchestrator.record.maintenance import find_garbage, remove_garbage
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

NAME = "chaos"
TITLES = {
    "trainer": ["RayTrainWorker"],
    "trial": ["LaneTrial"],
    "broker": ["Broker"],
    "controller": ["TrainController"],
}
"""Kind of process -> the names that Ray gives to its processes. The driver has no such name."""
KINDS = ("driver", *TITLES)
ENDING_KINDS = {"driver": -signal.SIGKILL, "broker": 1}
"""Kinds of processes whose death ends the command -> its exit code."""
RESUMED_KINDS = ("driver", "broker", "trainer")
"""Kinds of processes whose death makes lanes wait until a new process trains them."""
KILL_SHARE = 0.6
"""The share of the remaining steps within which the remaining kills happen, so that none is too late."""
LATE_SHARE = 0.1
"""The share of all steps by which a kill may be late before the study is slowed down for it."""
STEP_LIMIT_SECONDS = study.HANG_SECONDS
"""How long a started command may take until its next step, on a busy machine."""


@dataclass(frozen=True)
class Size:
    """The size of the study: its configurations, and how many of them train at once."""

    variants: tuple[str, ...] = ("lora", "hira", "pissa")
    rates: tuple[str, ...] = ("1e-3", "1e-2")
    seeds: int = 2
    steps: int = 600
    """Steps of each configuration. They must be many: after the kill of a driver, its trainers live on for a
    moment, in which they could finish short lanes."""
    trainers: int = 2
    lanes: int = 2
    """Lanes per trainer."""

    @property
    def configurations(self) -> int:
        return len(self.variants) * len(self.rates) * self.seeds

    @property
    def all_steps(self) -> int:
        return self.configurations * self.steps

    @property
    def arguments(self) -> list[str]:
        return [
            *("--variants", *self.variants, "--learning-rates", *self.rates, "--seeds", str(self.seeds)),
            *("--widen", "0"),
            *(
                "--steps",
                str(self.steps),
                "--trainers",
                str(self.trainers),
                "--lanes-per-trainer",
                str(self.lanes),
            ),
        ]


@dataclass
class Kill:
    kind: str
    when: float
    """When the process was killed, in seconds since the epoch."""
    steps: int
    """Steps that all processes had taken by then, since the first start of the command."""
    start: int
    """Number of the command's start, from 1, to which the killed process belonged."""
    seconds_to_resume: float | None = None
    """Seconds until a new process took a step, for the kinds in `RESUMED_KINDS`."""


@dataclass
class Run:
    """A study's command, which is started again until the study is complete, and its results in `output`."""

    output: Path
    size: Size
    starts: int = 0
    kills: list[Kill] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    """One sentence for each time that the command ended by itself before the study was complete. The list
    should stay empty."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.output / "command.log"

    @property
    def store(self) -> Store:
        return Store(self.output / "store")

    def steps_of(self, start: int) -> Steps:
        """Return the steps of one start of the command."""
        return Steps(self.output / "steps" / str(start))

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"COLUMNS": "80", FOLDER: str(self.steps_of(self.starts).folder)}
        script = str(study.EXPERIMENTS / "lr_sensitivity.py")
        words = ["--dry-run", "--output", str(self.output), "--study", NAME, "--task", str(TASK)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, *words, *self.size.arguments],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return self.process

    def end(self) -> None:
        """Kill the command if it still runs, as it does if this program failed."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def steps(self) -> int:
        """Return the optimizer steps that all processes have taken since the first start of the command."""
        return sum(self.steps_of(start).taken() for start in range(1, self.starts + 1))

    def start_again(self, code: int, progress: Callable[[str], None]) -> subprocess.Popen[bytes]:
        """Start the command again after it ended by itself with the exit code `code`."""
        kind = f", the last of a {self.kills[-1].kind}" if self.kills else ""
        said = self.log.read_text().splitlines() if self.log.exists() else []
        last = f": {said[-1]}" if said else ""
        self.exits.append(f"start {self.starts} ended with {code} after {len(self.kills)} kills{kind}{last}")
        progress(f"{self.exits[-1]}; started again")
        return self.start()

    def fail(self, what: str) -> AssertionError:
        return AssertionError(f"{what}; the end of the command's output:\n{self.log.read_text()[-3000:]}")


def run_with_kills(run: Run, kills: int, seed: int, progress: Callable[[str], None]) -> None:
    """Kill `kills` processes, one of each kind in turn, then wait for the end of the study."""
    rng = random.Random(seed)
    process = run.start()
    began = time.time()
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        left = KILL_SHARE * (run.size.all_steps - run.steps()) / (kills - number)
        process = _kill(run, process, kind, rng.randint(1, max(1, int(left))), rng, progress)
        kill = run.kills[-1]
        progress(f"{kill.when - began:5.0f} s, step {kill.steps}: {kind} killed")
        if kind in ENDING_KINDS:
            if (code := process.wait()) != ENDING_KINDS[kind]:
                raise run.fail(f"after the kill of its {kind} the command ended with {code}")
            if kind == "broker" and "error: The broker was lost" not in run.log.read_text().splitlines()[-1]:
                raise run.fail("the last line does not name the lost broker")
            process = run.start()
    run.steps_of(run.starts).run_free()
    while code := process.wait():
        if run.starts > 2 * kills + 3:
            raise run.fail(f"the command ended with {code} after {run.starts} starts")
        process = run.start_again(code, progress)
    _measure_resumption(run)
    remove_garbage(run.store, find_garbage(run.store, run.output, older_than=0.0))


def _kill(
    run: Run,
    process: subprocess.Popen[bytes],
    kind: str,
    after: int,
    rng: random.Random,
    progress: Callable[[str], None],
) -> subprocess.Popen[bytes]:
    """Kill a process of the kind `kind`, once the command has taken `after` steps since the last kill.

    Returns:
        The command's process. It is a new process if the command ended by itself meanwhile; `run.exits` then
        has a sentence about the end.
    """
    steps = run.steps_of(run.starts)
    before = steps.taken()
    steps.slow_after(before + after + int(LATE_SHARE * run.size.all_steps))
    deadline = time.monotonic() + STEP_LIMIT_SECONDS
    while True:
        code = process.poll()
        if code == 0:
            raise run.fail(f"the study was complete after {len(run.kills)} kills: take more --steps")
        if code is not None:
            process, before = run.start_again(code, progress), 0
            steps = run.steps_of(run.starts)
        if steps.taken() - before >= after:
            victims = _processes(process.pid, kind)
            if victims:
                kill = Kill(kind, time.time(), run.steps(), run.starts)
                with suppress(ProcessLookupError):  # the process has just ended: choose another one
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    run.kills.append(kill)
                    return process
        if time.monotonic() > deadline:
            raise run.fail(f"no {kind} to kill, or no {after} steps, within {STEP_LIMIT_SECONDS:g} s")
        time.sleep(0.05)


def _processes(driver: int, kind: str) -> list[int]:
    if kind == "driver":
        return [driver]
    try:
        below = psutil.Process(driver)
        return [process.pid for title in TITLES[kind] for process in study.titled(title, below)]
    except psutil.NoSuchProcess:  # the command has just ended
        return []


def _measure_resumption(run: Run) -> None:
    """Compute for each kill how long it took until a new process trained.

    After the kill of a driver, its trainers live on for a moment: only those of the next start are new.
    """
    for kill in run.kills:
        start = kill.start + (kill.kind in ENDING_KINDS)
        firsts = [moment for moment in run.steps_of(start).firsts() if moment > kill.when]
        if kill.kind in RESUMED_KINDS and firsts:
            kill.seconds_to_resume = min(firsts) - kill.when


def unexplained_starts(run: Run) -> list[str]:
    """Return a sentence for each start of the command that no kill explains."""
    found = [f"the command ended by itself: {each}" for each in run.exits]
    ends = sum(kill.kind in ENDING_KINDS for kill in run.kills)
    if run.starts != 1 + ends:
        found.append(f"{run.starts} starts for {ends} killed drivers and brokers")
    return found


def differences(run: Run, expected: Mapping[str, Record]) -> list[str]:
    """Return a sentence for each difference from `expected`, the records of an undisturbed training."""
    found = unexplained_starts(run)
    file, now = StudyFile.read(run.output / NAME), study.records(run.output)
    asked = set(file.configurations) if file else set()
    if len(asked) != run.size.configurations:
        found.append(f"{len(asked)} configurations were asked for, not {run.size.configurations}")
    found += [f"{f[:12]} has no record" for f in asked - now.keys()]
    found += [f"{f[:12]} was not asked for" for f in now.keys() - asked]
    for name in expected.keys() & now.keys():
        # The results are equal to the bit: on a CPU, other lanes do not change a lane with at least 8 rows.
        if (study.course(now[name]), now[name].items) != (study.course(expected[name]), expected[name].items):
            found.append(f"{name[:12]} has other scores")
    files = [path.name for path in run.store.records_folder.rglob("*.json")]
    if sorted(files) != sorted(f"{f}.json" for f in asked):
        found.append(f"{len(files)} record files for {len(asked)} configurations")
    children = Counter(study.children(run.output, NAME))
    children.subtract((f, "FINISHED") for f in asked)
    for (name, status), surplus in children.items():
        if surplus:
            found.append(f"{name[:12]} has {'no' if surplus < 0 else 'too many'} MLflow runs {status}")
    if study.parents(run.output, NAME) != ["FINISHED"]:
        found.append(f"MLflow's parents: {study.parents(run.output, NAME)}")
    found += [f"{path} is a pickle" for path in run.output.rglob("*.pkl")]
    store = run.store.root
    left = [*store.glob("scratch/*"), *store.glob("checkpoints/*"), *store.glob("records/*/.*")]
    found += [f"{path} is left" for path in left]
    if run.steps() > max_steps(run):
        found.append(f"{run.steps()} optimizer steps, more than {max_steps(run)}")
    return found


def max_steps(run: Run) -> int:
    """Return the maximum number of steps: all steps, and per kill those since the last checkpoints."""
    record = next(iter(study.records(run.output).values()))
    interval = -(-run.size.steps // record.configuration.evaluations)
    return run.size.all_steps + len(run.kills) * run.size.trainers * run.size.lanes * interval


def compare(
    bases: Path, folder: Path, size: Size, kills: int, seed: int, progress: Callable[[str], None]
) -> tuple[Run, dict[str, Record]]:
    """Run the study with kills, then train its configurations undisturbed.

    Args:
        bases: A folder with the base model.
        folder: The folder for the results of both.
        size: The size of the study.
        kills: The number of processes to kill.
        seed: The seed of the moments of the kills.
        progress: Called with a line of progress.

    Returns:
        The run with kills, and the records of the undisturbed training by fingerprint.
    """
    run = Run(folder / "disturbed", size)
    shutil.copytree(bases, run.store.bases)
    try:
        run_with_kills(run, kills, seed, progress)
    finally:
        run.end()
    configurations = [record.configuration for record in run.store.records()]
    return run, alone.train(configurations, bases, folder / "undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=len(KINDS), help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="seed of the moments")
    parser.add_argument(
        "--steps", type=int, help="steps of a configuration (default: 50 per kill, at least 600)"
    )
    parser.add_argument("--folder", type=Path, help="folder of the studies (default: a temporary folder)")
    options = parser.parse_args()
    from orchestrator.finetune.models import catalogue as model_catalogue

    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    progress = partial(print, flush=True)
    progress(f"seed {options.seed}, in {folder}")
    model_catalogue.prepare_base_model("letters-base", folder / "bases", print)
    began = time.monotonic()
    size = Size(steps=options.steps or max(Size.steps, 50 * options.kills))
    run, expected = compare(folder / "bases", folder, size, options.kills, options.seed, progress)
    summary = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        "configurations": len(expected),
        "starts": run.starts,
        "ended by itself": run.exits,
        "kills": [(kill.kind, kill.steps) for kill in run.kills],
        "steps": run.steps(),
        "undisturbed": size.all_steps,
        "bound": max_steps(run),
        "seconds until a new process trains": {
            kind: [
                round(k.seconds_to_resume)
                for k in run.kills
                if k.kind == kind and k.seconds_to_resume is not None
            ]
            for kind in RESUMED_KINDS
        },
    }
    print(json.dumps(summary, indent=1))
    found = differences(run, expected)
    print("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
