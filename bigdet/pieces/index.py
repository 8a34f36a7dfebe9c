"""What a checkpoint consists of, and where: the files of a folder ``PHASE-STEP``.

    pieces-NUMBER-RANK.safetensors   what one rank has written: ranges of flattened tensors
    index-NUMBER.json                every tensor, and which range of it is in which file
    state.json                       last: where the run is, and size and hash of the others
    model.safetensors                at the end of a phase and of the best: the weights in one file

NUMBER is that of the checkpoint in its run; so a folder that is written again keeps what it had
until its new ``state.json`` is there. Earlier versions wrote all weights to ``model.safetensors``,
all of the optimizer to ``optimizer.safetensors``, and no index; both kinds are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigdet.pieces.tensor_file import Spec, TensorFile

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MODEL = "model"
"""The kind of parameters and buffers, as they are evaluated: where a moving average is kept, it."""
NEWEST = "newest"
"""The kind of the weights that training continues from, where `MODEL` is their average. All other
kinds are what the optimizer keeps of a parameter: ``momentum_buffer``, ``exp_avg``, ..."""

Catalog = dict[str, dict[str, Spec]]
"""Type and shape of whole tensors: by kind (``model``, ``exp_avg``, ...), then by name."""


@dataclass(frozen=True, order=True)
class Place:
    """A range of a flattened tensor: its first number, how many, and the file that has them."""

    first: int
    count: int
    file: str


@dataclass(frozen=True)
class Index:
    """What is where.

    Attributes:
        catalog: of all tensors.
        places: of each tensor, by kind and name; they cover it, perhaps more than once.
        metadata: of the weights: config, categories, phase.
    """

    catalog: Catalog
    places: dict[tuple[str, str], list[Place]]
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write the index as one line of JSON."""
        files = sorted({place.file for places in self.places.values() for place in places})
        number = {file: position for position, file in enumerate(files)}
        tensors = {
            kind: {
                name: {
                    "dtype": spec.dtype, "shape": spec.shape,
                    "pieces": [
                        [place.first, place.count, number[place.file]]
                        for place in self.places.get((kind, name), [])
                    ],
                }
                for name, spec in specs.items()
            }
            for kind, specs in self.catalog.items()
        }  # fmt: skip
        content = {"metadata": self.metadata, "files": files, "tensors": tensors}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Read what `to_json` wrote."""
        content = json.loads(text)
        files, catalog, places = content["files"], {}, {}
        for kind, tensors in content["tensors"].items():
            catalog[kind] = {
                name: Spec(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()
            }
            for name, entry in tensors.items():
                places[kind, name] = [
                    Place(first, count, files[file]) for first, count, file in entry["pieces"]
                ]
        return cls(catalog, places, content["metadata"])


def pieces_file(number: int, rank: int) -> str:
    """Name the file that a rank writes of a checkpoint."""
    return f"pieces-{number}-{rank}.safetensors"


def index_file(number: int) -> str:
    """Name the index of a checkpoint."""
    return f"index-{number}.json"


def is_pieces(name: str) -> bool:
    """Tell whether a file of a checkpoint has pieces of tensors."""
    return name.startswith("pieces-")


def is_index(name: str) -> bool:
    """Tell whether a file of a checkpoint is its index."""
    return name.startswith("index-")


def number_in(name: str) -> int:
    """Return the number of the checkpoint that pieces or an index belong to; 0 for other files."""
    found = re.match(r"(?:pieces|index)-(\d+)", name)
    return 0 if found is None else int(found[1])


def key_in(file: str, kind: str, name: str, first: int) -> str:
    """Name a range of a tensor inside a file of either layout."""
    if file == MODEL_FILE:
        return name
    return f"{name}/{kind}" if file == OPTIMIZER_FILE else f"{name}/{kind}@{first}"


def read_index(folder: Path, files: Iterable[str]) -> Index:
    """Read or, of the earlier layout, work out the index of a checkpoint.

    Args:
        folder: of the checkpoint.
        files: that its ``state.json`` names.

    Raises:
        ValueError: a file is damaged.
    """
    for name in filter(is_index, files):
        return _parse((folder / name).read_text(encoding="utf-8"), folder / name)
    model, optimizer = TensorFile(folder / MODEL_FILE), TensorFile(folder / OPTIMIZER_FILE)
    found = {(MODEL, name): (MODEL_FILE, spec) for name, spec in model.specs.items()}
    for key, spec in optimizer.specs.items():
        name, kind = key.rsplit("/", 1)
        found[kind, name] = (OPTIMIZER_FILE, spec)
    catalog: Catalog = {}
    for (kind, name), (_, spec) in found.items():
        catalog.setdefault(kind, {})[name] = spec
    places = {key: [Place(0, spec.count, file)] for key, (file, spec) in found.items()}
    return Index(catalog, places, model.metadata)


def read_state(folder: Path) -> Mapping[str, Any]:
    """Read the ``state.json`` of a checkpoint as it is, unchecked.

    Raises:
        ValueError: it is missing, cut short or altered.
    """
    path = folder / STATE_FILE
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["files"], dict):
            raise TypeError("no list of files")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: missing, cut short or altered ({error!r}).") from error
    return content


def _parse(text: str, path: Path) -> Index:
    try:
        return Index.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: cut short or altered ({error!r}).") from error
