"""An S3 server on loopback, for rows of benchmarks and for tests."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from unittest import mock

_numbers = itertools.count()


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """Starts moto's server, which keeps all in memory; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            while not _answers(url):
                if process.poll() is not None:
                    raise RuntimeError("the server has ended; is moto[server] there?")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/moto-api/").close()  # noqa: S310
    except OSError:
        return False
    return True


def new_bucket(url: str) -> str:
    """The name of a new bucket."""
    name = f"bucket{next(_numbers)}"
    request = urllib.request.Request(f"{url}/{name}", method="PUT")  # noqa: S310
    urllib.request.urlopen(request).close()  # noqa: S310
    return name


def environment(url: str) -> dict[str, str]:
    """What leads to the server, and to no settings of whoever runs this."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextlib.contextmanager
def s3_directory() -> Iterator[str]:
    """The address of a directory on a server of its own."""
    with s3() as url, mock.patch.dict(os.environ, environment(url)):
        yield f"s3://{new_bucket(url)}/runs"
