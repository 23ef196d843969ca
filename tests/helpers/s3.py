"""A bucket on this machine, for whatever reads s3:// addresses.

The address and the keys stand in the environment, where Ray's workers find them too, as long as
`point_at_loopback` ran before the cluster started. tests/conftest.py imports the fixtures.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of an S3 server on loopback."""

    name: str
    client: Any

    def put(self, key: str, content: bytes) -> str:
        """Store an object; return its address."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"s3://{self.name}/{key}"

    def get(self, key: str) -> bytes:
        """Return the content of an object."""
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()


def point_at_loopback() -> int:
    """Send every S3 client of this process and of those it starts to one port of loopback."""
    if "AWS_ENDPOINT_URL" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    return int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Start the server; yield its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", point_at_loopback(), verbose=False)
    server.start()
    yield os.environ["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """Return an empty bucket."""
    import boto3

    client = boto3.client("s3")
    name = f"corpus-{abs(hash(request.node.nodeid)) % 10**12}"
    client.create_bucket(Bucket=name)
    yield Bucket(name, client)
