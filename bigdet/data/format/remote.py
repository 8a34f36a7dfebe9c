"""Files at an address: read in blocks, from any byte on, and again when the network fails.

``http(s)://`` goes through the standard library (fsspec's needs aiohttp and a thread that does not
survive a fork), ``pipe:COMMAND`` through webdataset's ``gopen``, any other protocol (``s3://``,
``gs://``, ``hf://``, ``memory://``, ...) through fsspec and the package that it names for it.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import select
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import IO
from urllib.parse import quote, urlsplit

import fsspec

from bigdet.data.format.web_pages import describe_page
from bigdet.host.reading import RETRY_SECONDS

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 120.0  # seconds, whatever a server asks for; far below log.stall_seconds

STALL_SECONDS = 30.0  # without a byte, after which an attempt has failed
BLOCK_BYTES = 1 << 20
_PIPE = "pipe:"
_HTTP = ("http://", "https://")
_RETRIED_CODES = {408, 425, 429}  # of the 4xx; all 5xx too


class UnreachableError(OSError):
    """A file that cannot be fetched: all attempts failed, or another one would be useless."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address.

    Attributes:
        address: with its query, if any.
        bytes: size, if known.
        sha256: of the content, hexadecimal, if known.
    """

    address: str
    bytes: int | None = None
    sha256: str | None = None


def is_remote(path: str) -> bool:
    """Return whether this is an address and not the path of a local folder."""
    return path.startswith(_PIPE) or "://" in path


def file_address(folder: str, name: str) -> str:
    """Return the address of a file in a folder; a query (``?token=...``) stays at the end.

    Raises:
        ValueError: a ``pipe:`` without ``{}``, the place of the name in the command.
    """
    if folder.startswith(_PIPE):
        if "{}" not in folder:
            raise ValueError(
                f"{folder}: expected a command with {{}} where the name of a file goes, such as "
                "pipe:ssh HOST cat /data/coco/{}."
            )
        return folder.replace("{}", shlex.quote(name))
    if folder.startswith(_HTTP):
        parts = urlsplit(folder)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return parts._replace(path=path).geturl()
    return f"{folder.rstrip('/')}/{name}"


def shown(address: str) -> str:
    """Return an address as messages show it: without the query, which may be a key."""
    return address.partition("?")[0] if address.startswith(_HTTP) else address


def fetch(remote: RemoteFile, file: IO[bytes], start: int = 0, stop: int | None = None) -> None:
    """Copy a remote file, or bytes ``start`` to ``stop`` of it, to an open file, and check it.

    A failed attempt is followed by others, after the pauses of ``RETRY_SECONDS`` or what the server
    asks for (Retry-After), each from the byte where the last one ended; content that is not as
    expected is fetched once more.

    Raises:
        UnreachableError: with the reason of the last attempt.
    """
    end = remote.bytes if stop is None else stop
    position, digest, reason = start, hashlib.sha256(), ""
    for pause in (*RETRY_SECONDS, None):
        try:
            for found, block in read_blocks(remote.address, position, stop):
                if found != position:  # from the beginning
                    digest = hashlib.sha256()
                if found == 0 and (page := describe_page(block)):
                    raise UnreachableError(f"{shown(remote.address)}: {page}")
                _write(file, found - start, block)
                digest.update(block)
                position = found + len(block)
            if end is not None and position < end:
                raise OSError(f"it ends after {position} of {end} bytes")
            if problem := _content_problem(remote, start, end, position, digest.hexdigest()):
                if problem == reason:
                    raise UnreachableError(problem)
                position, digest = start, hashlib.sha256()
                raise OSError(problem)
            file.truncate(position - start)
            return
        except UnreachableError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            if pause is not None:
                pause = min(max(pause, _asked_pause(error)), LONGEST_PAUSE)
        if pause is not None:
            logger.warning("%s: %s; again in %.1f s", shown(remote.address), reason, pause)
            time.sleep(pause)
    raise UnreachableError(f"{len(RETRY_SECONDS) + 1} attempts failed, the last one: {reason}")


def _content_problem(
    remote: RemoteFile, start: int, end: int | None, position: int, sha256: str
) -> str | None:
    """Return how fetched bytes, ``start`` to ``position``, differ from what they should be."""
    if end is not None and position > end:
        return f"it has {position} bytes, expected {end}"
    is_whole = start == 0 and end == remote.bytes
    if is_whole and remote.sha256 is not None and sha256 != remote.sha256:
        return f"its SHA-256 is {sha256[:16]}..., expected {remote.sha256[:16]}..."
    return None


def read_blocks(address: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield ``(position, bytes)`` of a remote file, from ``start`` on, in one attempt.

    A server that cannot begin at ``start`` begins at 0.

    Args:
        address: with its query, if any.
        start: first byte that is wanted.
        stop: the byte after the last one; None for all.
    """
    if address.startswith(_PIPE):
        return _pipe_blocks(address)
    if address.startswith(_HTTP):
        return _http_blocks(address, start, stop)
    return _fsspec_blocks(address, start, stop)


def _write(file: IO[bytes], offset: int, block: bytes) -> None:
    try:
        file.seek(offset)
        file.write(block)
    except OSError as error:
        raise UnreachableError(f"{file.name} cannot be written ({error.strerror})") from error


def _http_blocks(address: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    wanted = f"bytes={start}-{'' if stop is None else stop - 1}"
    headers = {"Range": wanted} if start or stop is not None else {}
    try:
        request = urllib.request.Request(address, headers=headers)
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise UnreachableError(f"it ends before byte {start}") from error
        if error.code < 500 and error.code not in _RETRIED_CODES:
            raise UnreachableError(f"the server answers {error.code} {error.reason}") from error
        raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            landed = "" if response.url == request.full_url else shown(response.url)
            if page := describe_page(response.peek(), landed):
                raise UnreachableError(f"{shown(address)}: {page}")
        position = start if response.status == http.client.PARTIAL_CONTENT else 0
        if stop is not None and response.status != http.client.PARTIAL_CONTENT:
            raise UnreachableError("the server does not send parts of files")
        while block := response.read(BLOCK_BYTES):
            yield position, block
            position += len(block)
        if response.length:  # a connection that breaks looks like the end
            raise OSError(f"the connection broke {response.length} bytes before the end")


def _asked_pause(error: Exception) -> float:
    """Return the seconds that a server asks to wait for: a number, or a date by its own clock."""
    if not isinstance(error, urllib.error.HTTPError):
        return 0.0
    asked = error.headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        now = parsedate_to_datetime(error.headers.get("Date") or formatdate(usegmt=True))
        return (parsedate_to_datetime(asked) - now).total_seconds()
    except (ValueError, TypeError):  # no date, or one without its zone
        return 0.0


def _pipe_blocks(address: str) -> Iterator[tuple[int, bytes]]:
    import webdataset  # here, as it imports torch, which making and checking shards do without

    pipe = webdataset.gopen(address, "rb")
    position = 0
    try:
        while True:
            if not select.select([pipe.stream], [], [], STALL_SECONDS)[0]:
                raise TimeoutError(f"no byte in {STALL_SECONDS:.0f} s")
            block = pipe.stream.read1(BLOCK_BYTES)
            if not block:
                break
            yield position, block
            position += len(block)
        status = pipe.proc.wait()
        if status:
            raise OSError(f"the command ended with exit code {status}")
    finally:
        pipe.proc.kill()
        pipe.ignore_errors = True
        pipe.close()


def _fsspec_blocks(address: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    position = start
    try:
        # Anew in every process: file systems keep connections, which a fork would share.
        filesystem, path = fsspec.core.url_to_fs(address)
        if stop is not None:
            yield start, filesystem.cat_file(path, start=start, end=stop)
            return
        with filesystem.open(path, "rb", block_size=8 * BLOCK_BYTES) as file:
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                yield position, block
                position += len(block)
    except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
        # ImportError: the package for the protocol; ValueError: no such protocol.
        raise UnreachableError(f"{type(error).__name__}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # errors of file systems have no common class
        raise OSError(f"{type(error).__name__}: {error}") from error
