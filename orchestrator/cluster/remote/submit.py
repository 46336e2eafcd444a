"""`--on cluster.yaml`: a command of this machine runs on the cluster's head and is followed from here.

The head runs it as a Ray job with the head's own folders and MLflow; this machine shows what it says and gets
the reports. The same command again finds the job, whether it runs or has ended with nobody looking.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.remote import cluster_file, command_line, head, source_digest
from orchestrator.cluster.remote.jobs import Jobs
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import INTERRUPTED, say_on_a_line, typed
from orchestrator.util.errors import BadInput, Trouble

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

NOTHING_RAN = 2
"""The exit code of a command that was refused."""


def run(options: StudyOptions, path: Path) -> int:
    """Runs there what was typed here, or follows it where it runs, and returns its exit code. Raises BadInput
    and Trouble."""
    words = command_line.command(options)
    if Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    config = cluster_file.read(path)
    folder, name = _folder(path, config), config["cluster_name"]
    address, why = head.find(path)
    if address is None:
        raise BadInput(f"--on {path}: cluster {name!r} must be up ({why}); start it: ray up {path}")
    print(f"{name}: connecting to {address}", flush=True)
    with head.tunnel(path) as dashboard:
        jobs = Jobs(dashboard, folder)
        if words[0] == "-m" or options.plan:
            return _answer(jobs, path, words)
        command = shlex.join(["python", *words])
        return _Study(jobs, path, name, command_line.study(options), command, options).run()


def _folder(path: Path, config: dict[str, Any]) -> str:
    """Where the project is on the head. Raises BadInput."""
    for there, here in config["file_mounts"].items():
        mounted = path.resolve().parent / Path(here).expanduser()
        if mounted.resolve() == source_digest.ROOT / "orchestrator":
            parent = Path(there).parent.as_posix()
            return f"~/{shlex.quote(parent[2:])}" if parent.startswith("~/") else shlex.quote(parent)
    raise BadInput(
        f"{path}, file_mounts: must send {source_digest.ROOT / 'orchestrator'} to the head, as cluster.yaml "
        "does; take the cluster.yaml beside it."
    )


def _check_sources(jobs: Jobs, path: Path) -> None:
    unlike = source_digest.unlike(
        source_digest.digests(), json.loads(jobs.ask("python -m orchestrator.cluster.remote.source_digest"))
    )
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise BadInput(
            f"--on {path}: the head must have the sources that are here, and {unlike[0]}{more} differ; "
            f"ray up {path} brings them (it starts Ray anew: what runs there ends)."
        )


def _answer(jobs: Jobs, path: Path, words: list[str]) -> int:
    """A command that trains nothing: nobody comes back for it."""
    _check_sources(jobs, path)
    job = jobs.start("", shlex.join(["python", *words]))
    try:
        return jobs.follow(job)
    finally:
        jobs.forget(job)


@dataclass(frozen=True)
class _Study:
    jobs: Jobs
    path: Path
    cluster: str
    name: str
    command: str
    options: StudyOptions

    def run(self) -> int:
        job = self.jobs.find(self.name)
        if self.options.stop:
            return self._end(job)
        if job is None or not self._is_this(job):
            return self._begin(job)
        state = "has ended there" if job.status.is_terminal() else "runs there"
        print(f"{self.cluster}: {self.name} {state}", flush=True)
        return self._follow(job)

    def _is_this(self, job: JobDetails) -> bool:
        return _command(job) == self.command

    def _begin(self, before: JobDetails | None) -> int:
        """`before`: a job of this study with other options, which is of no interest once it has ended."""
        if before is not None and not before.status.is_terminal():
            raise BadInput(
                f"--on {self.path}: {self.name!r} runs there with other options ({_command(before)}); follow "
                "it with these, or end it (--stop), or take another --study."
            )
        if before is not None:
            self.jobs.forget(before)
        _check_sources(self.jobs, self.path)
        job = self.jobs.start(self.name, self.command)
        print(f"{self.cluster}: {self.name} runs there; Ctrl-C lets go of it", flush=True)
        return self._follow(job)

    def _end(self, job: JobDetails | None) -> int:
        if job is None:
            raise BadInput(
                f"--stop: {self.name!r} does not run on {self.cluster}; repeat the options that it was "
                "started with."
            )
        said = len(self.jobs.log(job))
        self.jobs.stop(job)
        return self._follow(job, said)

    def _follow(self, job: JobDetails, skip: int = 0) -> int:
        try:
            code = self.jobs.follow(job, skip)
        except Trouble as lost:
            raise Trouble(f"{lost}; the study goes on there, and the same command follows it") from None
        except KeyboardInterrupt:
            again = typed(sys.orig_argv[1:])
            says = f"goes on on {self.cluster}; to follow it: {again}; to end it: {again} --stop"
            says = f"ends on {self.cluster}" if self.options.stop else says
            say_on_a_line(f"let go: the study {says}")
            return INTERRUPTED
        if code != NOTHING_RAN:
            self._bring(_command(job))
        self.jobs.forget(job)
        return code

    def _bring(self, command: str) -> None:
        """What it has written, which no password is in: so its studies know it by the same words."""
        found = self.jobs.ask(f"python -m orchestrator.cluster.remote.study_folders {shlex.quote(command)}")
        for there in json.loads(found):
            here = self.options.output / Path(there).name
            head.bring(self.path, there, here)
            print(f"Here     {here / 'report.html' if (here / 'report.html').exists() else here}", flush=True)


def _command(job: JobDetails) -> str:
    return (job.metadata or {}).get("command", "")
