"""The shard sets of each phase of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.mix import open_sets
from bigdet.data.format.shard_set import ShardSet


@dataclass(frozen=True, eq=False)
class DataSets:
    """The images of a phase.

    Attributes:
        train: to train on; its categories are the classes of the detector.
        val: to evaluate on.
    """

    train: ShardSet
    val: ShardSet

    @property
    def classes(self) -> list[str]:
        """Names of the categories of the training set, in the order of the labels."""
        return [category.name for category in self.train.categories]


def open_phase_sets(config: RunConfig) -> dict[str, DataSets]:
    """Return the sets of each phase by its name; phases with the same data share theirs."""
    opened: dict[str, DataSets] = {}
    for name in config.phases:
        data = phase_data(config, name)
        shared = [sets for other, sets in opened.items() if phase_data(config, other) == data]
        opened[name] = shared[0] if shared else DataSets(*open_sets(data))
    return opened


def phases_by_sets(sets: Mapping[str, DataSets]) -> dict[DataSets, list[str]]:
    """Return the names of the phases that share sets, by these sets."""
    names: dict[DataSets, list[str]] = {}
    for name, each in sets.items():
        names.setdefault(each, []).append(name)
    return names
