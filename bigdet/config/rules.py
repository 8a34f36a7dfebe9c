"""What rules of a config have in common: an option, what was found, what was expected."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bigdet.config.load import ConfigError


def unused(key: str, section: Any, name: str, reason: str) -> None:
    """Refuse an option that was set and would be ignored."""
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    if getattr(section, name) != field.default:
        raise ConfigError(f"{key}.{name}: {reason}, so it would be ignored. Remove it.")


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
