"""The lists of a large JSON file, entry by entry.

COCO's annotation file has 450 MB and Objects365's several GB, and Python objects would take 8 times
as much. So a window moves over the file, and each entry comes with its place, so that it can be
read again when needed.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigdet.data.format.manifest import ShardError

WINDOW = 1 << 22  # bytes that are parsed together
# An error this near to the end of the window may be due to the end.
END_OF_WINDOW = 4096


@dataclass(frozen=True)
class Entry:
    """One element of one of the lists.

    Attributes:
        name: that of the list.
        value: parsed, with one character for each byte of those beyond ASCII.
        offset: place of its first byte in the file.
        size: bytes.
    """

    name: str
    value: Any
    offset: int
    size: int


def read_lists(path: Path, data: mmap.mmap, names: list[str]) -> Iterator[Entry | str]:
    """Yield the entries of some lists, each in the file once at most, of one JSON object.

    Yields:
        First the name of each key of the object, then, if it is one of the lists, its entries.

    Raises:
        ShardError: it is not JSON, is cut short, or has another form.
    """
    scanner = _Scanner(path, data)
    start = scanner.peek()
    if start == "[":
        raise ShardError(
            f"{path}: not a COCO annotation file: the top is a list, expected an object with "
            f"{', '.join(names)}."
        )
    scanner.expect("{")
    seen: set[str] = set()
    is_open = scanner.peek() != "}" or not scanner.expect("}")
    while is_open:
        name = scanner.value()
        if not isinstance(name, str):
            raise scanner.error("a key is not a string")
        if name in seen and name in names:
            raise ShardError(f"{path}: has two lists of {name}. Expected one; correct the file.")
        seen.add(name)
        yield name
        scanner.expect(":")
        if name in names and scanner.peek() == "[":
            yield from _elements(scanner, name)
        elif name in names:
            raise ShardError(
                f"{path}: not a COCO annotation file: it has no list of {name}, but "
                f"{str(scanner.value())[:40]!r}. Expected a list."
            )
        else:
            scanner.value()
        is_open = scanner.expect(",}") == ","
    if scanner.peek():
        raise scanner.error("something follows its end")


def _elements(scanner: _Scanner, name: str) -> Iterator[Entry]:
    scanner.expect("[")
    if scanner.peek() == "]":
        scanner.expect("]")
        return
    while True:
        scanner.peek()
        offset = scanner.place
        value = scanner.value()
        yield Entry(name, value, offset, scanner.place - offset)
        if scanner.expect(",]") == "]":
            return


class _Scanner:
    """A place in a file of JSON, and the window of text around it.

    Bytes are taken for characters, one by one, so that places in the text are places in the file:
    what has a meaning in JSON is ASCII, and UTF-8 has no ASCII bytes within other characters.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.place = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
        self._decode = json.JSONDecoder().raw_decode
        self._load(WINDOW)

    def peek(self) -> str:
        """Return the next character that is not blank, without taking it; "" at the end."""
        while True:
            here = self.place - self._base
            rest = self._text[here : here + 64]
            blank = len(rest) - len(rest.lstrip(" \t\n\r"))
            self.place += blank
            if blank < len(rest):
                return rest[blank]
            if self.place >= len(self.data):
                return ""
            if self.place >= self._base + len(self._text):
                self._load(WINDOW)

    def expect(self, characters: str) -> str:
        """Take and return the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            raise self.error(f"expected {' or '.join(characters)}")
        self.place += 1
        return found

    def value(self) -> Any:
        """Take and return the next value."""
        self.peek()
        while True:
            is_last = self._base + len(self._text) >= len(self.data)
            try:
                value, end = self._decode(self._text, self.place - self._base)
                if is_last or end < len(self._text):  # else a number may go on
                    self.place = self._base + end
                    return value
            except json.JSONDecodeError as error:
                is_near_end = error.pos > len(self._text) - END_OF_WINDOW
                if is_last or not (is_near_end or error.msg.startswith("Unterminated string")):
                    self.place = self._base + error.pos
                    raise self.error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            self._load(max(WINDOW, 2 * len(self._text)))

    def error(self, what: str) -> ShardError:
        """Return the error for what is at the place."""
        size = len(self.data)
        if b"\0" in self.data[:4]:
            what = "it seems to be UTF-16: store it as UTF-8"
        elif self.place >= size - 1 or "Unterminated" in what:
            what += "; the file seems to be cut short: copy or unpack it again"
        return ShardError(
            f"{self.path}: not JSON (byte {self.place} of {size}: {what}). Give an annotation "
            "file as COCO has them, unpacked and whole."
        )

    def _load(self, size: int) -> None:
        self._base = self.place
        self._text = self.data[self.place : self.place + size].decode("latin-1")
