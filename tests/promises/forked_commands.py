"""Run `lora-orchestrator` commands in forks of one process, because a new process spends seconds on imports.

python tests/promises/forked_commands.py FIRST     FIRST: commands as JSON; reads a command per line of stdin

The program is called through its installed entry point, as from a shell. The first commands run in the
process itself, which then has imported what commands need. Each later command runs in a fork of its own, so
that no command sees the state of another one.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import as_a_user

PROGRAM = "lora-orchestrator"


class Commands:
    """A process that runs each command in a fork of itself.

    Args:
        first: Commands that the process runs without a fork, for their imports. They may fail.
        folder: The working folder of the first commands.
        variables: Environment variables to set.
    """

    def __init__(self, *first: Sequence[str], folder: Path, **variables: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.temporary = Path(tempfile.mkdtemp())  # a short path, as Ray's sockets need it
        variables = {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.temporary)} | variables
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | variables,
            cwd=folder,
            start_new_session=True,
        )

    def run(self, *words: str | Path, cwd: Path, **variables: str) -> as_a_user.Result:
        """Run a command in the folder `cwd`, with environment variables, and return its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[str(word) for word in words], str(cwd), variables]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that runs the commands has ended"
        return as_a_user.Result(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=as_a_user.HANG_SECONDS)


def _run(words: list[str], cwd: str, out: Any, err: Any) -> None:
    """Run the program in this process, with its output in two files, and exit with its exit status."""
    os.chdir(cwd)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "rw"[number > 0]) for number in range(3))
    sys.argv = [PROGRAM, *words]
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    code = 0
    try:
        program.load()()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _warm_up(words: list[str]) -> None:
    """Run a command in this process, and discard its output."""
    sys.argv = [PROGRAM, *words]
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    nowhere = io.StringIO()
    with suppress(SystemExit), redirect_stdout(nowhere), redirect_stderr(nowhere):
        program.load()()


def main() -> None:
    """Run the commands of the command line, then those of standard input."""
    for words in json.loads(sys.argv[1]):
        _warm_up(words)
    replies = sys.stdout
    for line in sys.stdin:
        words, cwd, variables = json.loads(line)
        with tempfile.TemporaryFile(dir="/dev/shm") as out, tempfile.TemporaryFile(dir="/dev/shm") as err:
            child = os.fork()
            if child == 0:
                os.environ.update(variables)
                tempfile.tempdir = None  # so that the command reads its own TMPDIR
                _run(words, cwd, out, err)
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        result = as_a_user.Result(os.waitstatus_to_exitcode(status), *texts)
        print(json.dumps(vars(result)), file=replies, flush=True)


if __name__ == "__main__":
    main()
