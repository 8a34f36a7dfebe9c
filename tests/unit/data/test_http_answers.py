"""What else servers answer: when to come again, and pages for people instead of files."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bigdet.config.data import CacheConfig
from bigdet.data.format import remote
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from tests.unit.data.small_shards import write_set

PAGE = (
    b"\xef\xbb\xbf\n<!-- corporate proxy -->\n<!DOCTYPE HTML>\n<html><head><title>Please\n"
    b"  sign in</title></head><body></body></html>"
)
LATER = "Sun, 29 Nov 2026 18:00:07 GMT"
NOW = "Sun, 29 Nov 2026 18:00:00 GMT"


class Server:
    """Answers with what is planned for a path, then with the files of a folder.

    An answer is a status, headers and a body.
    """

    def __init__(self, folder: Path) -> None:
        self.planned: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                name = handler.path.partition("?")[0].lstrip("/")
                if plan := self.planned.get(name):
                    status, headers, body = plan[0] if len(plan) == 1 else plan.pop(0)
                    if status == 0:  # the plan is over
                        status, headers, body = 200, {}, (folder / name).read_bytes()
                else:
                    status, headers, body = 200, {}, (folder / name).read_bytes()
                handler.send_response_only(status)  # without Date
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    handler.send_header(key, value)
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_set(tmp_path / "set", num_shards=1, per_shard=2)
    made = Server(tmp_path / "set")
    yield made
    made.stop()


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), gib=1.0)


@pytest.mark.parametrize(
    ("status", "headers", "pause"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"Retry-After": " 7 "}, 7.0),
        (429, {"Retry-After": LATER, "Date": NOW}, 7.0),  # by the server's own clock
        (429, {"Retry-After": NOW, "Date": LATER}, 0.5),  # past: our own pause
        (429, {"Retry-After": "0"}, 0.5),
        (503, {"Retry-After": "86400"}, 120.0),  # no run waits for a day
        (429, {"Retry-After": "Wed, 01 Jan 2098 00:00:00 GMT"}, 120.0),
        (429, {"Retry-After": "soon"}, 0.5),
        (429, {"Retry-After": "-3"}, 0.5),
        (429, {}, 0.5),
    ],
)
def test_a_server_says_when_to_come_again(
    server: Server, cache, monkeypatch, status: int, headers: dict[str, str], pause: float
):
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    server.planned["manifest.json"] = [(status, headers, b"slow down"), (0, {}, b"")]
    assert len(ShardSet(server.address, cache=cache)) == 2
    assert waited == [pause]


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "000000.tar"])
@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_login_page_is_reported_with_its_address_at_once(
    server: Server, cache, monkeypatch, name: str, mode: str
):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("it waits"))
    server.planned[name] = [(200, {"Content-Type": "text/html"}, PAGE)]
    config = CacheConfig(folder=cache.folder, gib=1.0, mode=mode)
    with pytest.raises(ShardError) as caught:
        ShardSet(server.address, cache=config).read(0)
    assert (
        f"{server.address}/{name}: there is a web page ('Please sign in') instead of the file; "
        "the server may want a login or a token" in str(caught.value)
    )


def test_a_redirection_to_a_login_page_is_reported(server: Server, cache):
    where = f"{server.address}/login"
    server.planned["manifest.json"] = [(302, {"Location": f"{where}?next=%2Fdata"}, b"")]
    server.planned["login"] = [(200, {}, b"<html><body>who are you?</body></html>")]
    with pytest.raises(ShardError) as caught:
        ShardSet(server.address, cache=cache)
    assert (
        f"{server.address}/manifest.json: there is a web page at {where}, where the server "
        "redirected to, instead of the file;" in str(caught.value)
    )


def test_a_page_that_comes_through_a_command_is_reported(server: Server, cache, tmp_path: Path):
    (tmp_path / "page").write_bytes(PAGE)
    with pytest.raises(ShardError, match=r"there is a web page \('Please sign in'\)"):
        ShardSet(f"pipe:cat {tmp_path}/page # {{}}", cache=cache)


def test_an_answer_that_is_no_manifest_is_reported_with_its_address(server: Server, cache):
    server.planned["manifest.json"] = [(200, {}, b'{"error": "not logged in"}')]
    with pytest.raises(ShardError, match=rf"^{server.address}: in the files fetched .*KeyError"):
        ShardSet(server.address, cache=cache)


@pytest.mark.parametrize("name", ["manifest.json", "index.npy"])
def test_pages_that_somebody_saved_are_reported_too(server: Server, tmp_path: Path, name: str):
    shutil.copytree(tmp_path / "set", tmp_path / "copied")
    (tmp_path / "copied" / name).write_bytes(PAGE)
    with pytest.raises(ShardError, match=rf"copied/{name}: not the .*there is a web page"):
        ShardSet(tmp_path / "copied")
