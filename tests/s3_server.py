"""A real S3 server (moto's) for tests, in good or bad health. ``conftest.py`` makes its fixtures known."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.io.object_store import Store


class BadHealth:
    """Of the requests to an application, ``share`` meet a fault: an error 500 or 503, a connection that is closed
    without an answer, or an answer that is late or breaks off. The application may or may not have seen the request.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.draw, self.met = share, random.Random(seed), Counter[str]()

    def __call__(self, application: Any) -> Callable[..., Iterable[bytes]]:
        from werkzeug.wrappers import Response

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if self.draw.random() >= self.share:
                return application(environ, start_response)
            fault = self.draw.choice(("500", "503", "closed", "late", "broken off"))
            self.met[fault] += 1
            if fault == "late":
                time.sleep(2)
                return application(environ, start_response)
            seen = fault == "broken off" or self.draw.random() < 0.5
            response = Response.from_app(application, environ) if seen else Response()
            if fault.isdigit():
                return Response("", int(fault))(environ, start_response)
            return self.breaking_off(response, environ["werkzeug.socket"], start_response)

        return answer

    def breaking_off(self, response: Any, connection: socket.socket, start_response: Any) -> Iterator[bytes]:
        data = response.data
        if half := data[: len(data) // 2]:
            start_response(response.status, response.headers.to_wsgi_list())
            yield half
        connection.shutdown(socket.SHUT_RDWR)
        yield b""


@contextmanager
def s3_server(health: BadHealth | None = None) -> Iterator[dict[str, str]]:
    """A server in a thread of this process, with an empty ``s3://bucket``; the environment that leads to it, which is
    also that of this process meanwhile."""
    moto = pytest.importorskip("moto.moto_server.werkzeug_app")
    from moto.moto_server.threaded_moto_server import MotoRequestHandler
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    plain = moto.DomainDispatcherApplication(moto.create_backend_app)
    application = health(plain) if health else plain
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")
    try:
        yield settings
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """``s3://bucket``."""
    with s3_server():
        yield "s3://bucket"


@pytest.fixture
def store(s3: str, tmp_path: Path) -> Store:
    """A prefix of this test alone."""
    return Store(s3) / tmp_path.name
