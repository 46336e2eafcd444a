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
from orchestrator.cluster.remote.jobs import JobClient
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import EXIT_INTERRUPTED, format_command, print_on_own_line
from orchestrator.util.errors import StudyError, UsageError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

REFUSED_EXIT_CODE = 2
"""The exit code of a command that was refused."""


def run_on_cluster(options: StudyOptions, path: Path) -> int:
    """Runs there what was typed here, or follows it where it runs, and returns its exit code. Raises BadInput
    and Trouble.
    """
    arguments = command_line.remote_command(options)
    if Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    config = cluster_file.read_cluster_file(path)
    folder, cluster_name = _project_folder(path, config), config["cluster_name"]
    address, reason = head.find_head(path)
    if address is None:
        raise UsageError(
            f"--on {path}: cluster {cluster_name!r} must be up ({reason}); start it: ray up {path}"
        )
    print(f"{cluster_name}: connecting to {address}", flush=True)
    with head.open_tunnel(path) as dashboard:
        jobs = JobClient(dashboard, folder)
        if arguments[0] == "-m" or options.plan:
            return _run_short_command(jobs, path, arguments)
        command = shlex.join(["python", *arguments])
        return _RemoteStudy(jobs, path, cluster_name, command_line.study_key(options), command, options).run()


def _project_folder(path: Path, config: dict[str, Any]) -> str:
    """Where the project is on the head. Raises BadInput."""
    for remote_path, local_path in config["file_mounts"].items():
        mounted = path.resolve().parent / Path(local_path).expanduser()
        if mounted.resolve() == source_digest.PROJECT_ROOT / "orchestrator":
            parent = Path(remote_path).parent.as_posix()
            return f"~/{shlex.quote(parent[2:])}" if parent.startswith("~/") else shlex.quote(parent)
    raise UsageError(
        f"{path}, file_mounts: must send {source_digest.PROJECT_ROOT / 'orchestrator'} to the head, as cluster.yaml "
        "does; take the cluster.yaml beside it."
    )


def _check_sources(jobs: JobClient, path: Path) -> None:
    differing = source_digest.differing_files(
        source_digest.file_digests(),
        json.loads(jobs.run_query("python -m orchestrator.cluster.remote.source_digest")),
    )
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UsageError(
            f"--on {path}: the head must have the sources that are here, and {differing[0]}{more} differ; "
            f"ray up {path} brings them (it starts Ray anew: what runs there ends)."
        )


def _run_short_command(jobs: JobClient, path: Path, arguments: list[str]) -> int:
    """A command that trains nothing: nobody comes back for it."""
    _check_sources(jobs, path)
    job = jobs.submit_job("", shlex.join(["python", *arguments]))
    try:
        return jobs.follow_job(job)
    finally:
        jobs.delete_job(job)


@dataclass(frozen=True)
class _RemoteStudy:
    jobs: JobClient
    path: Path
    cluster_name: str
    study_key: str
    command: str
    options: StudyOptions

    def run(self) -> int:
        job = self.jobs.find_job(self.study_key)
        if self.options.stop:
            return self._stop(job)
        if job is None or not self._has_same_command(job):
            return self._submit(job)
        state = "has ended there" if job.status.is_terminal() else "runs there"
        print(f"{self.cluster_name}: {self.study_key} {state}", flush=True)
        return self._follow(job)

    def _has_same_command(self, job: JobDetails) -> bool:
        return _submitted_command(job) == self.command

    def _submit(self, previous: JobDetails | None) -> int:
        """`before`: a job of this study with other options, which is of no interest once it has ended."""
        if previous is not None and not previous.status.is_terminal():
            raise UsageError(
                f"--on {self.path}: {self.study_key!r} runs there with other options ({_submitted_command(previous)}); follow "
                "it with these, or end it (--stop), or take another --study."
            )
        if previous is not None:
            self.jobs.delete_job(previous)
        _check_sources(self.jobs, self.path)
        job = self.jobs.submit_job(self.study_key, self.command)
        print(f"{self.cluster_name}: {self.study_key} runs there; Ctrl-C lets go of it", flush=True)
        return self._follow(job)

    def _stop(self, job: JobDetails | None) -> int:
        if job is None:
            raise UsageError(
                f"--stop: {self.study_key!r} does not run on {self.cluster_name}; repeat the options that it was "
                "started with."
            )
        log_length = len(self.jobs.read_log(job))
        self.jobs.stop_job(job)
        return self._follow(job, log_length)

    def _follow(self, job: JobDetails, skip_characters: int = 0) -> int:
        try:
            code = self.jobs.follow_job(job, skip_characters)
        except StudyError as lost:
            raise StudyError(f"{lost}; the study goes on there, and the same command follows it") from None
        except KeyboardInterrupt:
            again = format_command(sys.orig_argv[1:])
            state = f"goes on on {self.cluster_name}; to follow it: {again}; to end it: {again} --stop"
            state = f"ends on {self.cluster_name}" if self.options.stop else state
            print_on_own_line(f"let go: the study {state}")
            return EXIT_INTERRUPTED
        if code != REFUSED_EXIT_CODE:
            self._download_results(_submitted_command(job))
        self.jobs.delete_job(job)
        return code

    def _download_results(self, command: str) -> None:
        """What it has written, which no password is in: so its studies know it by the same words."""
        folders = self.jobs.run_query(
            f"python -m orchestrator.cluster.remote.study_folders {shlex.quote(command)}"
        )
        for remote_folder in json.loads(folders):
            local_folder = self.options.output / Path(remote_folder).name
            head.download_folder(self.path, remote_folder, local_folder)
            print(
                f"Here     {local_folder / 'report.html' if (local_folder / 'report.html').exists() else local_folder}",
                flush=True,
            )


def _submitted_command(job: JobDetails) -> str:
    return (job.metadata or {}).get("command", "")
