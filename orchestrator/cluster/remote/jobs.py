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

from orchestrator.util.command import INTERRUPTED
from orchestrator.util.errors import Trouble

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

FIRST_LINE = "Running entrypoint for job "  # Ray's own, as what stands before it
POLL_SECONDS = 0.3
SHORT_SECONDS = 120.0
"""What a job gets that only answers."""


class Jobs:
    """Of the cluster whose dashboard answers at `address`, for commands in `folder` on its head."""

    def __init__(self, address: str, folder: str) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # of each connection's end
        with _as_trouble():
            self._client = JobSubmissionClient(address)
        # As a shell there has it; the driver's environment is else that of `ray start`.
        self._before = f"[ ! -e ~/.lora_env ] || . ~/.lora_env; cd {folder} && exec "

    def find(self, study: str) -> JobDetails | None:
        """The newest of a study."""
        with _as_trouble():
            jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get("study") == study]
        return max(jobs, key=lambda job: job.start_time or 0, default=None)

    def start(self, study: str, command: str) -> JobDetails:
        """Of a study, or with no name a job that nobody looks for."""
        name = re.sub(r"[^\w.-]+", "-", study or "question")
        with _as_trouble():
            job = self._client.submit_job(
                entrypoint=self._before + command,
                submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                metadata={"study": study, "command": command} if study else {},
            )
            return self._client.get_job_info(job)

    def ask(self, command: str) -> str:
        """What a short command prints last. Raises Trouble where it fails."""
        job = self.start("", command)
        until = time.monotonic() + SHORT_SECONDS
        try:
            while not (ended := self._ended(job)):
                if time.monotonic() > until:
                    raise Trouble(f"the head has not answered within {SHORT_SECONDS:g} s: {command}")
                time.sleep(POLL_SECONDS)
            said = self.log(job).splitlines() or [ended.message or ""]
            if code := _code(ended):
                raise Trouble(f"the head: {command}: {said[-1]} (exit code {code})")
            return said[-1]
        finally:
            self.forget(job)

    def log(self, job: JobDetails) -> str:
        with _as_trouble():
            return str(self._client.get_job_logs(_id(job)))

    def follow(self, job: JobDetails, skip: int = 0) -> int:
        """Prints what it says, from the character `skip` on, and returns its exit code when it has ended.
        Raises Trouble when the connection is lost."""
        out = _Lines(skip)
        with _as_trouble():
            while not (ended := self._ended(job)):
                asyncio.run(self._tail(job, out))
                time.sleep(POLL_SECONDS)
        out.again()
        out.put(self.log(job))  # the tail may lack its last words
        out.end()
        code = _code(ended)
        if code and ended.driver_exit_code is None and code != INTERRUPTED:
            print(f"error: {ended.message or 'the job failed'}", file=sys.stderr)
        return code

    async def _tail(self, job: JobDetails, out: _Lines) -> None:
        out.again()
        async for text in self._client.tail_job_logs(_id(job)):
            out.put(text)

    def stop(self, job: JobDetails) -> None:
        """Asks it to end, as SIGTERM does."""
        with _as_trouble():
            self._client.stop_job(_id(job))

    def forget(self, job: JobDetails) -> None:
        """When it has ended; ends it first where need be."""
        with suppress(Trouble), _as_trouble():  # it is gone, or another has done so
            if not self._ended(job):
                self._client.stop_job(_id(job))
                while not self._ended(job):
                    time.sleep(POLL_SECONDS)
            self._client.delete_job(_id(job))

    def _ended(self, job: JobDetails) -> JobDetails | None:
        now = self._client.get_job_info(_id(job))
        return now if now.status.is_terminal() else None


class _Lines:
    """Prints whole lines, each once: a log is told from its beginning whenever it is asked for."""

    def __init__(self, skip: int) -> None:
        self._shown, self._at, self._rest = skip, 0, ""
        self._begun = skip > 0

    def again(self) -> None:
        self._at = 0

    def put(self, text: str) -> None:
        new = text[max(0, self._shown - self._at) :]
        self._at += len(text)
        self._shown = max(self._shown, self._at)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._print(line)

    def end(self) -> None:
        if self._rest:
            self._print(self._rest)

    def _print(self, line: str) -> None:
        if self._begun:
            print(line, file=sys.stderr if line.startswith("error: ") else sys.stdout, flush=True)
        self._begun = self._begun or line.startswith(FIRST_LINE)


def _id(job: JobDetails) -> str:
    assert job.submission_id is not None  # only a driver that is no job has none
    return job.submission_id


def _code(job: JobDetails) -> int:
    from ray.job_submission import JobStatus

    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    return 0 if job.status == JobStatus.SUCCEEDED else job.driver_exit_code or 1


@contextmanager
def _as_trouble() -> Iterator[None]:
    """Raises Trouble for what Ray's client raises when the cluster cannot be talked to."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        said = "the token is not the cluster's: ~/.ray/auth_token must be what `ray up` has sent there"
        raise Trouble(f"the cluster's dashboard: {said}") from None
    except (aiohttp.ClientError, requests.RequestException, ConnectionError, RuntimeError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Trouble(f"the cluster's dashboard: {said}") from None
