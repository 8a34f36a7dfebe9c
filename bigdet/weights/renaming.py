"""Renaming of tensors by regular expressions, and the words of our names that rules put in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions on names, and what replaces what they match."""

BRANCHES = {"cls": "class", "bbox": "box", "reg": "box"}
"""Branches of RetinaNet's head: others' words and ours."""


def box_head(stage: str | None) -> str:
    """Return our name of the box head, or of a stage of a cascade's."""
    return f"box_head.stages.{stage}" if stage else "box_head"


def renamed(name: str, rules: Rules) -> str:
    """Apply all rules to a name, in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed_all(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply all rules to all names."""
    return {renamed(name, rules): tensor for name, tensor in state.items()}
