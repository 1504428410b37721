"""Downloads are resumed, checked, and take their name only when whole; a server on this machine stands in."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mldcn.datasets.download import download, published_md5
from mldcn.errors import UserError

BODY = bytes(range(256)) * 5000
MD5 = hashlib.md5(BODY).hexdigest()


class Server:
    """Answers with BODY at /ranges, /plain (no ranges) and /cut (breaks off), and with texts at other paths."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.texts: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.asked.append(wanted)
                if self.path in outer.texts:
                    self._send(200, outer.texts[self.path].encode())
                elif self.path == "/ranges" and wanted:
                    first = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if first >= len(BODY):
                        self.send_error(416)
                    else:
                        self._send(206, BODY[first:])
                elif self.path in ("/ranges", "/plain"):
                    self._send(200, BODY)
                elif self.path == "/cut":
                    self._send(200, BODY, BODY[:100_000])
                else:
                    self.send_error(404)

            def _send(self, code: int, body: bytes, sent: bytes | None = None) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if sent is None else sent)

            def log_message(self, format: str, *args: object) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


def test_a_file_comes_whole_and_is_not_fetched_twice(server, tmp_path):
    seen = []
    target = tmp_path / "deep" / "file.zip"
    progress = lambda done, whole: seen.append((done, whole))  # noqa: E731
    assert download(server.url("/ranges"), target, size=len(BODY), md5=MD5, progress=progress) == target
    assert target.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    download(server.url("/ranges"), target, md5=MD5)
    assert len(server.asked) == 1
    assert [file.name for file in target.parent.iterdir()] == ["file.zip"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    target = tmp_path / "file.zip"
    with pytest.raises(UserError, match=r"cannot be fetched .*file\.zip\.part.*goes on"):
        download(server.url("/cut"), target, md5=MD5)
    assert not target.exists()
    kept = (tmp_path / "file.zip.part").stat().st_size
    assert kept == 100_000
    download(server.url("/ranges"), target, md5=MD5)
    assert server.asked[-1] == f"bytes={kept}-"
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    download(server.url("/plain"), tmp_path / "file", md5=MD5)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    download(server.url("/ranges"), tmp_path / "file", md5=MD5)
    assert (tmp_path / "file").read_bytes() == BODY
    (tmp_path / "other.part").write_bytes(BODY)
    count = len(server.asked)
    download(server.url("/ranges"), tmp_path / "other", size=len(BODY), md5=MD5)
    assert len(server.asked) == count


@pytest.mark.parametrize(
    ("expected", "message"), [({"md5": "0" * 32}, "has MD5"), ({"size": 5}, "has 1,280,000 bytes")]
)
def test_a_file_that_is_not_the_published_one_is_thrown_away(server, tmp_path, expected, message):
    with pytest.raises(UserError, match=message):
        download(server.url("/plain"), tmp_path / "file", **expected)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_a_users_error(server, tmp_path):
    with pytest.raises(UserError, match=r"cannot be fetched .*404.*--source"):
        download(server.url("/absent"), tmp_path / "file")


def test_published_checksums(server):
    server.texts["/a.zip.md5"] = f"MD5 (a.zip) = {MD5}\n"
    server.texts["/record"] = json.dumps(
        {
            "files": [
                {"key": "b.zip", "checksum": "md5:" + "1" * 32},
                {"key": "a.zip", "checksum": f"md5:{MD5}"},
            ]
        }
    )
    server.texts["/nothing"] = "no checksum here"
    assert published_md5(server.url("/a.zip.md5"), "a.zip") == MD5
    assert published_md5(server.url("/record"), "a.zip") == MD5
    for path in ("/nothing", "/record"):
        with pytest.raises(UserError, match=r"no MD5 checksum of c\.zip"):
            published_md5(server.url(path), "c.zip")


def test_nothing_is_left_after_all(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be fetched"):
        download("http://127.0.0.1:9/file", tmp_path / "file", timeout=2)
    assert list(tmp_path.iterdir()) == []
