"""An S3 server on loopback, and the tests of this folder on it.

``python -m pytest tests/checkpoint --on s3`` gives every test that asks for
``tmp_path`` a directory in a bucket. Tests that need what only a file system has are
skipped there, with the reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import stores
from sortal.checkpoint import bucket
from sortal.checkpoint.bucket import Address


def pytest_addoption(parser):
    parser.addoption("--on", choices=("disk", "s3"), default="disk")


@pytest.fixture(scope="session")
def server():
    """The address of a server of S3 on loopback."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    with stores.s3() as url:
        yield url


@pytest.fixture
def bucket_name(server, monkeypatch):
    """The name of a new bucket on the server, which the environment leads to."""
    for name, value in stores.environment(server).items():
        monkeypatch.setenv(name, value)
    return stores.new_bucket(server)


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


class _Google(BaseHTTPRequestHandler):
    """The part of Google's JSON API that TensorStore uses, conditions included."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def _handle(self):
        at = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(at.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        objects, key = self.server.objects, unquote(at.path.partition("/o/")[2])
        key = asked.get("name") or key
        with self.server.lock:
            generation, found = objects.get(key, (0, b""))
            if int(asked.get("ifGenerationMatch", generation)) != generation:
                self._answer(412)
            elif self.command == "POST":
                objects[key] = next(self.server.numbers), data
                self._about({"name": key, "generation": str(objects[key][0])})
            elif not key:
                first, end = asked.get("startOffset", ""), asked.get("endOffset", "~")
                names = [x for x in sorted(objects) if first <= x < end]
                self._about({"items": [{"name": x} for x in names]})
            elif key not in objects:
                self._answer(404)
            elif self.command == "DELETE":
                del objects[key]
                self._answer(204)
            elif asked.get("alt") == "media":
                self._content(generation, found)
            else:
                self._about({"name": key, "generation": str(generation)})

    do_GET = do_POST = do_DELETE = _handle  # noqa: N815

    def _content(self, generation, data):
        of = {"x-goog-generation": str(generation)}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            first = int(first) if first else max(0, len(data) - int(last))
            last = min(int(last) if last else len(data), len(data) - 1)
            if first >= len(data):
                return self._answer(416)
            of["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], of)
        return self._answer(200, data, of)

    def _about(self, x):
        self._answer(200, json.dumps(x).encode())

    def _answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def google(monkeypatch):
    """A directory of a bucket on a server of Google's JSON API on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Google)
    server.objects, server.lock = {}, threading.Lock()
    server.numbers = itertools.count(1)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    yield "gs://bucket/runs/digits"
    server.shutdown()
    thread.join()
    server.server_close()
