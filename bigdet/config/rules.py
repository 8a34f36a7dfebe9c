"""What rules of a config have in common: an option, what was found, what was expected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from bigdet.config.load import ConfigError

_written: Collection[str] = ()


@contextmanager
def user_wrote(keys: Collection[str]) -> Iterator[None]:
    """Let `unused` refuse these options even where they have their default, inside the block.

    Args:
        keys: in full, ``written`` of the config.
    """
    global _written
    before, _written = _written, keys
    try:
        yield
    finally:
        _written = before


def unused(key: str, section: Any, name: str, reason: str) -> None:
    """Refuse an option that was set and would be ignored."""
    if _is_set(key, section, name):
        raise ConfigError(f"{key}.{name}: {reason}, so it would be ignored. Remove it.")


def unused_section(key: str, section: Any, reason: str) -> None:
    """Refuse a section of which an option was set, where all of them would be ignored."""
    for field in dataclasses.fields(section):
        if _is_set(key, section, field.name):
            raise ConfigError(
                f"{key}: {reason}, so {key}.{field.name} would be ignored. Remove it."
            )


def _is_set(key: str, section: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return getattr(section, name) != default or f"{key}.{name}" in _written


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Refuse an option unless the rule holds."""
    if not holds:
        raise ConfigError(f"{key}: found {found}, expected {expected}.")


def positive(key: str, value: float | None) -> None:
    """Refuse a number that is not above 0; None means off."""
    require(value is None or 0 < value < math.inf, key, value, "a number above 0")


def not_negative(key: str, value: float) -> None:
    """Refuse a number below 0."""
    require(0 <= value < math.inf, key, value, "0 or more")
