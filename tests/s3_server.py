"""A real S3 server (moto's) for tests. ``conftest.py`` makes its fixtures known."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clusterns_ray.io.object_store import Store


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server in a thread of this process, with an empty ``s3://bucket``; the environment that leads to it, which is
    also that of this process meanwhile."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    boto3.client("s3").create_bucket(Bucket="bucket")
    try:
        yield settings
    finally:
        server.stop()
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
