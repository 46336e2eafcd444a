"""Commands as Ray jobs on a cluster's head: started, found again, followed, ended.

A job that runs belongs to the cluster, not to whoever started it. One whose end has been seen is deleted, so
that a job which is there either runs or has something to tell.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from orchestrator.util.command import EXIT_INTERRUPTED
from orchestrator.util.errors import StudyError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

ENTRYPOINT_LINE_PREFIX = "Running entrypoint for job "  # Ray's own, as what stands before it
POLL_SECONDS = 0.3
QUERY_TIMEOUT_SECONDS = 120.0
"""What a job gets that only answers."""


class JobClient:
    """Of the cluster whose dashboard answers at `address`, for commands in `folder` on its head."""

    def __init__(self, address: str, folder: str) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # of each connection's end
        with _translate_client_errors():
            self._client = JobSubmissionClient(address)
        # As a shell there has it; the driver's environment is else that of `ray start`.
        self._shell_prefix = f"[ ! -e ~/.lora_env ] || . ~/.lora_env; cd {folder} && exec "

    def find_job(self, study_key: str) -> JobDetails | None:
        """The newest of a study."""
        with _translate_client_errors():
            jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get("study") == study_key]
        return max(jobs, key=lambda job: job.start_time or 0, default=None)

    def submit_job(self, study_key: str, command: str) -> JobDetails:
        """Of a study, or with no name a job that nobody looks for."""
        name = re.sub(r"[^\w.-]+", "-", study_key or "question")
        with _translate_client_errors():
            job = self._client.submit_job(
                entrypoint=self._shell_prefix + command,
                submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                metadata={"study": study_key, "command": command} if study_key else {},
            )
            return self._client.get_job_info(job)

    def run_query(self, command: str) -> str:
        """What a short command prints last. Raises Trouble where it fails."""
        job = self.submit_job("", command)
        until = time.monotonic() + QUERY_TIMEOUT_SECONDS
        try:
            while not (ended := self._terminal_info(job)):
                if time.monotonic() > until:
                    raise StudyError(
                        f"the head has not answered within {QUERY_TIMEOUT_SECONDS:g} s: {command}"
                    )
                time.sleep(POLL_SECONDS)
            lines = self.read_log(job).splitlines() or [ended.message or ""]
            if code := _exit_code(ended):
                raise StudyError(f"the head: {command}: {lines[-1]} (exit code {code})")
            return lines[-1]
        finally:
            self.delete_job(job)

    def read_log(self, job: JobDetails) -> str:
        with _translate_client_errors():
            return str(self._client.get_job_logs(_submission_id(job)))

    def follow_job(self, job: JobDetails, skip_characters: int = 0) -> int:
        """Prints what it says, from the character `skip` on, and returns its exit code when it has ended.
        Raises Trouble when the connection is lost.
        """
        out = _LogPrinter(skip_characters)
        with _translate_client_errors():
            while not (ended := self._terminal_info(job)):
                asyncio.run(self._print_log_tail(job, out))
                time.sleep(POLL_SECONDS)
        out.restart()
        out.write(self.read_log(job))  # the tail may lack its last words
        out.flush()
        code = _exit_code(ended)
        if code and ended.driver_exit_code is None and code != EXIT_INTERRUPTED:
            print(f"error: {ended.message or 'the job failed'}", file=sys.stderr)
        return code

    async def _print_log_tail(self, job: JobDetails, printer: _LogPrinter) -> None:
        printer.restart()
        async for text in self._client.tail_job_logs(_submission_id(job)):
            printer.write(text)

    def stop_job(self, job: JobDetails) -> None:
        """Asks it to end, as SIGTERM does."""
        with _translate_client_errors():
            self._client.stop_job(_submission_id(job))

    def delete_job(self, job: JobDetails) -> None:
        """When it has ended; ends it first where need be."""
        with suppress(StudyError), _translate_client_errors():  # it is gone, or another has done so
            if not self._terminal_info(job):
                self._client.stop_job(_submission_id(job))
                while not self._terminal_info(job):
                    time.sleep(POLL_SECONDS)
            self._client.delete_job(_submission_id(job))

    def _terminal_info(self, job: JobDetails) -> JobDetails | None:
        now = self._client.get_job_info(_submission_id(job))
        return now if now.status.is_terminal() else None


class _LogPrinter:
    """Prints whole lines, each once: a log is told from its beginning whenever it is asked for."""

    def __init__(self, skip_characters: int) -> None:
        self._printed_characters, self._position, self._partial_line = skip_characters, 0, ""
        self._is_printing = skip_characters > 0

    def restart(self) -> None:
        self._position = 0

    def write(self, text: str) -> None:
        new = text[max(0, self._printed_characters - self._position) :]
        self._position += len(text)
        self._printed_characters = max(self._printed_characters, self._position)
        *lines, self._partial_line = (self._partial_line + new).split("\n")
        for line in lines:
            self._print_line(line)

    def flush(self) -> None:
        if self._partial_line:
            self._print_line(self._partial_line)

    def _print_line(self, line: str) -> None:
        if self._is_printing:
            print(line, file=sys.stderr if line.startswith("error: ") else sys.stdout, flush=True)
        self._is_printing = self._is_printing or line.startswith(ENTRYPOINT_LINE_PREFIX)


def _submission_id(job: JobDetails) -> str:
    assert job.submission_id is not None  # only a driver that is no job has none
    return job.submission_id


def _exit_code(job: JobDetails) -> int:
    from ray.job_submission import JobStatus

    if job.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    return 0 if job.status == JobStatus.SUCCEEDED else job.driver_exit_code or 1


@contextmanager
def _translate_client_errors() -> Iterator[None]:
    """Raises Trouble for what Ray's client raises when the cluster cannot be talked to."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        message = "the token is not the cluster's: ~/.ray/auth_token must be what `ray up` has sent there"
        raise StudyError(f"the cluster's dashboard: {message}") from None
    except (aiohttp.ClientError, requests.RequestException, ConnectionError, RuntimeError) as error:
        message = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise StudyError(f"the cluster's dashboard: {message}") from None
