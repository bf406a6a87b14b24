"""An S3 server on loopback, and the tests of this folder on it.

``python -m pytest tests/checkpoint --on s3`` gives every test that asks for
``tmp_path`` a directory in a bucket. Tests that need what only a file system has are
skipped there, with the reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import PurePath
from types import SimpleNamespace

import pytest

from sortal.checkpoint import bucket
from sortal.checkpoint.bucket import Address


def pytest_addoption(parser):
    parser.addoption("--on", choices=("disk", "s3"), default="disk")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server of S3 on loopback."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/").close()  # noqa: S310
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
        process.terminate()


_number = itertools.count()


@pytest.fixture
def bucket_name(server, monkeypatch, tmp_path_factory):
    """The name of a new bucket on the server, which the environment leads to."""
    empty = tmp_path_factory.mktemp("aws") / "empty"
    empty.touch()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(empty))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty))
    name = f"bucket{next(_number)}"
    request = urllib.request.Request(f"{server}/{name}", method="PUT")  # noqa: S310
    urllib.request.urlopen(request).close()  # noqa: S310
    return name


class Remote(Address):
    """An address that tests use as they do paths; folders are there with their files.

    Of ``pathlib.Path`` it has what the tests of this folder ask for.
    """

    suffix = property(lambda self: PurePath(self.name).suffix)

    def exists(self):
        return self.is_file() or self.is_dir()

    def is_dir(self):
        return bool(bucket.names(self))

    def rglob(self, pattern):
        names = map(PurePath, bucket.names(self))
        found = {x for name in names for x in (name, *name.parents[:-1])}
        return [self / str(x) for x in sorted(found) if x.match(pattern)]

    def glob(self, pattern):
        below = self.key.count("/") + 1 + pattern.count("/")
        return [x for x in self.rglob(pattern) if x.key.count("/") == below]

    def iterdir(self):
        return self.glob("*")

    def read_bytes(self):
        return bucket.read(self)

    def read_text(self):
        return bucket.read(self).decode()

    def write_bytes(self, data):
        bucket.write(self.parent, {self.name: bytes(data)})

    def write_text(self, text):
        self.write_bytes(text.encode())

    def touch(self):
        self.write_bytes(b"")

    def unlink(self):
        bucket.remove(self)

    def mkdir(self, parents=False, exist_ok=False):
        """Does nothing: there are no folders."""

    def rename(self, target):
        for name in bucket.names(self):
            (target / name).write_bytes((self / name).read_bytes())
        bucket.remove(self)

    def relative_to(self, above):
        return PurePath(self.key).relative_to(above.key)

    def stat(self):
        return SimpleNamespace(st_size=len(self.read_bytes()))


@pytest.fixture
def tmp_path(request, tmp_path):
    """A new directory: on disk, or with ``--on s3`` in a bucket."""
    if request.config.getoption("--on", "disk") == "disk":
        return tmp_path
    if reason := request.node.get_closest_marker("on_disk"):
        pytest.skip(f"only on disk: {reason.args[0]}")
    return Remote("s3", request.getfixturevalue("bucket_name"), "run")
