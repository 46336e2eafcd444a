"""Short messages from the exceptions of Ray, which wrap each other."""

from __future__ import annotations

from orchestrator.util.redaction import redact_secrets

MAX_MESSAGE_LENGTH = 300


def format_ray_error(error: BaseException) -> str:
    """Return the last non-empty line of an error's message, without secrets.

    Ray puts the message of the original error at the end of the wrapping ones. The name of the error's type
    is returned if there is no message.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact_secrets(lines[-1])[:MAX_MESSAGE_LENGTH] if lines else type(error).__name__
