"""Kills what a study is made of, one process after another, at random moments; starts the command again each
time that it has ended; and compares what the study leaves with what an undisturbed training leaves.

    python -m tests.execution.chaos                  5 kills, one of each kind
    python -m tests.execution.chaos --kills 20       what docs/faults.md reports

Nobody knows better than the processes themselves how many steps they took, and a killed one can say nothing:
`counted_task.py` notes each step as it is taken.
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
    from tests.schedule import alone, study

    from tests.execution.steps import FOLDER, TASK, Steps

from orchestrator.record.gc import collect_garbage
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

NAME = "chaos"
TITLES = {
    "trainer": ["RayTrainWorker"],
    "trial": ["ResourceTrainable", "Trial"],  # its class is wrapped by Tune
    "broker": ["Broker"],
    "controller": ["TrainController"],
}
"""What Ray calls the processes that are killed, besides the driver."""
KINDS = ("driver", *TITLES)
BACK = ("driver", "trainer")
"""Kinds whose lanes have to wait for a new process."""
SHARE = 0.6
"""Of the steps that are left: within these the kills that are left happen, so that none comes too late."""
LATE = 0.1
"""A part of all steps: if a kill is later by so many, the study waits for it."""
LOST_SECONDS = study.HANG_SECONDS
"""How long a started command may take to its next step, on a busy machine."""


@dataclass(frozen=True)
class Size:
    """Of the study: what is trained, and by how many at once."""

    variants: tuple[str, ...] = ("lora", "hira", "pissa")
    rates: tuple[str, ...] = ("1e-3", "1e-2")
    seeds: int = 2
    steps: int = 600
    """Many: trainers outlive a killed driver by a moment, and what they finish in it is finished."""
    trainers: int = 2
    lanes: int = 2
    """Of a trainer."""

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
    """Seconds since the epoch."""
    steps: int
    """Taken by then, by all processes since the first start of the command."""
    start: int
    """Which start of the command it hit."""
    back: float | None = None
    """Seconds until a new process took a step; for `BACK`."""


@dataclass
class Run:
    """A study's command, started as often as it takes, and what it left behind in `output`."""

    output: Path
    size: Size
    starts: int = 0
    kills: list[Kill] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    """How the command ended by itself before the study was complete, for people to read. None is right: only
    a killed driver has to be started again."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.output / "command.log"

    @property
    def store(self) -> Store:
        return Store(self.output / "store")

    def steps_of(self, start: int) -> Steps:
        """Those of one start of the command."""
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
        """Whatever still runs when something went wrong here."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def steps(self) -> int:
        """Optimizer steps that all processes together have taken since the first start of the command."""
        return sum(self.steps_of(start).taken() for start in range(1, self.starts + 1))

    def start_again(self, code: int, say: Callable[[str], None]) -> subprocess.Popen[bytes]:
        """It has ended with `code`, and nobody had killed it."""
        kind = f", the last of a {self.kills[-1].kind}" if self.kills else ""
        said = self.log.read_text().splitlines() if self.log.exists() else []
        last = f": {said[-1]}" if said else ""
        self.exits.append(f"start {self.starts} ended with {code} after {len(self.kills)} kills{kind}{last}")
        say(f"{self.exits[-1]}; started again")
        return self.start()

    def fail(self, what: str) -> AssertionError:
        return AssertionError(f"{what}; the command's last words:\n{self.log.read_text()[-3000:]}")


def disturbed(run: Run, kills: int, seed: int, say: Callable[[str], None]) -> None:
    """Kills `kills` processes, in turn one of each kind; then lets the study end."""
    chance = random.Random(seed)
    process = run.start()
    began = time.time()
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        left = SHARE * (run.size.all_steps - run.steps()) / (kills - number)
        process = _kill(run, process, kind, chance.randint(1, max(1, int(left))), chance, say)
        kill = run.kills[-1]
        say(f"{kill.when - began:5.0f} s, step {kill.steps}: {kind} killed")
        if kind == "driver":
            if (code := process.wait()) != -signal.SIGKILL:
                raise run.fail(f"it ended with {code} just before it was to be killed")
            process = run.start()
    run.steps_of(run.starts).run_free()
    while code := process.wait():
        if run.starts > 2 * kills + 3:
            raise run.fail(f"started {run.starts} times it still ended with {code}")
        process = run.start_again(code, say)
    _measure(run)
    collect_garbage(run.store, run.output, older_than=0.0)


def _kill(
    run: Run,
    process: subprocess.Popen[bytes],
    kind: str,
    after: int,
    chance: random.Random,
    say: Callable[[str], None],
) -> subprocess.Popen[bytes]:
    """Kills one of `kind` once the command has taken `after` steps since the last kill. Returns the command's
    process, which is another one if it had ended by itself meanwhile (which is noted)."""
    steps = run.steps_of(run.starts)
    before = steps.taken()
    steps.slow_after(before + after + int(LATE * run.size.all_steps))
    deadline = time.monotonic() + LOST_SECONDS
    while True:
        code = process.poll()
        if code == 0:
            raise run.fail(
                f"complete after {len(run.kills)} kills: the study is too short for more, give it more steps"
            )
        if code is not None:
            process, before = run.start_again(code, say), 0
            steps = run.steps_of(run.starts)
        if steps.taken() - before >= after:
            victims = _processes(process.pid, kind)
            if victims:
                kill = Kill(kind, time.time(), run.steps(), run.starts)
                with suppress(ProcessLookupError):  # it has just ended: take another one
                    os.kill(chance.choice(victims), signal.SIGKILL)
                    run.kills.append(kill)
                    return process
        if time.monotonic() > deadline:
            raise run.fail(f"no {kind} to kill, or no {after} steps, within {LOST_SECONDS:g} s")
        time.sleep(0.05)


def _processes(driver: int, kind: str) -> list[int]:
    if kind == "driver":
        return [driver]
    try:
        below = psutil.Process(driver)
        return [process.pid for title in TITLES[kind] for process in study.titled(title, below)]
    except psutil.NoSuchProcess:  # the command has just ended
        return []


def _measure(run: Run) -> None:
    """Trainers outlive their driver by a moment: after its death only those of the next start are new."""
    for kill in run.kills:
        start = kill.start + 1 if kill.kind == "driver" else kill.start
        firsts = [moment for moment in run.steps_of(start).firsts() if moment > kill.when]
        if kill.kind in BACK and firsts:
            kill.back = min(firsts) - kill.when


def wrong_starts(run: Run) -> list[str]:
    """Nothing but a killed driver ends the command before the study is complete."""
    found = [f"the command ended by itself: {how}" for how in run.exits]
    drivers = sum(kill.kind == "driver" for kill in run.kills)
    if run.starts != 1 + drivers:
        found.append(f"{run.starts} starts for {drivers} killed drivers")
    return found


def wrong(run: Run, expected: Mapping[str, Record]) -> list[str]:
    """What is not as in `expected`, the records of an undisturbed training. Nothing is right."""
    found = wrong_starts(run)
    file, now = StudyFile.read(run.output / NAME), study.records(run.output)
    asked = set(file.configurations) if file else set()
    if len(asked) != run.size.configurations:
        found.append(f"{len(asked)} configurations were asked for, not {run.size.configurations}")
    found += [f"{f[:12]} has no record" for f in asked - now.keys()]
    found += [f"{f[:12]} was not asked for" for f in now.keys() - asked]
    for name in expected.keys() & now.keys():
        # To the bit: on a CPU a lane with at least 8 rows computes the same in any company.
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
    if run.steps() > bound(run):
        found.append(f"{run.steps()} optimizer steps, more than {bound(run)}")
    return found


def bound(run: Run) -> int:
    """Each step once, and for each kill what every lane in flight had taken since its checkpoint."""
    record = next(iter(study.records(run.output).values()))
    interval = -(-run.size.steps // record.configuration.evaluations)
    return run.size.all_steps + len(run.kills) * run.size.trainers * run.size.lanes * interval


def compare(
    bases: Path, folder: Path, size: Size, kills: int, seed: int, say: Callable[[str], None]
) -> tuple[Run, dict[str, Record]]:
    """The disturbed run and the records of an undisturbed training, in `folder`; `bases` has the base."""
    run = Run(folder / "disturbed", size)
    shutil.copytree(bases, run.store.bases)
    try:
        disturbed(run, kills, seed, say)
    finally:
        run.end()
    configurations = [record.configuration for record in run.store.records()]
    return run, alone.train(configurations, bases, folder / "undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=len(KINDS), help="how many processes are killed")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="of the moments")
    parser.add_argument("--steps", type=int, help="of a configuration (default: 50 a kill, 600 at least)")
    parser.add_argument("--folder", type=Path, help="where the studies go (default: a temporary folder)")
    options = parser.parse_args()
    from orchestrator.finetune.models import catalogue as model_catalogue

    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    say = partial(print, flush=True)
    say(f"seed {options.seed}, in {folder}")
    model_catalogue.prepare_base_model("letters-base", folder / "bases", print)
    began = time.monotonic()
    size = Size(steps=options.steps or max(Size.steps, 50 * options.kills))
    run, expected = compare(folder / "bases", folder, size, options.kills, options.seed, say)
    summary = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        "configurations": len(expected),
        "starts": run.starts,
        "ended by itself": run.exits,
        "kills": [(kill.kind, kill.steps) for kill in run.kills],
        "steps": run.steps(),
        "undisturbed": size.all_steps,
        "bound": bound(run),
        "seconds until a new process trains": {
            kind: [round(k.back) for k in run.kills if k.kind == kind and k.back is not None] for kind in BACK
        },
    }
    print(json.dumps(summary, indent=1))
    found = wrong(run, expected)
    print("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
