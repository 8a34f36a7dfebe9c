"""Finds image files by the names that annotation tools give them.

A name is tried as it is written. If there is no such file, it is tried in the other ways in which
tools write names, in a fixed order. A file that is found is inside the folder, and is used only if
no other file and no other name could be meant.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from bigdet.data.making.sources.image_files import file_bytes, is_inside
from bigdet.pictures.pixels import SUFFIXES

BACKSLASHES = "changing backslashes"
ADDRESS = "taking the path out of an address"
PERCENT = "decoding %20 and the like"
FRONT = "leaving out the front of the path"
CASE = "ignoring upper and lower case"
ACCENTS = "ignoring how accented letters are written in Unicode"
SUFFIX = "adding the suffix"
OTHER_SUFFIX = "taking another suffix"
BLANKS = "leaving out blanks around the name"
DOTS = "resolving .. in the path"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://([^?#]*).*|.*[?&]d=([^&]*).*", re.IGNORECASE)
"""``https://host/folder/name.jpg?key=1``; Label Studio's ``/data/local-files/?d=folder/name``."""

Candidate = tuple[str, list[str]]  # a path relative to the folder, and how a name becomes it


@dataclass(frozen=True)
class FoundFiles:
    """Where the files of N names are.

    Attributes:
        paths: N paths relative to the folder; the name itself if nothing is found, None if that
            leads out of the folder.
        file_bytes: ``(N,)`` int64, 0 if nothing is found.
        ways: by place, how files were found whose names are written differently.
    """

    paths: list[str | None]
    file_bytes: NDArray[np.int64]
    ways: dict[int, str]


def find_files(folder: Path, names: Sequence[str]) -> FoundFiles:
    """Return the files that names mean; the folder is listed once, and only if needed."""
    paths = [name if is_inside(name) else None for name in names]
    sizes = np.zeros(len(names), dtype=np.int64)
    ways: dict[int, str] = {}
    lost: dict[int, list[Candidate]] = {}
    for place, path in enumerate(paths):
        size = None if path is None else file_bytes(f"{folder}/{path}")
        if size is not None:
            sizes[place] = size
            continue
        candidates = _candidates(names[place])
        found = next((c for c in candidates if file_bytes(f"{folder}/{c[0]}") is not None), None)
        if found is None:
            lost[place] = candidates
        else:
            paths[place], ways[place] = found[0], " and ".join(found[1]) or DOTS
    if lost:
        for place, (found_path, how) in _find_in_list(folder, lost).items():
            paths[place], ways[place] = found_path, " and ".join(how)
    for place in _claimed_twice(names, paths, ways):
        del ways[place]
        paths[place] = names[place] if is_inside(names[place]) else None
    for place in ways:
        sizes[place] = file_bytes(f"{folder}/{paths[place]}") or 0
    return FoundFiles(paths, sizes, ways)


def what_is_there(folder: Path, name: str) -> str:
    """Return a sentence on the images of a folder that has none of a name: where it may be."""
    held = sorted(path for path in _list_files(folder) if _suffix(path) in SUFFIXES)
    parts = re.split(r"[/\\]", name)
    for end in ("/".join(parts[first:]) for first in range(len(parts))):
        for path in held:
            if path.endswith(f"/{end}"):
                return f"{folder / path.removesuffix(f'/{end}')} has {end}."
    return f"It holds {held[0]}, for example." if held else "It holds no image at all."


def _candidates(name: str) -> list[Candidate]:
    """Return the paths that a name may mean, those that leave out least of it first."""
    text, ways = name.strip().replace("\\", "/"), [BACKSLASHES] if "\\" in name else []
    if text != name.replace("\\", "/"):
        ways.append(BLANKS)
    if address := _ADDRESS.fullmatch(text):
        text, ways = address[1] or address[2] or "", [*ways, ADDRESS]
    found: list[tuple[int, str, list[str]]] = []
    for spelling in dict.fromkeys([text, unquote(text).replace("\\", "/")]):
        how = ways if spelling == text else [*ways, PERCENT]
        whole = normpath(spelling)
        parts = [part for part in whole.split("/") if part not in ("", "..", ".")]
        for first in range(len(parts)):
            path = "/".join(parts[first:])
            found.append((first, path, how if path == whole else [*how, FRONT]))
    found.sort(key=lambda entry: entry[0])
    return [(path, how) for _, path, how in found]


def _find_in_list(folder: Path, lost: dict[int, list[Candidate]]) -> dict[int, Candidate]:
    """Return, by place, files that differ from a name in letters or suffix only."""
    wanted = {spelling_key(path) for candidates in lost.values() for path, _ in candidates}
    bare = {
        path: _bare(spelling_key(path)) for candidates in lost.values() for path, _ in candidates
    }
    others = set(bare.values())
    whole: dict[str, list[str]] = defaultdict(list)
    stems: dict[str, list[str]] = defaultdict(list)
    for path in _list_files(folder):
        key = spelling_key(path)
        stem = os.path.splitext(key)[0]
        if key in wanted:
            whole[key].append(path)
        if (stem in wanted or stem in others) and _suffix(path) in SUFFIXES:
            stems[stem].append(path)
    found: dict[int, Candidate] = {}
    tries = (
        (whole, spelling_key, None),
        (stems, spelling_key, SUFFIX),
        (stems, bare.__getitem__, OTHER_SUFFIX),
    )
    for place, candidates in lost.items():
        hits = (
            (files[key], path, how, way)
            for files, key_of, way in tries
            for path, how in candidates
            if (key := key_of(path)) in files
        )
        paths, path, how, way = next(hits, ([], "", [], None))
        if len(paths) == 1:
            hit, path = (paths[0], path) if way is None else (_bare(paths[0]), _bare(path))
            is_cased = _composed(hit) == _composed(path)
            letters = [] if hit == path else [ACCENTS if is_cased else CASE]
            found[place] = (paths[0], [*how, *letters, *([way] if way else [])])
    return found


def spelling_key(path: str) -> str:
    """Return a path such that two that differ in case or form of accents become equal."""
    return _composed(_composed(path).casefold())


def _bare(path: str) -> str:
    """Return a path without the suffix of a picture, if it has one."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in SUFFIXES else path


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _list_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, without those of macOS."""
    for inner, _, names in os.walk(folder):
        front = inner[len(str(folder)) :].strip("/")
        names = [name for name in names if not name.startswith("._")]
        yield from (f"{front}/{name}" if front else name for name in names)


def _claimed_twice(
    names: Sequence[str], paths: Sequence[str | None], ways: dict[int, str]
) -> list[int]:
    """Return the places of those not found as written whose file another name means too."""
    owners = {str(paths[place]): names[place] for place in ways}
    claimed = set()
    for name, path in zip(names, paths, strict=True) if ways else ():
        plain = "" if path is None else normpath(path)
        if owners.get(plain, name) != name:
            claimed.add(plain)
    return [place for place in ways if str(paths[place]) in claimed]
