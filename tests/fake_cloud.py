"""Metadata services on this machine that answer as EC2's and Compute Engine's do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, str] | Callable[[BaseHTTPRequestHandler], None]


@dataclass
class FakeCloud:
    """What EC2 (tokens and all) and Compute Engine (flavour and all) answer; neither takes the other's requests."""

    kind: str
    notice: Answer
    """Status and body where the notice is asked for, or a function that does the answering."""
    tokens: list[str] = field(default_factory=list)
    """The tokens given, the newest last; only that one is good."""
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{handler.command} {handler.path}")
        if self.kind == "aws" and handler.command == "PUT" and handler.path == "/latest/api/token":
            lifetime = handler.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            good = lifetime.isdigit() and 1 <= int(lifetime) <= 21600
            self.tokens.append(f"token-{len(self.tokens)}")
            send(handler, *((200, self.tokens[-1]) if good else (400, "")))
        elif self.kind == "aws" and handler.path == "/latest/meta-data/spot/instance-action":
            if not self.tokens or handler.headers.get("X-aws-ec2-metadata-token") != self.tokens[-1]:
                send(handler, 401, "")
            else:
                self._notice(handler)
        elif self.kind == "gcp" and handler.path == "/computeMetadata/v1/instance/preempted":
            if handler.headers.get("Metadata-Flavor") != "Google":
                send(handler, 403, "")
            else:
                self._notice(handler)
        else:
            send(handler, 404, "not found")

    def _notice(self, handler: BaseHTTPRequestHandler) -> None:
        if callable(self.notice):
            self.notice(handler)
        else:
            flavour = {"Metadata-Flavor": "Google"} if self.kind == "gcp" else {}
            send(handler, *self.notice, **flavour)


def send(handler: BaseHTTPRequestHandler, status: int, body: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body.encode())


@contextmanager
def serving() -> Iterator[Callable[[str, Answer], FakeCloud]]:
    """A function that starts such a service: ``(kind, notice)``; all of them end with the context."""
    servers = []

    def start(kind: str, notice: Answer) -> FakeCloud:
        fake = FakeCloud(kind, notice)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    fake.answer(self)

            do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        fake.port = server.server_port
        return fake

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def aws_notice(seconds: float, action: str = "terminate") -> tuple[int, str]:
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return 200, json.dumps({"action": action, "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})
