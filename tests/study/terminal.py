"""A pseudo-terminal for tests of commands, with methods to type keys and to read its screen."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CTRL_C = b"\x03"
HEAD = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
"""Code that makes the terminal the controlling one of the process, so that Ctrl-C sends a signal."""
LIMIT_SECONDS = 200.0


class Terminal:
    """A Python program in its own terminal.

    Attributes:
        shown: All that was written to the terminal so far.
    """

    def __init__(self, program: Path) -> None:
        self.shown, self._seen = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ours, theirs = pty.openpty()
        program.write_text(HEAD + program.read_text())
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        )
        os.close(theirs)

    def wait_for(self, text: str) -> None:
        """Read until `text` has been shown since the last call; fail if the program ends first."""
        while text not in self.shown[self._seen :]:
            assert self._read(), f"the program ended without {text!r}: {self.shown!r}"
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, keys: bytes) -> None:
        """Type `keys`."""
        os.write(self._ours, keys)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end of the program. Return its exit code and the lines on the screen, without empty
        lines at the end."""
        while self._read():
            pass
        os.close(self._ours)
        return self._process.wait(LIMIT_SECONDS), screen(self.shown)

    def _read(self) -> bool:
        """Read the next output. Return False at the end."""
        assert select.select([self._ours], [], [], LIMIT_SECONDS)[0], (
            f"nothing more was shown: {self.shown!r}"
        )
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux raises this when the other side is closed.
            return False
        self.shown += self._decoder.decode(data)  # A character may arrive in two parts.
        return bool(data)


def screen(shown: str) -> list[str]:
    """Return the lines that a terminal shows after all of `shown`, without empty lines at the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", shown):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def hides_cursor(shown: str) -> bool:
    """Return whether the cursor is hidden after all of `shown`."""
    return shown.rfind("\x1b[?25l") > shown.rfind("\x1b[?25h")
