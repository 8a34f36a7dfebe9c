"""Categories, from annotation files and lists."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.making.loose_values import whole_number

logger = logging.getLogger(__name__)

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
        number = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(content, dict):  # an annotation file, whose ids may be written as 1.0 or "1"
            number = whole_number(number)
        if type(number) is not int or not isinstance(entry.get("name"), str):
            raise ShardError(
                f"{path}: category {place} is {short_repr(entry)}, expected an object with an "
                "integer id and a name."
            )
        entry["id"] = number
    twice = [value for value, n in Counter(entry["id"] for entry in entries).items() if n > 1]
    if twice:
        raise ShardError(f"{path}: id {twice[0]!r} occurs twice. Correct the file.")
    refuse_same_names(path, entries)
    notes: list[Json] = []
    # A manifest counts keypoints from 0 and has their pairs; COCO's files count from 1.
    categories = [
        Category(**entry) if "flip_pairs" in entry else make_category(path, entry, notes)
        for entry in entries
    ]
    for note in notes:
        logger.warning("%s: category %d: %s", path, note["category_id"], note["changed"])
    return categories


def refuse_same_names(where: Path, entries: Sequence[Json]) -> None:
    """Raise ``ShardError`` if two categories have the same name, or names that look the same."""
    ids: dict[str, list[int]] = {}
    for entry in entries:
        ids.setdefault(" ".join(entry["name"].split()), []).append(entry["id"])
    if twice := [(name, found) for name, found in ids.items() if len(found) > 1]:
        listed = "; ".join(f"{name!r}: ids {', '.join(map(str, n))}" for name, n in twice[:5])
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise ShardError(
            f"{where}: several categories have the same name ({listed}{more}). Results are listed "
            "and classes are matched by name: rename one of them, or move its annotations to the "
            "other and remove it."
        )


def make_category(where: Path, entry: Json, notes: list[Json]) -> Category:
    """Return a category from its entry in COCO's form; ``ShardError`` if that is not valid.

    What is left out is added to ``notes``, lines for ``skipped.jsonl``.
    """
    group, points, skeleton = (entry.get(key) for key in ("supercategory", "keypoints", "skeleton"))
    what = f"{where}: category {entry['id']} ({entry['name']})"
    if not isinstance(group, str | None):  # nothing depends on it
        reason = "supercategory left out: not a string"
        notes.append({"changed": reason, "category_id": entry["id"], "found": group})
        group = None
    frequency = entry.get("frequency") if entry.get("frequency") in ("r", "c", "f") else None
    if points in (None, []):
        return Category(entry["id"], entry["name"], group, frequency=frequency)
    if isinstance(points, list) and all(type(name) is int for name in points):
        points = [str(name) for name in points]
    if not isinstance(points, list) or not all(isinstance(name, str) for name in points):
        raise ShardError(f"{what}: keypoints is {short_repr(points)}, expected a list of names.")
    pairs = skeleton if isinstance(skeleton, list) else []
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(type(p) is int and 1 <= p <= len(points) for p in pair):
            reason = "skeleton dropped: its pairs are not of the keypoints, counted from 1"
            notes.append({"changed": reason, "category_id": entry["id"], "found": pair})
            pairs = []  # it is for drawing only
            break
    joined = [[first - 1, second - 1] for first, second in pairs]  # COCO counts from 1
    pairs_of_sides = flip_pairs(points)
    return Category(entry["id"], entry["name"], group, points, joined, pairs_of_sides, frequency)


def flip_pairs(names: list[str]) -> list[list[int]]:
    """Return which keypoints change places in a mirrored image: ``left_eye`` and ``right_eye``.

    Also ``Left Eye``, ``eyeLeft``, and ``L_eye``, where the letter has blanks or signs next to it.
    """
    places = {name.lower(): place for place, name in enumerate(names)}
    pairs = []
    for name, place in places.items():
        of_right = name.replace("left", "right")
        if of_right == name and re.search(r"[^\W_]{2}", name):
            of_right = re.sub(r"(?<![^\W_])l(?![^\W_])", "r", name)
        if of_right != name and of_right in places:
            pairs.append([place, places[of_right]])
    return pairs


def short_repr(value: Any) -> str:
    """Return a value as messages show it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
