"""Client of an EC2 machine's metadata service (IMDSv2), for the notice that a spot machine is taken back."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime

import requests

from orchestrator.util import timeouts

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Environment variable of the AWS SDKs with the service's URL."""
DEFAULT_ENDPOINT = "http://169.254.169.254"


class MetadataUnavailableError(Exception):
    """The metadata service does not respond, or gives an unexpected response. The message is one line."""


@dataclass(frozen=True)
class InterruptionNotice:
    """The notice that AWS will take the machine back."""

    action: str
    """terminate, stop or hibernate. All of them end the processes of this machine."""
    ends_at: float
    """End of the machine in seconds since the epoch."""

    def seconds_left(self, now: float) -> int:
        """Return the whole seconds from `now` to the end, at least 0."""
        return max(0, int(self.ends_at - now))


def parse_notice(text: str, now: float) -> InterruptionNotice:
    """Parse the service's JSON.

    Any response is a notice. If values are missing or unreadable, the machine is assumed to be terminated
    `SPOT_NOTICE_SECONDS` from now, the notice that AWS promises.

    Args:
        text: The response.
        now: Seconds since the epoch.
    """
    action, ends_at = "terminate", now + timeouts.SPOT_NOTICE_SECONDS
    try:
        data = json.loads(text)
        action = str(data.get("action", action))
        ends_at = datetime.fromisoformat(data["time"]).timestamp()
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return InterruptionNotice(action, ends_at)


class MetadataClient:
    """Client of the service. Keeps IMDSv2's session token and replaces it when it has expired."""

    def __init__(self) -> None:
        self.endpoint = (os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT).rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy would ask the service of its own machine

    def fetch_notice(self) -> InterruptionNotice | None:
        """Return the notice, or None if there is none.

        Raises:
            MetadataUnavailableError: The service gives no valid response.
        """
        try:
            response = self._request("GET", "/latest/meta-data/spot/instance-action")
            if response.status_code == 401:  # no token so far, or an expired one
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(timeouts.IMDS_TOKEN_TTL_SECONDS)}
                token = self._request("PUT", "/latest/api/token", lifetime)
                token.raise_for_status()
                self._session.headers["X-aws-ec2-metadata-token"] = token.text
                response = self._request("GET", "/latest/meta-data/spot/instance-action")
            if response.status_code == 404:
                return None
            response.raise_for_status()
        except requests.RequestException as error:
            status = None if error.response is None else error.response.status_code
            reason = f"status {status}" if status else type(error).__name__
            raise MetadataUnavailableError(f"{self.endpoint} does not answer ({reason})") from None
        return parse_notice(response.text, time.time())

    def _request(self, method: str, path: str, headers: dict[str, str] | None = None) -> requests.Response:
        url = self.endpoint + path
        return self._session.request(method, url, headers=headers, timeout=timeouts.IMDS_REQUEST_SECONDS)
