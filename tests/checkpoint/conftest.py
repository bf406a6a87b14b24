"""An S3 server on loopback, and the tests of this folder on it.

``python -m pytest tests/checkpoint --on s3`` gives every test that asks for
``tmp_path`` a directory in a bucket. Tests that need what only a file system has are
skipped there, with the reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from types import SimpleNamespace
from unittest import mock
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
        return iter([self / str(x) for x in sorted(found) if x.match(pattern)])

    def glob(self, pattern):
        below = self.key.count("/") + 1 + pattern.count("/")
        return (x for x in self.rglob(pattern) if x.key.count("/") == below)

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

    def unlink(self, missing_ok=False):
        bucket.remove(self)

    def mkdir(self, parents=False, exist_ok=False):
        """Does nothing: there are no folders."""

    def rename(self, target):
        for name in bucket.names(self):
            (target / name).write_bytes((self / name).read_bytes())
        bucket.remove(self)

    def replace(self, target):
        target.write_bytes(self.read_bytes())
        bucket.remove(self)

    def relative_to(self, above):
        return PurePath(self.key).relative_to(above.key)

    def stat(self):
        found = bucket._kvs(self).read(self.key).result()
        stamp, size = found.stamp.generation, len(found.value or b"")
        return SimpleNamespace(st_size=size, st_mtime_ns=stamp)


def _only(reason, *names):
    return dict.fromkeys(names, reason)


ON_DISK = {
    "test_files": "what a file system does is what is tested",
    **_only(
        "there are no links and pipes in an object store",
        "test_nothing_outside_the_directory_is_deleted",
        "test_a_step_that_cannot_be_read_takes_no_place_among_those_kept",
        "test_leaves_of_an_older_step_are_not_removed_through_a_link",
        "test_a_pipe_in_the_place_of_a_file_is_damage_and_does_not_hang",
        "test_every_sort_of_damage_shows_with_its_file_and_what_is_wrong",
    ),
    **_only(
        "there are no locks; of two writers the later one goes on (test_bucket)",
        "test_a_second_writer_is_refused_until_the_first_has_closed",
        "test_two_writers_of_one_directory_are_refused",
        "test_the_directory_is_taken_until_the_end",
        "test_a_forked_child_does_not_hold_the_lock",
    ),
    **_only(
        "a failure of the disk is made, or fsync; those of a store are in test_bucket",
        "test_a_failure_is_raised_by_wait",
        "test_a_failure_that_nobody_waited_for_is_raised_by_the_next_call",
        "test_a_failure_at_exit_is_the_exit_code_and_other_handlers_run",
        "test_a_failed_save_in_a_handler_at_exit_is_the_exit_code",
        "test_a_finished_save_holds_no_buffers",
        "test_a_process_that_was_interrupted_in_a_save_ends",
        "test_a_process_whose_threads_cannot_start_saves_and_ends",
        "test_at_exit_a_save_is_finished_and_a_failure_is_printed",
        "test_a_full_disk_is_a_clear_error_and_leaves_earlier_steps",
        "test_what_the_disk_does_not_keep_is_a_failed_save",
        "test_a_failure_to_write_is_raised_at_the_latest_at_the_end",
        "test_an_interrupted_removal_of_keep_last_data_is_done_by_the_next_save",
    ),
    **_only(
        "a folder without files is none, nor is a file in its place",
        "test_a_manager_whose_directory_was_removed_saves_again",
        "test_a_file_in_the_place_of_the_directory_is_a_clear_error",
        "test_a_step_that_is_not_there_is_named_with_those_that_are",
        "test_names_that_file_systems_confuse_stay_apart",
    ),
    **_only(
        "bytes are counted where the system reads files",
        "test_restoring_one_kind_reads_the_bytes_of_that_kind_only",
        "test_each_process_reads_only_the_shards_that_it_is_to_have",
    ),
    **_only(
        "the test keeps other files in its directory, or writes sparse ones",
        "test_two_processes_save_and_restore_shards_of_one_array",
        "test_a_file_too_large_for_a_manifest_is_not_read",
    ),
    **_only(
        "AWS's library writes lines of its own to stderr, which is compared",
        "test_a_save_that_outlives_the_main_thread_is_committed",
        "test_a_save_in_a_handler_at_exit_is_done",
        "test_metadata_is_that_of_the_call",
        "test_a_forked_child_is_refused_in_a_sentence",
    ),
}
"""Tests, and files of tests, that a store skips, and why."""


@pytest.fixture
def tmp_path(request, tmp_path):
    """A new directory: on disk, or with ``--on s3`` in a bucket."""
    if request.config.getoption("--on", "disk") == "disk" or (
        "bucket_name" in request.fixturenames
    ):
        yield tmp_path
        return
    file, test = request.path.stem, request.node.originalname
    if reason := ON_DISK.get(file) or ON_DISK.get(test):
        pytest.skip(f"on disk alone: {reason}")
    url = request.getfixturevalue("server")
    # Not by monkeypatch, which tests undo.
    with mock.patch.dict(os.environ, stores.environment(url)):
        yield Remote("s3", stores.new_bucket(url), "run")


class _Google(BaseHTTPRequestHandler):
    """The part of Google's JSON API that TensorStore uses, conditions included."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

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


@pytest.fixture(scope="session")
def google_server():
    """A server of Google's JSON API on loopback; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Google)
    server.objects, server.lock = {}, threading.Lock()
    server.numbers = itertools.count(1)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def google(google_server, monkeypatch, request):
    """The address of a new directory there."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", google_server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    return f"gs://bucket/{request.node.originalname}/{next(_numbers)}"


_numbers = itertools.count()
