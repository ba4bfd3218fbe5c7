"""Fetching, against a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import traces.fetch
from synerdiff.core import InputError
from traces.fetch import PUBLISHED, PublishedFile, PublishedTrace, fetch

FILES = {"requests.csv": b"a,b\n" * 100_000, "wide.tar.gz": bytes(range(256)) * 500}


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = dict(FILES)
        self.cut_after: int | None = None
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/trace/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/trace/")
        self.server.asked.append(name)
        content = self.server.content.get(name)
        if content is None:
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut_after])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    files = tuple(PublishedFile(name, hashlib.sha256(content).hexdigest()) for name, content in FILES.items())
    monkeypatch.setitem(PUBLISHED, "tiny", PublishedTrace("http://127.0.0.1:9/", files, "Somebody, 2026"))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_files_arrive_whole_with_progress(tmp_path: Path, server: Server) -> None:
    steps: list[tuple[str, int, int]] = []
    folder = tmp_path / "new" / "folder"
    found = fetch("tiny", folder, server.url, lambda *step: steps.append(step))
    assert found == [(folder / name, True) for name in FILES]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    for name, content in FILES.items():
        done = [step[1] for step in steps if step[0] == name]
        assert done == sorted(done)
        assert done[-1] == len(content)
        assert {step[2] for step in steps if step[0] == name} == {len(content)}


def test_what_is_there_is_not_fetched_again(tmp_path: Path, server: Server) -> None:
    fetch("tiny", tmp_path, server.url)
    (tmp_path / "wide.tar.gz").unlink()
    server.asked.clear()
    found = fetch("tiny", tmp_path, server.url.rstrip("/"))
    assert [fetched for _, fetched in found] == [False, True]
    assert server.asked == ["wide.tar.gz"]


def test_a_wrong_hash_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.content["requests.csv"] = b"something else"
    with pytest.raises(InputError, match=r"what arrived is not the published file .* so it was not kept"):
        fetch("tiny", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_cut_connection_leaves_nothing_and_the_next_try_starts_again(tmp_path: Path, server: Server) -> None:
    server.cut_after = 1000
    with pytest.raises(InputError, match="the connection ended after 1000 of 400000 bytes; try again"):
        fetch("tiny", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []
    server.cut_after = None
    fetch("tiny", tmp_path, server.url)
    assert (tmp_path / "requests.csv").read_bytes() == FILES["requests.csv"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, server: Server) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", tmp_path, server.url, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_somebodys_own_file_of_that_name_stays(tmp_path: Path, server: Server) -> None:
    (tmp_path / "requests.csv").write_text("mine")
    with pytest.raises(InputError, match=r"already there and is not the published one .* move it away"):
        fetch("tiny", tmp_path, server.url)
    assert (tmp_path / "requests.csv").read_text() == "mine"


def test_addresses_that_do_not_answer(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces.fetch, "_TIMEOUT_S", 2)
    with pytest.raises(InputError, match="the server answered 404"):
        fetch("tiny", tmp_path, server.url + "elsewhere")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/requests\.csv: it cannot be fetched"):
        fetch("tiny", tmp_path)
    with pytest.raises(InputError, match=r"no-address/requests\.csv: it cannot be fetched"):
        fetch("tiny", tmp_path, "no-address")
    with pytest.raises(InputError, match="'nothing' is not a trace that can be fetched; known"):
        fetch("nothing", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="the output must be a folder"):
        fetch("tiny", tmp_path / "file", server.url)


def test_the_published_address_and_hashes() -> None:
    published = PUBLISHED["gentd26"]
    assert published.base_url.startswith("https://raw.githubusercontent.com/alibaba/clusterdata/7a6c496e")
    assert [file.name for file in published.files] == ["lora_request_trace.csv", "data_trace_processed.tar.gz"]
    assert all(len(file.sha256) == 64 for file in published.files)
