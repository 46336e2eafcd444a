"""The metadata service of an EC2 machine (IMDSv2): is this spot machine about to be taken away?

Standard library only. Only what a spot watcher needs; boto3 reads credentials there by itself.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the AWS SDKs' own variable
DEFAULT_ENDPOINT = "http://169.254.169.254"
WARNING_SECONDS = 120.0  # what AWS promises between a notice and the end
_TOKEN_SECONDS = 21600  # the longest that AWS gives
_PATIENCE = 2.0


class Away(Exception):
    """The metadata service does not answer, or not as it should. Its text is one line."""


@dataclass(frozen=True)
class Notice:
    """AWS takes the machine away."""

    action: str
    """terminate, stop or hibernate: for what runs here it is all the same."""
    at: float
    """When, in seconds since the epoch."""

    def seconds_left(self, now: float) -> int:
        return max(0, int(self.at - now))


def read_notice(text: str, now: float) -> Notice:
    """From the service's JSON. That there is an answer at all is the notice: what is missing in it or cannot
    be read is filled in with what AWS promises."""
    action, at = "terminate", now + WARNING_SECONDS
    try:
        data = json.loads(text)
        action = str(data.get("action", action))
        at = datetime.fromisoformat(data["time"].replace("Z", "+00:00")).timestamp()
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return Notice(action, at)


class Metadata:
    """Asks the service; keeps the session token that IMDSv2 wants and takes a new one when it has expired."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get(ENDPOINT) or DEFAULT_ENDPOINT).rstrip("/")
        self._token = ""
        # Never through a proxy: it would ask its own machine's service, or none.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def notice(self) -> Notice | None:
        """The notice, or None while there is none. Raises Away."""
        text = self._get("/latest/meta-data/spot/instance-action")
        return None if text is None else read_notice(text, time.time())

    def _get(self, path: str) -> str | None:
        """None for a 404. Raises Away."""
        for _ in range(2):  # the second time with a new token
            self._token = self._token or self._new_token()
            status, text = self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if status == 401:
                self._token = ""
                continue
            if status == 404:
                return None
            if status != 200:
                raise Away(f"{self.endpoint}{path} answers {status}")
            return text
        raise Away(f"{self.endpoint} takes no token that it has just given")

    def _new_token(self) -> str:
        seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
        status, token = self._ask("PUT", "/latest/api/token", seconds)
        if status != 200 or not token:
            raise Away(f"{self.endpoint} gives no token ({status})")
        return token

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        try:
            request = urllib.request.Request(self.endpoint + path, method=method, headers=headers)
            with self._open(request, timeout=_PATIENCE) as answer:
                return answer.status, answer.read(65536).decode(errors="replace")
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, ""
        except (OSError, ValueError) as error:  # refused, timed out, cut off; an endpoint that is no URL
            raise Away(f"{self.endpoint} does not answer ({getattr(error, 'reason', error)})") from None
