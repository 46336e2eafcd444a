"""How every command of this project ends: an exit code, and for a wrong value one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from orchestrator.study.errors import BadInput, Trouble


def main(run: Callable[[], int | None]) -> NoReturn:
    """Calls `run` and exits with what it returns (None is 0).

    A `BadInput` is one line on stderr and exit code 2, a `Trouble` one line and exit code 1, Ctrl-C is exit
    code 130, all without a traceback. Any other exception is a bug and shows itself.
    """
    try:
        code = run() or 0
        sys.stdout.flush()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Trouble as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `... show abc | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
