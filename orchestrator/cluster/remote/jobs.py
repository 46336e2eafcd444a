"""Commands as Ray jobs on a cluster's head: submit, find again, follow, stop.

A running job belongs to the cluster, not to the process that has submitted it. A job whose end has been shown
is deleted. A job that exists therefore either runs or has results that nobody has seen.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError
from orchestrator.util.graceful_interrupts import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

RAY_LINE = re.compile(r"Running entrypoint for job |\S+ \S+\tINFO job_manager\.py:")
"""Beginning of the lines that Ray writes into a job's log. They may follow the first lines of the program."""


class JobClient:
    """The jobs of one cluster.

    Args:
        address: URL of the cluster's dashboard.
        folder: Folder on the head in which commands run, quoted for a shell.
    """

    def __init__(self, address: str, folder: str) -> None:
        from ray.job_submission import JobSubmissionClient

        # Ray logs the end of every connection.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
        with _translate_client_errors():
            self._client = JobSubmissionClient(address)
        # A job inherits the environment of `ray start`; shells on the head read ~/.lora_env.
        self._shell_prefix = f"[ ! -e ~/.lora_env ] || . ~/.lora_env; cd {folder} && exec "

    def find_job(self, job_id: str) -> JobDetails | None:
        """Return the job, or None if there is none of this name."""
        with _translate_client_errors():
            return next((job for job in self._client.list_jobs() if job.submission_id == job_id), None)

    def submit_job(self, command: str, job_id: str | None = None) -> str:
        """Start a command and return the name of its job.

        Args:
            command: The command for a shell.
            job_id: Name of the job; Ray refuses a name that exists. Default: a name of Ray's.
        """
        with _translate_client_errors():
            return self._client.submit_job(
                entrypoint=self._shell_prefix + command, submission_id=job_id, metadata={"command": command}
            )

    def run_query(self, command: str) -> str:
        """Run a short command and return the last line that it prints.

        Raises:
            StudyError: The command has failed, or takes longer than `JOB_QUERY_SECONDS`.
        """
        lines = [""]
        job_id = self.submit_job(command)
        try:
            code = self.follow_job(job_id, lines.append, timeouts.JOB_QUERY_SECONDS)
        finally:
            self.delete_job(job_id)
        if code:
            raise StudyError(f"the head: {command}: {lines[-1]} (exit code {code})")
        return lines[-1]

    def follow_job(
        self, job_id: str, write_line: Callable[[str], object] | None = None, timeout: float | None = None
    ) -> int:
        """Show the output of a job from the beginning until it ends.

        Args:
            job_id: Name of the job.
            write_line: Receives each line. Default: print it, errors to stderr.
            timeout: Seconds to wait for the end. Default: no limit.

        Returns:
            The exit code of the job's command.

        Raises:
            StudyError: The connection is lost, or the time is over.
        """
        write_line = write_line or _print_line
        with _translate_client_errors():
            asyncio.run(asyncio.wait_for(self._read_log(job_id, write_line), timeout))
            job = self._client.get_job_info(job_id)
        if not job.status.is_terminal():
            raise StudyError("the cluster's dashboard: it has closed the connection")
        code = _exit_code(job)
        if code and job.driver_exit_code is None and code != EXIT_INTERRUPTED:  # Ray could not start it
            write_line(f"error: {job.message or 'the job failed'}")
        return code

    async def _read_log(self, job_id: str, write_line: Callable[[str], object]) -> None:
        partial_line = ""
        async for text in self._client.tail_job_logs(job_id):
            *lines, partial_line = (partial_line + text).split("\n")
            for line in lines:
                if not RAY_LINE.match(line):
                    write_line(line)
        if partial_line:
            write_line(partial_line)

    def stop_job(self, job_id: str) -> None:
        """Send SIGTERM to the job's command."""
        with _translate_client_errors():
            self._client.stop_job(job_id)

    def delete_job(self, job_id: str) -> None:
        """Delete the job, and stop it first if it runs. A job that is gone is ignored."""
        with suppress(StudyError), _translate_client_errors():
            self._client.stop_job(job_id)
            while not self._client.get_job_info(job_id).status.is_terminal():
                time.sleep(timeouts.JOB_POLL_SECONDS)
            self._client.delete_job(job_id)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr if line.startswith("error: ") else sys.stdout, flush=True)


def _exit_code(job: JobDetails) -> int:
    from ray.job_submission import JobStatus

    if job.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    return 0 if job.status == JobStatus.SUCCEEDED else job.driver_exit_code or 1


@contextmanager
def _translate_client_errors() -> Iterator[None]:
    """Raise StudyError for the errors of Ray's client."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        reason = "~/.ray/auth_token is not the cluster's; use the token that `ray up` has sent there"
    except TimeoutError:
        reason = "it does not answer in time"
    except (aiohttp.ClientError, requests.RequestException, ConnectionError, RuntimeError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    else:
        return
    raise StudyError(f"the cluster's dashboard: {reason}")
