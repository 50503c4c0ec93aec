"""Downloads from a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.io.download import download
from der_fast.data.sets import cifar
from der_fast.errors import DataError, StorageError

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    """/whole sends everything, /cut breaks off in the middle, anything else is 404."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:1000])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_a_verified_file_lands_whole(server, tmp_path):
    path = tmp_path / "new" / "folder" / "archive.bin"
    download(f"{server}/whole", path, md5=md5(CONTENT))
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["archive.bin"]


@pytest.mark.parametrize(
    ("address", "checksum", "message"),
    [
        ("/whole", md5(b"other"), "is not the published file: its MD5"),
        ("/cut", md5(CONTENT), "could not download|is not the published file"),
        ("/nowhere", md5(CONTENT), "could not download .*nowhere"),
    ],
)
def test_a_failure_leaves_nothing_behind(server, tmp_path, address, checksum, message):
    with pytest.raises(DataError, match=message) as caught:
        download(server + address, tmp_path / "archive.bin", md5=checksum)
    assert str(tmp_path / "archive.bin") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_does_not_harm_the_file_that_is_there(server, tmp_path):
    path = tmp_path / "archive.bin"
    path.write_bytes(b"old")
    with pytest.raises(DataError):
        download(f"{server}/whole", path, md5=md5(b"other"))
    assert path.read_bytes() == b"old"


def test_no_server(tmp_path):
    with pytest.raises(DataError, match="could not download http://127.0.0.1:9/x"):
        download("http://127.0.0.1:9/x", tmp_path / "archive.bin", md5="")


def test_a_path_that_cannot_be_written_is_a_storage_error(server, tmp_path):
    path = tmp_path / "archive.bin"
    (path / "in_the_way").mkdir(parents=True)
    with pytest.raises(StorageError, match="could not write"):
        download(f"{server}/whole", path, md5=md5(CONTENT))
    assert list(tmp_path.iterdir()) == [path]


def test_load_dataset_downloads_only_when_allowed(server, tmp_path, monkeypatch):
    spec = dataclasses.replace(cifar.ARCHIVES["cifar10"], url=f"{server}/whole", md5=md5(CONTENT))
    monkeypatch.setattr(cifar, "ARCHIVES", {**cifar.ARCHIVES, "cifar10": spec})
    with pytest.raises(DataError, match="use data.download=True"):
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    # These bytes are no archive, so reading fails; but they have arrived and been verified.
    with pytest.raises(DataError, match="right checksum but cannot be read"):
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path), download=True))
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == CONTENT
