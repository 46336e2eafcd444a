"""Client of an EC2 machine's metadata service (IMDSv2), for the notice that a spot machine is taken back.

Uses the standard library only. boto3 reads credentials from the service by itself.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime

from orchestrator.util import timeouts

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Environment variable of the AWS SDKs with the service's URL."""
DEFAULT_ENDPOINT = "http://169.254.169.254"


class MetadataUnavailableError(Exception):
    """The metadata service does not respond, or gives an unexpected response. The message is one line."""


@dataclass(frozen=True)
class InterruptionNotice:
    """AWS will take the machine back."""

    action: str
    """terminate, stop or hibernate. All of them end the processes of this machine."""
    ends_at: float
    """End of the machine in seconds since the epoch."""

    def seconds_left(self, now: float) -> int:
        """Return the whole seconds from `now` to the end, at least 0."""
        return max(0, int(self.ends_at - now))


def parse_notice(text: str, now: float) -> InterruptionNotice:
    """Parse the service's JSON.

    Any response is a notice. Missing or unreadable values are replaced by AWS's promise.

    Args:
        text: The response.
        now: Seconds since the epoch.
    """
    action, ends_at = "terminate", now + timeouts.SPOT_NOTICE_SECONDS
    try:
        data = json.loads(text)
        action = str(data.get("action", action))
        ends_at = datetime.fromisoformat(data["time"].replace("Z", "+00:00")).timestamp()
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return InterruptionNotice(action, ends_at)


class MetadataClient:
    """Client of the service. Keeps IMDSv2's session token and replaces it when it has expired.

    Args:
        endpoint: URL of the service. Default: that of the environment, else AWS's.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT).rstrip("/")
        self._token = ""
        # Without proxies: a proxy would ask the service of its own machine.
        self._open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def fetch_notice(self) -> InterruptionNotice | None:
        """Return the notice, or None if there is none.

        Raises:
            MetadataUnavailableError: The service gives no valid response.
        """
        text = self._get("/latest/meta-data/spot/instance-action")
        return None if text is None else parse_notice(text, time.time())

    def _get(self, path: str) -> str | None:
        """Return the response's text, or None for status 404."""
        for _ in range(2):  # a second time if the token has expired
            self._token = self._token or self._request_token()
            status, text = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if status == 401:
                self._token = ""
                continue
            if status == 404:
                return None
            if status != 200:
                raise MetadataUnavailableError(f"{self.endpoint}{path} answers {status}")
            return text
        raise MetadataUnavailableError(f"{self.endpoint} rejects a token that it has just issued")

    def _request_token(self) -> str:
        seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(timeouts.IMDS_TOKEN_TTL_SECONDS)}
        status, token = self._request("PUT", "/latest/api/token", seconds)
        if status != 200 or not token:
            raise MetadataUnavailableError(f"{self.endpoint} gives no token ({status})")
        return token

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Send a request. Returns status and text; the text of an error is empty."""
        try:
            request = urllib.request.Request(self.endpoint + path, method=method, headers=headers)
            with self._open_url(request, timeout=timeouts.IMDS_REQUEST_SECONDS) as response:
                return response.status, response.read(65536).decode(errors="replace")
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, ""
        except (OSError, ValueError) as error:  # ValueError: the endpoint is no URL
            reason = getattr(error, "reason", error)
            raise MetadataUnavailableError(f"{self.endpoint} does not answer ({reason})") from None
