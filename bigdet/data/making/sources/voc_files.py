"""VOC's text files as many tools write them: lists of a split, XML, and the images of these.

What is not as in VOC is accepted if it can mean only one thing, and counted in the log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from bigdet.data.format.manifest import ShardError
from bigdet.data.making.shard_tar import SampleLog
from bigdet.data.making.sources.file_names import spelling_key
from bigdet.data.making.sources.image_files import file_bytes, safe_path
from bigdet.host.reading import patiently, why_unread
from bigdet.pictures.pixels import SUFFIXES

CLASS_FLAGS = {"-1", "0", "1"}  # in VOC's own lists of a class: absent, difficult, present
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")
_DECLARED = re.compile(rb"<\?xml[^>]*?\sencoding\s*=\s*[\"']([\w.:-]+)")
_TWO_BEYOND_ASCII = re.compile(rb"[\x80-\xff]{2}")
_BARE_AMPERSAND = re.compile(r"&(?!(?:amp|lt|gt|quot|apos|#\d+|#x[0-9a-fA-F]+);)")

_PARTS = ("object", "size", "filename")

Element = ElementTree.Element


def decode_text(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """Return the bytes of a file as text, and the encoding that was found.

    The encoding that the file itself declares is tried after its byte order mark and UTF-8.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "replace"), encoding
    # Common characters of GBK have two bytes beyond ASCII; accented letters are mostly single.
    others = ["gbk"] if _TWO_BEYOND_ASCII.search(data) else []
    guesses = ["utf-8", declared, *others, "latin-1"]
    if b"\0" in data[:2]:  # two bytes per character, without a mark
        guesses = ["utf-16-be" if data[:1] == b"\0" else "utf-16-le"]
    for encoding in filter(None, guesses):
        try:
            return data.decode(encoding), encoding
        except (UnicodeDecodeError, LookupError):
            continue
    return data.decode("latin-1"), "latin-1"


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file; ``ShardError`` if the system does not allow it."""
    try:
        return patiently(path.read_bytes, str(path))
    except OSError as error:
        raise ShardError(f"{path}: {why_unread(error)}") from error


def parse_xml(path: Path, log: SampleLog | None = None, **about: str) -> Element | str:
    """Return the annotation that an XML file holds, or what is wrong with it.

    Names of elements are in lower case and without namespaces. What was repaired is noted in the
    log; ``about`` says there which file it is.
    """
    data = read_bytes(path)
    try:
        return _annotation(ElementTree.fromstring(data))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        problem = str(error)
    declared = _DECLARED.search(data[:200])
    text, encoding = decode_text(data, declared and declared.group(1).decode().lower())
    text, num_bare = _DECLARATION.sub("", text, count=1).strip(), 0
    if "<!ENTITY" not in text:  # else it is intended
        text, num_bare = _BARE_AMPERSAND.subn("&amp;", text)
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError):
        return problem
    if log is not None:
        is_repaired = bool(num_bare) or encoding == "utf-8"
        what = "with a flaw that was repaired" if is_repaired else f"in {encoding}"
        log.change(f"annotation file {what}", **about, error=problem)
    return _annotation(root)


def _annotation(root: Element) -> Element | str:
    """Return the element with the objects of an image, or what is wrong if there is none."""
    for element in root.iter():
        if isinstance(element.tag, str):  # else a comment
            element.tag = element.tag.rpartition("}")[2].lower()
    found = [root] if root.tag == "annotation" else list(root.iter("annotation"))
    if len(found) > 1:
        return f"it has {len(found)} annotations, expected that of one image"
    element = found[0] if found else root
    if all(element.find(name) is None for name in _PARTS):
        return f"its <{element.tag}> has none of {', '.join(_PARTS)}, so it is not as in VOC"
    return element


def read_split(root: Path, split: str, log: SampleLog) -> list[str]:
    """Return the names in the list of a split, each once, in its order.

    A line is the name of an XML file without ``.xml``. It may also name an image or an XML file
    with suffix and folders, or several files of one image, or end with the flag of a class.
    """
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if file_bytes(path) is None:
        found = sorted(other.stem for other in path.parent.glob("[!.]*.txt"))
        raise ShardError(
            f"{path}: cannot be read (No such file or directory). Give the folder of a data set in "
            f"VOC's layout and one of its splits: {', '.join(found[:8]) or 'none found'}."
        )
    text, encoding = decode_text(read_bytes(path))
    if encoding not in ("utf-8", "utf-8-sig"):
        log.change(f"list of the split in {encoding}", file_name=path.name)
    stems: dict[str, None] = {}
    files = XmlFolder(root / "Annotations")
    for line in text.splitlines():
        name = line.strip().lstrip("\ufeff")
        annotated = (str(PurePosixPath(s)) for s in _meanings(name) if s and files.find(s))
        stem = next(annotated, name)
        if stem != name and name.split()[-1] in CLASS_FLAGS:
            log.change("flag of a class in the list not used: all its images are taken", line=name)
        if stem in stems:
            log.skip("listed twice", file_name=stem)
        elif stem:
            stems[stem] = None
    return list(stems)


def _meanings(line: str) -> Iterator[str]:
    """Yield the names that a line of a list may mean, the most literal first."""
    yield line
    words = line.split()
    whole = " ".join(words[:-1]) if len(words) > 1 and words[-1] in CLASS_FLAGS else line
    for name in dict.fromkeys((whole, *words)):
        yield name
        posix = PurePosixPath(name.replace("\\", "/"))
        if ".." in posix.parts:
            continue
        is_file = posix.suffix.lower() in (*SUFFIXES, ".xml")
        plain = posix.with_suffix("") if is_file else posix
        for first in range(len(plain.parts)):
            yield str(PurePosixPath(*plain.parts[first:]))


class XmlFolder:
    """Finds XML files by their names without suffix; lists the folder once, and only if needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[str, list[Path]] | None = None

    def paths(self, with_folders: bool) -> list[Path]:
        """Return the XML files, also those in folders below, but none that macOS added."""
        found = self._folder.rglob("*") if with_folders else self._folder.iterdir()
        return sorted(p for p in found if p.suffix.lower() == ".xml" and p.name[0] != ".")

    def find(self, stem: str) -> Path | None:
        """Return a file, if needed the only one whose name differs in case or form of accents."""
        path = safe_path(self._folder, f"{stem}.xml")
        if path is None or file_bytes(path) is not None:
            return path
        if self._listed is None:
            self._listed = {}
            for other in self.paths(with_folders=True) if self._folder.is_dir() else []:
                key = spelling_key(str(other.relative_to(self._folder)))
                self._listed.setdefault(key, []).append(other)
        found = self._listed.get(spelling_key(f"{PurePosixPath(stem)}.xml"), [])
        return found[0] if len(found) == 1 else None


class ImageFolder:
    """Finds images by the names of their XML files, whatever their suffix; lists a folder once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, stem: str, named: str) -> Path | None:
        """Return the path of an image; None if its name leads out of the folder.

        ``stem`` is the name of its XML file without suffix. ``named``, the image's name in that
        file, is often wrong, so it is tried second.
        """
        plain = safe_path(self._folder, f"{stem}{SUFFIXES[0]}")
        if plain is None or file_bytes(plain) is not None:
            return plain
        names = self._names(plain.parent).get(PurePosixPath(stem).name, [])
        last = PurePosixPath(named.replace("\\", "/")).name
        if names:
            return plain.with_name(last if last in names else names[0])
        other = self._folder / last
        return other if last and file_bytes(other) is not None else plain

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Return the images of a folder by their stems, each in the order of ``SUFFIXES``."""
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            listed = sorted(os.listdir(folder)) if folder.is_dir() else []
            found = [name for name in listed if Path(name).suffix.lower() in SUFFIXES]
            for name in sorted(found, key=lambda n: SUFFIXES.index(Path(n).suffix.lower())):
                names.setdefault(Path(name).stem, []).append(name)
            self._listed[folder] = names
        return self._listed[folder]
