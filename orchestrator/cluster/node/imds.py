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

from orchestrator.util import timeouts

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the AWS SDKs' own variable
DEFAULT_ENDPOINT = "http://169.254.169.254"


class MetadataUnavailable(Exception):
    """The metadata service does not answer, or not as it should. Its text is one line."""


@dataclass(frozen=True)
class InterruptionNotice:
    """AWS takes the machine away."""

    action: str
    """terminate, stop or hibernate: for what runs here it is all the same."""
    ends_at: float
    """When, in seconds since the epoch."""

    def seconds_left(self, now: float) -> int:
        return max(0, int(self.ends_at - now))


def parse_notice(text: str, now: float) -> InterruptionNotice:
    """From the service's JSON. That there is an answer at all is the notice: what is missing in it or cannot
    be read is filled in with what AWS promises.
    """
    action, at = "terminate", now + timeouts.SPOT_NOTICE_SECONDS
    try:
        data = json.loads(text)
        action = str(data.get("action", action))
        at = datetime.fromisoformat(data["time"].replace("Z", "+00:00")).timestamp()
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return InterruptionNotice(action, at)


class MetadataClient:
    """Asks the service; keeps the session token that IMDSv2 wants and takes a new one when it has expired."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT).rstrip("/")
        self._token = ""
        # Never through a proxy: it would ask its own machine's service, or none.
        self._open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def fetch_notice(self) -> InterruptionNotice | None:
        """The notice, or None while there is none. Raises Away."""
        text = self._get("/latest/meta-data/spot/instance-action")
        return None if text is None else parse_notice(text, time.time())

    def _get(self, path: str) -> str | None:
        """None for a 404. Raises Away."""
        for _ in range(2):  # the second time with a new token
            self._token = self._token or self._request_token()
            status, text = self._request("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if status == 401:
                self._token = ""
                continue
            if status == 404:
                return None
            if status != 200:
                raise MetadataUnavailable(f"{self.endpoint}{path} answers {status}")
            return text
        raise MetadataUnavailable(f"{self.endpoint} takes no token that it has just given")

    def _request_token(self) -> str:
        seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(timeouts.IMDS_TOKEN_TTL_SECONDS)}
        status, token = self._request("PUT", "/latest/api/token", seconds)
        if status != 200 or not token:
            raise MetadataUnavailable(f"{self.endpoint} gives no token ({status})")
        return token

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        try:
            request = urllib.request.Request(self.endpoint + path, method=method, headers=headers)
            with self._open_url(request, timeout=timeouts.IMDS_REQUEST_SECONDS) as answer:
                return answer.status, answer.read(65536).decode(errors="replace")
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, ""
        except (OSError, ValueError) as error:  # refused, timed out, cut off; an endpoint that is no URL
            raise MetadataUnavailable(
                f"{self.endpoint} does not answer ({getattr(error, 'reason', error)})"
            ) from None
