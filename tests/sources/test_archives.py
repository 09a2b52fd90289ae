"""Archives come whole or not at all, continue where a connection broke, and unpack inside their folder only."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medisee.foundation.errors import InputError
from medisee.sources.archives import fetch, unpack


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], *links: tuple[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            packed.addfile(member)
    return buffer.getvalue()


CONTENT = zipped({"set/a.txt": b"a" * 5000})


class Server(ThreadingHTTPServer):
    """Serves CONTENT; each request's ranges are kept in `asked`, and the first requests may be cut or lie."""

    content = CONTENT
    cuts = 0  # of the next requests: they end after half of what they promise
    ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if server.status != 200 or start >= len(server.content):
            self.send_error(server.status if server.status != 200 else 416)
            return
        rest = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_whole_download_has_its_digest(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "archives" / "set.zip"
    assert fetch(server.address, path) == hashlib.sha256(CONTENT).hexdigest()
    assert path.read_bytes() == CONTENT
    assert fetch(server.address, path) == hashlib.sha256(CONTENT).hexdigest()
    assert server.asked == [None], "what is there is not asked for again"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_is_told_and_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cuts, server.ranges = 2, ranges
    path = tmp_path / "set.zip"
    for _ in range(2):
        with pytest.raises(InputError, match=r"start again to continue"):
            fetch(server.address, path)
        assert not path.exists()
    fetch(server.address, path)
    assert path.read_bytes() == CONTENT
    assert len({asked for asked in server.asked if asked}) == (2 if ranges else 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_that_is_longer_than_the_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT + b"more")
    fetch(server.address, tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


def test_a_page_instead_of_an_archive_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>please log in</html>"
    with pytest.raises(InputError, match=r"no archive.*--from"):
        fetch(server.address, tmp_path / "set.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_error_of_the_server_is_told(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(InputError, match=str(status)):
        fetch(server.address, tmp_path / "set.zip")


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="start again to continue it, or use --from"):
        fetch("http://127.0.0.1:9/set.zip", tmp_path / "set.zip")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_files_are_unpacked(tmp_path: Path, pack: type) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(pack({"set/a/b.txt": b"one", "set/c.txt": b"two"}))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "set" / "a" / "b.txt").read_bytes() == b"one"
    assert (tmp_path / "out" / "set" / "c.txt").read_bytes() == b"two"


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../evil.txt", "set/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, pack: type, name: str) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(pack({"good.txt": b"1", name: b"2"}))
    with pytest.raises(InputError, match="leaves its folder"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_links_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(tarred({"a.txt": b"1"}, ("etc", "/etc"), ("b.txt", "a.txt")))
    unpack(archive, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("content", [b"", b"hello", CONTENT[:-40], CONTENT[:60] + b"\0" * 40 + CONTENT[100:]])
def test_a_damaged_archive_is_told(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        unpack(archive, tmp_path / "out")


def test_an_archive_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(CONTENT)
    monkeypatch.setattr("medisee.sources.archives.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match="free some space"):
        unpack(archive, tmp_path / "out")
