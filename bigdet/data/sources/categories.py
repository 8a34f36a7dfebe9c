"""Categories as annotation files and lists of them give them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bigdet.data.manifest import Category, ShardError

Json = dict[str, Any]


def load_categories(path: Path) -> list[Category]:
    """Read a file of categories; the place in the list is the label.

    Args:
        path: of a JSON list of objects with ``id`` and ``name``, or of names alone (ids from 1), or
            of an object that has such a list as ``categories``: an annotation file, or the manifest
            of a shard set.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read ({error.strerror}). Give a file of categories."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not JSON ({error}). Give a JSON list of categories.") from error
    entries = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ShardError(f"{path}: has no list of categories. Expected objects with id and name.")
    if all(isinstance(entry, str) for entry in entries):
        entries = [{"id": number, "name": name} for number, name in enumerate(entries, 1)]
    for place, entry in enumerate(entries):
        is_category = isinstance(entry, dict) and type(entry.get("id")) is int
        if not is_category or not isinstance(entry.get("name"), str):
            raise ShardError(
                f"{path}: category {place} is {short_repr(entry)}, expected an object with an "
                "integer id and a name."
            )
    for key in ("id", "name"):
        twice = [value for value, n in Counter(entry[key] for entry in entries).items() if n > 1]
        if twice:
            raise ShardError(f"{path}: {key} {twice[0]!r} stands there twice. Correct the file.")
    # A manifest counts keypoints from 0 and has their pairs; COCO's files count from 1.
    return [
        Category(**entry) if "flip_pairs" in entry else make_category(path, entry)
        for entry in entries
    ]


def make_category(where: Path, entry: Json) -> Category:
    """Return a category from its entry in COCO's form; ``ShardError`` if it has another."""
    group, points, skeleton = (entry.get(key) for key in ("supercategory", "keypoints", "skeleton"))
    what = f"{where}: category {entry['id']} ({entry['name']})"
    if not isinstance(group, str | None):
        raise ShardError(f"{what}: supercategory is {short_repr(group)}, expected a string.")
    if points is None:
        return Category(entry["id"], entry["name"], group)
    if not isinstance(points, list) or not all(isinstance(name, str) for name in points):
        raise ShardError(f"{what}: keypoints is {short_repr(points)}, expected a list of names.")
    pairs = skeleton if isinstance(skeleton, list) else []
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(type(p) is int and 1 <= p <= len(points) for p in pair):
            raise ShardError(
                f"{what}: skeleton has {short_repr(pair)}, expected pairs of 1 to {len(points)}."
            )
    joined = [[first - 1, second - 1] for first, second in pairs]  # COCO counts from 1
    return Category(entry["id"], entry["name"], group, points, joined, flip_pairs(points))


def flip_pairs(names: list[str]) -> list[list[int]]:
    """Return which keypoints change places in a mirrored image: ``left_eye`` and ``right_eye``."""
    return [
        [place, names.index(name.replace("left", "right"))]
        for place, name in enumerate(names)
        if "left" in name and name.replace("left", "right") in names
    ]


def short_repr(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
