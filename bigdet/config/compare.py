"""Comparing configs: every option by its full key, and one text for all ways to write a path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from bigdet.config.start import is_timm

PLACES = (".shards", ".more_shards", ".subset.ids", ".start_from.source")
"""Ends of the keys of options that are paths or addresses of what a run reads."""


def flat_options(config: Any) -> dict[str, Any]:
    """Return every option of a config, or of a section, by its key in it."""
    return dict(leaf_items(OmegaConf.to_container(OmegaConf.structured(config))))


def leaf_items(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every option of nested mappings with its full key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaf_items(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def comparable(key: str, value: Any) -> Any:
    """Return the value of the option with this full key, a path as `place_of` it."""
    if isinstance(value, list):
        return [comparable(key, each) for each in value]
    is_name = isinstance(value, str) and (value in ("random", "previous") or is_timm(value))
    if key.endswith(PLACES) and isinstance(value, str) and not is_name:
        return place_of(value)
    return value


def place_of(path: str) -> str:
    """Return one text for all ways to write a path or address: links, ``..``, a last slash."""
    if "://" in path or path.startswith("pipe:"):
        return path.rstrip("/")
    return os.path.realpath(path)
