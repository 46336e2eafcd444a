"""`--on cluster.yaml`: run a command on the head of a cluster, and follow it from this machine.

A study becomes a Ray job whose name is made from the script and the study. The same command therefore finds
its job again, whether it runs or has ended. The head uses its own folders and its MLflow server; this machine
shows the output and receives the reports.
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
from orchestrator.cluster.remote.uploads import Uploads
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import EXIT_USAGE
from orchestrator.util.errors import StudyError, UsageError
from orchestrator.util.graceful_interrupts import EXIT_INTERRUPTED, format_command
from orchestrator.util.status_line import print_on_own_line

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails


def run_on_cluster(options: StudyOptions, path: Path) -> int:
    """Run this process's command on a cluster, or follow it where it runs already.

    Args:
        options: The options of the command.
        path: The cluster file.

    Returns:
        The exit code of the command on the cluster, or 130 after Ctrl-C.

    Raises:
        UsageError: The command cannot run there, the cluster is not up, or its sources differ.
        StudyError: The connection is lost.
    """
    uploads = Uploads()
    command_line.remote_command(options, uploads)  # refuses before the cluster is looked up
    if Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported, which reads it then
    config = cluster_file.read_cluster_file(path)
    folder, cluster_name = _project_folder(path, config), config["cluster_name"]
    try:
        address = head.find_head(path, config)
    except (head.HeadNotFoundError, head.HeadTimeoutError) as error:
        raise UsageError(
            f"--on {path}: cluster {cluster_name!r} must be up ({error}); start it: ray up {path}"
        ) from None
    print(f"{cluster_name}: connecting to {address}", flush=True)
    with head.open_tunnel(path) as dashboard:
        jobs = JobClient(dashboard, folder)
        if uploads and not options.stop:
            uploads.prepare(jobs)
        arguments = command_line.remote_command(options, uploads)
        remote = _RemoteCommand(
            jobs, path, cluster_name, shlex.join(["python", *arguments]), options, uploads
        )
        if arguments[:3] == ["-m", "orchestrator", "check"] or options.plan:
            return remote.run_short_command()
        return remote.run_study()


def _project_folder(path: Path, config: dict[str, Any]) -> str:
    """Return the project's folder on the head, quoted for a shell.

    Raises:
        UsageError: The file `path` does not send this program's sources to the head, or there is no clone.
    """
    sources = source_digest.PROJECT_ROOT / "orchestrator"
    for remote_path, local_path in config["file_mounts"].items():
        mounted = path.resolve().parent / Path(local_path).expanduser()
        if mounted.resolve() == sources:
            parent = Path(remote_path).parent.as_posix()
            return f"~/{shlex.quote(parent[2:])}" if parent.startswith("~/") else shlex.quote(parent)
    if not (source_digest.PROJECT_ROOT / "pyproject.toml").is_file():
        raise UsageError(
            f"--on {path}: runs the sources of a clone, and this program is installed without one; run "
            "`python -m orchestrator` in a clone of the repository."
        )
    raise UsageError(
        f"{path}, file_mounts: must send {sources} to the head, as cluster.yaml does; take the cluster.yaml "
        "beside it."
    )


def _check_sources(jobs: JobClient, path: Path) -> None:
    """Raise UsageError if the head does not have the sources of this machine."""
    remote_digests = json.loads(jobs.run_query("python -m orchestrator.cluster.remote.source_digest"))
    differing = source_digest.differing_files(source_digest.file_digests(), remote_digests)
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UsageError(
            f"--on {path}: the head must have the sources that are here, and {differing[0]}{more} differ; "
            f"ray up {path} sends them (it restarts Ray, which ends running studies)."
        )


@dataclass(frozen=True)
class _RemoteCommand:
    """A command that runs as a Ray job on the cluster's head."""

    jobs: JobClient
    path: Path
    cluster_name: str
    command: str
    options: StudyOptions
    uploads: Uploads

    def run_short_command(self) -> int:
        """Run a command that trains nothing, and end its job when this process ends.

        Returns:
            The exit code of the command.
        """
        job_id = self._submit()
        try:
            return self.jobs.follow_job(job_id)
        finally:
            self.jobs.delete_job(job_id)

    def _submit(self, job_id: str | None = None) -> str:
        """Send the files that the command names, start its job, and return the name of the job.

        Args:
            job_id: Name of the job. Default: a name of Ray's.
        """
        _check_sources(self.jobs, self.path)
        self.uploads.send(self.path, self.cluster_name)
        return self.jobs.submit_job(self.command, job_id)

    def run_study(self) -> int:
        """Start, follow or stop the study, and fetch its reports when it has ended."""
        study, job_id = command_line.study_key(self.options), command_line.study_job_id(self.options)
        job, command = self.jobs.find_job(job_id), self.command
        if self.options.stop:
            if job is None:
                raise UsageError(
                    f"--stop: {study!r} does not run on {self.cluster_name}; repeat the options "
                    "with which it was started."
                )
            self.jobs.stop_job(job_id)
            command = _submitted_command(job)
        elif job is None or _submitted_command(job) != self.command:
            self._start(study, job_id, job)
        else:
            state = "has ended there" if job.status.is_terminal() else "runs there"
            print(f"{self.cluster_name}: {study} {state}", flush=True)
        return self._follow(job_id, command)

    def _start(self, study: str, job_id: str, previous: JobDetails | None) -> None:
        """Start the study. `previous` is its job with other options, which must have ended."""
        if previous is not None and not previous.status.is_terminal():
            raise UsageError(
                f"--on {self.path}: {study!r} runs there with other options "
                f"({_submitted_command(previous)}); follow it with these, or end it (--stop), or choose "
                "another --study."
            )
        if previous is not None:
            self.jobs.delete_job(job_id)
        self._submit(job_id)
        print(f"{self.cluster_name}: {study} runs there; Ctrl-C leaves it running", flush=True)

    def _follow(self, job_id: str, command: str) -> int:
        """Show the output until the end, then fetch the reports and delete the job."""
        try:
            code = self.jobs.follow_job(job_id)
        except StudyError as error:
            raise StudyError(f"{error}; the study goes on there, and the same command follows it") from None
        except KeyboardInterrupt:
            again = format_command(sys.orig_argv[1:])
            state = f"goes on on {self.cluster_name}; to follow it: {again}; to end it: {again} --stop"
            state = f"ends on {self.cluster_name}" if self.options.stop else state
            print_on_own_line(f"detached: the study {state}")
            return EXIT_INTERRUPTED
        if code != EXIT_USAGE:
            self._download_results(command)
        self.jobs.delete_job(job_id)
        return code

    def _download_results(self, command: str) -> None:
        """Fetch the folders of the studies that the command has written."""
        query = f"python -m orchestrator.cluster.remote.study_folders {shlex.quote(command)}"
        for remote_folder in json.loads(self.jobs.run_query(query)):
            folder = self.options.output / Path(remote_folder).name
            head.download_folder(self.path, remote_folder, folder)
            report = folder / "report.html"
            print(f"Here     {report if report.exists() else folder}", flush=True)


def _submitted_command(job: JobDetails) -> str:
    return (job.metadata or {}).get("command", "")
