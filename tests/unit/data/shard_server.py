"""A local HTTP server of a folder that serves parts of files, and fails on request."""

from __future__ import annotations

import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("refuse", "stall", "cut", "500")


class ShardServer:
    """A context manager; ``address`` is that of the folder.

    Args:
        folder: what is served.
        fault_rate: part of the requests that fail, each in one of the ways of ``FAULTS``.
        seed: of the faults.
        last_request: after so many requests all others are refused; None: never.

    Attributes:
        has_ranges: answer requests for parts of files with the part alone.
        requests: number of requests by file, those that failed too.
        answers: number of requests by file that did not fail.
        ranges: the Range headers by file.
        faults: number of faults by kind.
        planned: faults of the next requests, before random ones.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fault_rate: float = 0.0,
        seed: int = 0,
        last_request: int | None = None,
    ) -> None:
        self.requests: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.ranges: dict[str, list[str | None]] = {}
        self.faults: Counter[str] = Counter()
        self.planned: list[str | None] = []
        self._folder = folder
        self._fault_rate = fault_rate
        self._words = random.Random(seed)
        self._lock = threading.Lock()
        self.has_ranges = True
        self._last_request = last_request
        self.released = threading.Event()  # ends all stalls

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                self._answer(handler)

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> ShardServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering."""
        if self._thread.is_alive():
            self.released.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def _fault(self) -> str | None:
        if self._last_request is not None and self.requests.total() >= self._last_request:
            return "refuse"
        if self.planned:
            return self.planned.pop(0)
        return self._words.choice(FAULTS) if self._words.random() < self._fault_rate else None

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.partition("?")[0].lstrip("/")
        wanted = handler.headers.get("Range")
        with self._lock:
            fault = self._fault()
            self.requests[name] += 1
            self.ranges.setdefault(name, []).append(wanted)
            self.faults[fault] += fault is not None
            self.answers[name] += fault is None
        if fault == "refuse":
            handler.close_connection = True
            return
        if fault == "500" or not (self._folder / name).is_file():
            handler.send_error(500 if fault else 404)
            return
        path = self._folder / name
        start, stop = 0, path.stat().st_size
        if wanted is not None and self.has_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= stop:
                handler.send_error(416)
                return
            start, stop = int(first), int(last) + 1 if last else stop
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        handler.send_response(206 if wanted is not None and self.has_ranges else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault in ("cut", "stall"):
            data = data[: len(data) // 2]
        handler.wfile.write(data)
        if fault == "stall":
            handler.wfile.flush()
            self.released.wait(5)
        handler.close_connection = True
