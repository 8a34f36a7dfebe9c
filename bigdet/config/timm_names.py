"""Which networks of timm can be a backbone, ``model.backbone: timm:NAME``, and what they are.

``tests/timm_table.py`` made the table ``timm_backbones.csv`` by building each network with timm;
a config is checked without torch.
"""

from __future__ import annotations

import csv
import difflib
import functools
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).parent / "timm_backbones.csv"
PREFIX = "timm:"


@dataclass(frozen=True, kw_only=True)
class TimmRow:
    """What a network of timm is as a backbone.

    Attributes:
        name: in timm, without a tag of weights.
        parameters: without the classifier and the layers that bigdet adds.
        channels: of C2 to C5, or only the width of a plain network, whose features have stride 16.
        depth: blocks of a plain network.
        heeds: the options of ``model`` that it takes.
        has_weights: timm has weights for it.
        lacks: why it cannot be a backbone; empty if it can.
    """

    name: str
    parameters: int = 0
    channels: list[int] = field(default_factory=list)
    depth: int = 0
    heeds: list[str] = field(default_factory=list)
    has_weights: bool = False
    lacks: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether its features have one stride."""
        return len(self.channels) == 1

    @property
    def strides(self) -> list[int]:
        """Strides of its features, pixels."""
        return [16] if self.is_plain else [4, 8, 16, 32]


@functools.cache
def timm_rows() -> dict[str, TimmRow]:
    """Return all rows by the name of the network, including those that cannot be a backbone."""
    with TABLE.open(newline="") as file:
        return {
            cells["name"]: TimmRow(
                name=cells["name"],
                parameters=int(cells["parameters"]),
                channels=[int(each) for each in cells["channels"].split()],
                depth=int(cells["depth"]),
                heeds=cells["heeds"].split(),
                has_weights=cells["has_weights"] == "True",
                lacks=cells["lacks"],
            )
            for cells in csv.DictReader(file)
        }


def timm_table() -> str:
    """Return lines that list the networks of timm that can be a backbone, and what they are."""
    rows = [row for row in timm_rows().values() if not row.lacks]
    cells = [["network of timm", "million parameters", "strides", "options of model"]]
    for row in rows:
        strides = " ".join(map(str, row.strides))
        millions = f"{row.parameters / 1e6:.1f}"
        cells.append([f"{PREFIX}{row.name}", millions, strides, " ".join(row.heeds)])
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "".join(
        f"    {name:{widths[0]}}  {size:>{widths[1]}}  {strides:{widths[2]}}  {options}\n"
        for name, size, strides, options in cells
    )


def timm_row(backbone: str) -> TimmRow:
    """Return the row of ``timm:NAME``.

    Raises:
        ValueError: timm has no such network, or it cannot be a backbone.
    """
    name = backbone.removeprefix(PREFIX)
    row = timm_rows().get(name)
    if row is not None and not row.lacks:
        return row
    network, _, tag = name.partition(".")
    if tag and network in timm_rows():
        raise ValueError(
            f"model.backbone: found {backbone}, which also names weights of {network}. Write "
            f"model.backbone: {PREFIX}{network}, and start_from.source: {backbone} in the phase "
            f"that starts from them."
        )
    usable = [each.name for each in timm_rows().values() if not each.lacks]
    near = difflib.get_close_matches(name, usable, n=1)
    hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
    what = "timm has no such network" if row is None else f"that network lacks {row.lacks}"
    raise ValueError(
        f"model.backbone: found {backbone}, but {what}.{hint} "
        f"`bigdet train --options model.backbone` lists those that can be used."
    )
