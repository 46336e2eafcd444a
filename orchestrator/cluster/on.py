"""`--on cluster.yaml`: a command of this machine runs on the cluster's head and is followed from here.

The head runs it as a Ray job with the head's own folders and MLflow; this machine shows what it says and gets
the reports. The same command again finds the job, whether it runs or has ended with nobody looking.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from orchestrator.cluster import alike, description, head, retyped
from orchestrator.cluster.jobs import Jobs
from orchestrator.study.command import INTERRUPTED, typed
from orchestrator.study.errors import BadInput
from orchestrator.study.options import StudyOptions

NOTHING_RAN = 2
"""The exit code of a command that was refused."""


def run(options: StudyOptions, path: Path) -> int:
    """Runs there what was typed here, or follows it where it runs, and returns its exit code. Raises BadInput
    and Trouble."""
    words = retyped.command(options)
    if Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    config = description.read(path)
    folder, name = _folder(path, config), config["cluster_name"]
    address, why = head.find(path)
    if address is None:
        raise BadInput(f"--on {path}: cluster {name!r} must be up ({why}); start it: ray up {path}")
    print(f"{name}: connecting to {address}", flush=True)
    with head.tunnel(path) as dashboard:
        jobs = Jobs(dashboard, folder)
        if words[0] == "-m" or options.plan:
            return _answer(jobs, path, words)
        return _Study(jobs, path, name, retyped.study(options), words, options).run()


def _folder(path: Path, config: dict[str, Any]) -> str:
    """Where the project is on the head. Raises BadInput."""
    for there, here in config["file_mounts"].items():
        mounted = path.resolve().parent / Path(here).expanduser()
        if mounted.resolve() == alike.ROOT / "orchestrator":
            parent = Path(there).parent.as_posix()
            return f"~/{shlex.quote(parent[2:])}" if parent.startswith("~/") else shlex.quote(parent)
    raise BadInput(
        f"{path}, file_mounts: must send {alike.ROOT / 'orchestrator'} to the head, as cluster.yaml does; "
        "take the cluster.yaml beside it."
    )


def _check_sources(jobs: Jobs, path: Path) -> None:
    unlike = alike.unlike(alike.digests(), json.loads(jobs.ask("python -m orchestrator.cluster.alike")))
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


class _Study:
    def __init__(
        self, jobs: Jobs, path: Path, cluster: str, study: str, words: list[str], options: StudyOptions
    ) -> None:
        self.jobs, self.path, self.cluster, self.study, self.options = jobs, path, cluster, study, options
        self.command, self.recorded = shlex.join(["python", *words]), typed(words)

    def run(self) -> int:
        jobs, skip = self.jobs, 0
        job = jobs.find(self.study)
        running = job is not None and not job.status.is_terminal()
        same = job is not None and (job.metadata or {}).get("command") == self.command
        if self.options.stop:
            if job is None:
                raise BadInput(
                    f"--stop: {self.study!r} does not run on {self.cluster}; repeat the options that it was "
                    "started with."
                )
            skip = len(jobs.log(job))
            jobs.stop(job)
        elif running and not same:
            assert job is not None
            other = (job.metadata or {}).get("command", "")
            raise BadInput(
                f"--on {self.path}: {self.study!r} runs there with other options ({other}); follow it with "
                "these, or end it (--stop), or take another --study."
            )
        elif job is not None and same:
            print(
                f"{self.cluster}: {self.study} {'runs there' if running else 'has ended there'}", flush=True
            )
        else:
            if job is not None:
                jobs.forget(job)
            _check_sources(jobs, self.path)
            job = jobs.start(self.study, self.command)
            print(f"{self.cluster}: {self.study} runs there; Ctrl-C lets go of it", flush=True)
        try:
            code = jobs.follow(job, skip)
        except KeyboardInterrupt:
            again = typed(sys.orig_argv[1:])
            goes = "ends" if self.options.stop else "goes on"
            print(
                f"let go: the study {goes} on {self.cluster}; to follow it: {again}"
                + ("" if self.options.stop else f"; to end it: {again} --stop"),
                file=sys.stderr,
            )
            return INTERRUPTED
        if code != NOTHING_RAN:
            self._bring()
        jobs.forget(job)
        return code

    def _bring(self) -> None:
        found = self.jobs.ask(f"python -m orchestrator.cluster.written {shlex.quote(self.recorded)}")
        for there in json.loads(found):
            here = self.options.output / Path(there).name
            head.bring(self.path, there, here)
            print(f"Here     {here / 'report.html' if (here / 'report.html').exists() else here}", flush=True)
