"""A local HTTP server that behaves like EC2's metadata service, version 2."""

from __future__ import annotations

import json
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service:
    """The server. Tests can delete its tokens, make it give a notice, and close it.

    Args:
        port: The port on which it listens, or 0 for any free port.
        address: The address on which it listens.
    """

    def __init__(self, port: int = 0, address: str = "127.0.0.1") -> None:
        self.tokens: set[str] = set()
        self.rights: dict[str, str] = {}
        """Response with the keys of each role, for a machine with an instance profile."""
        self.notice: str | None = None
        self.status: int | None = None
        """HTTP status of every response, or None for the regular status."""
        self.requested_paths: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if self.path != "/latest/api/token" or not 1 <= int(lifetime or 0) <= 21600:
                    return self._answer(400)
                token = uuid.uuid4().hex
                service.tokens.add(token)
                self._answer(200, token)

            def do_GET(self) -> None:
                service.requested_paths.append(self.path)
                if self.headers.get("X-aws-ec2-metadata-token") not in service.tokens:
                    return self._answer(401)
                text = service.text(self.path)
                self._answer(404 if text is None else 200, text or "")

            def _answer(self, status: int, text: str = "") -> None:
                self.send_response(service.status or status)
                self.end_headers()
                with suppress(BrokenPipeError):  # the requesting machine has been killed
                    self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((address, port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://{address}:{self.port}"
        serve = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        serve.start()

    def text(self, path: str) -> str | None:
        """Return the metadata at a path, or None."""
        kind, _, name = path.removeprefix("/latest/meta-data/").partition("/")
        if (kind, name) == ("spot", "instance-action"):
            return self.notice
        if kind == "iam" and name.startswith("security-credentials/"):
            role = name.removeprefix("security-credentials/")
            return self.rights.get(role) if role else "\n".join(self.rights) or None
        return None

    def give_notice(self, seconds: float, action: str = "terminate") -> int:
        """Announce the end of the machine, and return its time in seconds since the epoch."""
        at = int(time.time() + seconds)
        named = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
        self.notice = json.dumps({"action": action, "time": named})
        return at

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
