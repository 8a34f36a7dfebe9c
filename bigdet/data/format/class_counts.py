"""How many objects of each class can be learned, and warnings about classes that have none.

Crowd regions are neither learned nor counted as missed, so a class may have objects and yet nothing
to learn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bigdet.data.format.manifest import Category, Manifest, ShardError
from bigdet.data.format.mix import MixedSet, name_key
from bigdet.data.format.remote import is_remote
from bigdet.data.format.shard_set import ShardSet

MAX_LISTED = 20
"""With more classes, a message gives the least and the largest count only."""
MAX_NAMED = 5
"""Classes that a warning names."""
MAX_READ = 20_000
"""Images of the largest set whose annotations are read to count them, which takes seconds."""


class ClassCounter(Counter[tuple[int, bool]]):
    """How many annotations there are by label, and whether they are crowd."""

    def add(self, annotations: list[dict[str, Any]]) -> None:
        """Count those of one image."""
        self.update((entry["label"], bool(entry["iscrowd"])) for entry in annotations)

    def listed(self) -> list[list[int]]:
        """Return ``[label, instances, crowd]`` of each class with any, by rising label."""
        labels = sorted({label for label, _ in self})
        return [[label, self[label, False], self[label, True]] for label in labels]


@dataclass(frozen=True)
class ClassCounts:
    """How many objects there are of each class.

    Attributes:
        categories: in the order of the labels.
        instances: of each, annotations that are not crowd.
        crowd: of each, crowd annotations.
    """

    categories: Sequence[Category]
    instances: Sequence[int]
    crowd: Sequence[int]

    def line(self) -> str:
        """Return a line with the number of objects of each class."""
        if len(self.categories) > MAX_LISTED:
            least, most = min(self.instances), max(self.instances)
            return f"{len(self.categories)} classes with {least:,} to {most:,} objects"
        return ", ".join(
            f"{category.name} {count:,}" + (f" and {crowd:,} crowd" if crowd else "")
            for category, count, crowd in zip(
                self.categories, self.instances, self.crowd, strict=True
            )
        )

    def warnings(self, use: Literal["learned", "measured"]) -> list[str]:
        """Return which classes have nothing that can be learned, or measured in validation."""
        crowd_only = [k for k, n in enumerate(self.crowd) if n and not self.instances[k]]
        absent = [k for k, n in enumerate(self.crowd) if not n and not self.instances[k]]
        advice = (
            "Crowd is neither learned nor counted. Some tools set iscrowd: 1 for every RLE mask "
            "(flags like ignore or difficult make crowd, too): where it is one object, set 0 in "
            "the annotations and make the shards again"
        )
        lines = []
        if not any(self.instances):
            lines.append(f"there is no object, so nothing can be {use}")
            if crowd_only:
                lines[0] = f"all {sum(self.crowd):,} objects are crowd, so nothing can be {use}"
                lines[0] += f". {advice}"
        else:
            if crowd_only:
                named = self._named([(k, f"{self.crowd[k]:,} crowd") for k in crowd_only])
                lines.append(f"{named} no object that can be {use}. {advice}")
            if absent:
                groups = {category.supercategory for category in self.categories}
                names = [category.name for category in self.categories]
                notes = ["a group of other classes" if names[k] in groups else "" for k in absent]
                named = self._named(list(zip(absent, notes, strict=True)))
                lines.append(f"{named} no object at all")
        alike = defaultdict(list)
        for category in self.categories:
            alike[name_key(category.name)].append(f"{category.id} ({category.name!r})")
        lines += [
            f"categories {' and '.join(names)} have the same name except for case and blanks; "
            "where classes are matched by name they are one"
            for names in alike.values()
            if len(names) > 1
        ]
        return lines

    def _named(self, classes: Sequence[tuple[int, str]]) -> str:
        """Return such as ``1 of 3 classes (ring: 8 crowd) has``, of labels with a note."""
        shown = [
            self.categories[label].name + (f": {note}" if note else "")
            for label, note in classes[:MAX_NAMED]
        ]
        more = f", and {len(classes) - MAX_NAMED} more" if len(classes) > MAX_NAMED else ""
        has = "has" if len(classes) == 1 else "have"
        total = len(self.categories)
        return f"{len(classes)} of {total} classes ({', '.join(shown)}{more}) {has}"


def counts_of(manifest: Manifest) -> ClassCounts | None:
    """Return the counts in a manifest; None if it is of an older version."""
    instances, crowd = manifest.instances_per_class, manifest.crowd_per_class
    if instances is None or crowd is None or len(instances) != len(manifest.categories):
        return None
    return ClassCounts(manifest.categories, instances, crowd)


def count_classes(shards: ShardSet) -> ClassCounts | None:
    """Return the counts of a set; None if it does not record them and is large or damaged."""
    known = counts_of(shards.manifest)
    parts = shards.parts if isinstance(shards, MixedSet) else [shards]
    if known or len(shards) > MAX_READ or any(is_remote(part.address) for part in parts):
        return known
    counter = ClassCounter()
    try:
        for row in range(len(shards)):
            counter.add(shards.record(row)["annotations"])
    except (ShardError, KeyError, TypeError):  # a damaged sample, which training replaces
        return None
    found = {label: (instances, crowd) for label, instances, crowd in counter.listed()}
    both = [found.get(label, (0, 0)) for label in range(shards.num_classes)]
    instances, crowd = zip(*both, strict=True)
    return ClassCounts(shards.categories, instances, crowd)


def class_lines(shards: ShardSet, use: Literal["learned", "measured"]) -> tuple[str, list[str]]:
    """Return a line with the numbers of a set's classes, and warnings."""
    counts = count_classes(shards)
    if counts is None:
        command = f"`bigdet check-shards {shards.address}`"
        return f"not known, because the set is of an older version; {command} counts them", []
    return counts.line(), counts.warnings(use)
