"""The limits of a run and its progress: a live line on a terminal, plain lines elsewhere, and log files.

All other lines also go to `study.log`. Standard output and standard error go to `ray.log`.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from orchestrator.record.schema import Record
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

INTERRUPTED = "Ctrl-C"
"""The stop reason after Ctrl-C or SIGTERM."""
MIN_MEASURED_STEPS = 5
"""Optimizer steps, of all lanes, whose pace is an estimate of the remaining time."""


@dataclass
class RunBudget:
    """The time limits of a run, and the reason to stop it.

    The driver calls `update` at every poll. Earlier runs of the same study do not count.
    """

    max_hours: float | None = None
    max_gpu_hours: float | None = None
    started_at: float = field(default_factory=time.monotonic)
    """Start of the run in seconds, on the clock of `update`."""
    gpus_per_trainer: float = 0.0
    """GPUs that all workers of a trainer reserve together."""
    used_gpu_hours: float = 0.0
    """GPU hours so far. A trainer counts from its first call of the broker until the broker removes it."""
    stop_reason: str = ""
    """The reason to stop: the limit as the user typed it, or INTERRUPTED; empty while the run continues."""
    interrupted_at: float | None = None
    """Monotonic time of Ctrl-C in seconds; None without Ctrl-C."""
    _last_update: tuple[float, int] | None = None
    """Time of the last update, and the number of trainers that were alive."""

    def set_gpus_per_trainer(self, gpus_per_trainer: float) -> None:
        """Set the number of GPUs that each trainer reserves.

        Raises:
            UsageError: GPU hours are limited and the trainers reserve no GPU.
        """
        if self.max_gpu_hours is not None and not gpus_per_trainer:
            raise UsageError(
                f"--max-gpu-hours {self.max_gpu_hours:g}: the trainers hold no GPU; take --max-hours."
            )
        self.gpus_per_trainer = gpus_per_trainer

    @property
    def is_interrupted(self) -> bool:
        """True if the user has interrupted the run."""
        return self.interrupted_at is not None

    @property
    def save_timeout(self) -> float:
        """Seconds that trainers get to save their lanes."""
        return timeouts.INTERRUPT_SAVE_SECONDS if self.is_interrupted else timeouts.SAVE_SECONDS

    def interrupt_seconds_left(self) -> float:
        """Return the seconds left until the deadline after Ctrl-C; infinity without Ctrl-C."""
        if self.interrupted_at is None:
            return math.inf
        return timeouts.INTERRUPT_DEADLINE_SECONDS - (time.monotonic() - self.interrupted_at)

    def request_stop(self, reason: str = INTERRUPTED) -> None:
        """Make the next update return a stop reason; Ctrl-C replaces an earlier reason."""
        if reason == INTERRUPTED:
            self.stop_reason, self.interrupted_at = reason, time.monotonic()
        self.stop_reason = self.stop_reason or reason

    def update(self, live_trainers: int, now: float) -> str:
        """Add the GPU hours since the last update, and return the stop reason.

        A trainer that has started since the last update counts from now on. A trainer that has ended since
        then counts until now.

        Args:
            live_trainers: Number of trainers that are alive.
            now: Monotonic time in seconds.
        """
        before, earlier_trainers = self._last_update or (now, 0)
        self.used_gpu_hours += self.gpus_per_trainer * earlier_trainers * (now - before) / 3600
        self._last_update = now, live_trainers
        if self.max_hours is not None and now - self.started_at >= self.max_hours * 3600:
            self.request_stop(f"--max-hours {self.max_hours:g}")
        if self.max_gpu_hours is not None and self.used_gpu_hours >= self.max_gpu_hours:
            self.request_stop(f"--max-gpu-hours {self.max_gpu_hours:g}")
        return self.stop_reason

    def format_usage(self) -> str:
        """Return the GPU hours used, as text; empty for a study without GPUs."""
        return f"{self.used_gpu_hours:.3g} GPU hours" if self.gpus_per_trainer else ""


class _LogFile(io.TextIOWrapper):
    """Log file that drops what it cannot write, since a full disk must not end a study here.

    It also drops what another thread writes after the file was closed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("ab", buffering=0), encoding="utf-8", write_through=True)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            super().write(text)
        return len(text)


@dataclass
class Progress:
    """The numbers and messages that the user of a running study sees.

    As a context manager, it opens `study.log`, and redirects standard output and standard error to `ray.log`.
    Before and after, lines are printed only.
    """

    folder: Path
    """Folder of the study, for the log files."""
    total: int
    """Number of configurations of the study."""
    cached: int
    """Number of configurations whose results were known before the run."""
    console: Console
    """Console that writes to its own file, so that the redirection does not affect it."""
    ended: Counter[str] = field(default_factory=Counter)
    """Number of lanes that ended in this run, by state."""
    training: int = 0

    live_trainers: int = 0
    waiting_for: str = ""
    """The kind of node without which no trainer can start; empty if no node is missing."""
    best: tuple[float, str] | None = None
    """The best validation score so far, and the variant and learning rate that reached it."""
    first_lane_at: float | None = None
    steps_taken: int = 0
    """Optimizer steps of all lanes, including those in training."""
    max_steps: int = 0
    """Optimizer steps of all configurations to train, if every lane is trained to its end; 0 if unknown."""
    _first_steps: tuple[float, int] | None = None
    """The time at which the first steps were counted, and their number."""
    _saved_steps: int = 0
    """Steps that are not taken because their lanes have ended early."""
    _seen: set[str] = field(default_factory=set)
    _live: Live | None = None
    _log: _LogFile | None = None
    _last_plain: tuple[float, str] = (-math.inf, "")
    """Time and text of the last line of `refresh` where there is no terminal."""

    def __enter__(self) -> Progress:
        with ExitStack() as stack:
            self._log = stack.enter_context(_LogFile(self.folder / "study.log"))
            noise = stack.enter_context(_LogFile(self.folder / "ray.log"))
            stack.enter_context(redirect_stdout(noise))
            stack.enter_context(redirect_stderr(noise))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def notify(self, text: str) -> None:
        """Print a permanent line, and write it to `study.log`."""
        if self._live is None:  # the terminal may have echoed ^C; a live display clears its line itself
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 0)))
        self.console.print(text, markup=False, soft_wrap=True)
        self._write_log(text)

    def add_record(self, record: Record) -> None:
        """Count a lane that has ended, and write its result to `study.log`."""
        if record.fingerprint in self._seen:
            return
        self._seen.add(record.fingerprint)
        self.ended[record.state] += 1
        self._saved_steps += record.configuration.lr_schedule.steps - record.steps
        score = record.score("validation")
        rate = record.configuration.optimizer.learning_rate
        name = record.configuration.variant.name
        if score is not None and (self.best is None or score > self.best[0]):
            self.best = score, f"{name} {rate:g}"
        self._write_log(
            f"{record.fingerprint[:12]} {name} lr={rate:g} seed={record.configuration.seed} {record.state}"
            + ("" if score is None else f" validation={score:.4f}")
            + (f" ({record.reason})" if record.reason else "")
        )

    def refresh(self) -> None:
        """Refresh the live line; where there is no terminal, print it from time to time if it has changed."""
        if not self.console.is_terminal:
            (shown_at, shown), line, now = self._last_plain, self.status_line(), time.monotonic()
            if line != shown and now - shown_at > timeouts.PLAIN_LINE_INTERVAL_SECONDS:
                self._last_plain = now, line
                self.notify(line)
            return
        if self._live is None:  # an earlier start would overwrite the message of a Ctrl-C during Ray's start
            live = Live(console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live = self._stack.enter_context(live)
        self._live.update(Text(self.status_line(), no_wrap=True, overflow="ellipsis"))

    def status_line(self) -> str:
        """Return the live line, the most important numbers first: a narrow terminal shows its beginning."""
        parts = [f"{self.cached + self.ended.total()}/{self.total} done"]
        if self.live_trainers == 0:
            parts.append(f"waiting for {self.waiting_for}" if self.waiting_for else "trainers start")
        if (left := self.seconds_left()) is not None:
            parts.append(f"{format_duration(left)} left")
        states = ("failed", "diverged", "stopped")
        parts += [f"{self.ended[state]} {state}" for state in states if self.ended[state]]
        parts.append(f"{self.training} training")
        if self.max_steps:
            parts.append(f"{self.steps_taken}/{self.max_steps - self._saved_steps} steps")
        if self.best is not None:
            parts.append("best {:.3f} {}".format(*self.best))
        return " | ".join(parts)

    def count_steps(self, steps_taken: int) -> None:
        """Set the number of steps taken, and begin to measure their pace with the first ones."""
        self.steps_taken = steps_taken
        if self._first_steps is None and steps_taken:
            self._first_steps = time.monotonic(), steps_taken

    def seconds_left(self) -> float | None:
        """Estimate the remaining seconds from the pace of the steps, or return None if it is not known.

        Steps of an earlier run make the estimate too long, and repeated steps make it too short.
        """
        left = self.max_steps - self._saved_steps - self.steps_taken
        if self._first_steps is None or left <= 0:
            return None
        since, first = self._first_steps
        measured = self.steps_taken - first
        return (time.monotonic() - since) / measured * left if measured >= MIN_MEASURED_STEPS else None

    def describe_ended(self, seconds: float) -> str:
        """Return how many lanes were trained in a time, stopped early, and failed."""
        stopped, failed = self.ended["stopped"], self.ended["failed"]
        return (
            f"{self.ended.total() - failed} trained in {format_duration(seconds)}"
            + (f", {stopped} of them stopped early" if stopped else "")
            + (f", {failed} failed" if failed else "")
        )

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: "12 s", "3 min 7 s" or "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        hours, minutes = divmod(round(whole / 60), 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    minutes, rest = divmod(whole, 60)
    parts = [f"{number} {unit}" for number, unit in ((minutes, "min"), (rest, "s")) if number]
    return " ".join(parts) or "0 s"
