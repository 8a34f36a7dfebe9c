"""What the rules of all sections share: the error, common checks, and options without effect."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

CHOICES = "choices"
"""In the metadata of an option that is a string: its choices."""
_ONLY_FOR = "only for"

Ignored = Iterator[tuple[str, str]]
"""Full keys of options, or of whole sections, that have no effect in a config, each with why."""


class ConfigError(ValueError):
    """Something that a user wrote in a config file or on the command line."""


def nearest(name: str, names: Collection[str]) -> str:
    """Return how a sentence about an unknown name ends: with a hint, or with a full stop."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Raise ``ConfigError`` unless the rule of an option holds."""
    if not holds:
        raise ConfigError(f"{key}: found {found}, expected {expected}.")


def _rule(holds: Callable[[Any], bool], expected: str) -> Callable[..., None]:
    """Return a check of some options of a section: their key, the section, and their names."""

    def check(key: str, section: Any, *names: str) -> None:
        for name in names:
            value = getattr(section, name)
            require(value is None or holds(value), f"{key}.{name}", value, expected)

    return check


positive = _rule(lambda value: 0 < value < math.inf, "a number above 0")
not_negative = _rule(lambda value: 0 <= value < math.inf, "0 or more")
fraction = _rule(lambda value: 0 <= value <= 1, "a number in [0, 1]")
positive_fraction = _rule(lambda value: 0 < value <= 1, "a number in (0, 1]")
below_one = _rule(lambda value: 0 <= value < 1, "a number in [0, 1)")
all_positive = _rule(lambda values: bool(values) and min(values) > 0, "a list of numbers above 0")


def only_for(choice: str, *values: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the metadata of an option that has an effect with some ``values`` of ``choice`` only.

    ``choice`` is another option of the same section.
    """
    return {_ONLY_FOR: (choice, values)}


def ignored_by_choice(section: Any, prefix: str = "") -> Ignored:
    """Yield the options that have no effect in this config, as `only_for` declares.

    Args:
        section: of the config, or all of it; sections in it are included.
        prefix: of the keys of its options, such as ``data.``.
    """
    for option in dataclasses.fields(section):
        key, value = prefix + option.name, getattr(section, option.name)
        choice, values = option.metadata.get(_ONLY_FOR, ("", ()))
        if choice and getattr(section, choice) not in values:
            yield key, f"is for {choice}: {' or '.join(values)}"
        elif dataclasses.is_dataclass(value):
            yield from ignored_by_choice(value, f"{key}.")
        elif isinstance(value, dict):
            for name, each in value.items():
                yield from ignored_by_choice(each, f"{key}.{name}.")


def refuse_ignored(
    config: Any, ignored: Iterable[tuple[str, str]], written: Collection[str]
) -> None:
    """Refuse options without effect that a user set.

    Args:
        config: the whole config.
        ignored: options and sections without effect.
        written: full keys that a user set to their defaults (other values were set in any case).
    """
    for key, reason in ignored:
        *path, name = key.split(".")
        section = config
        for part in path:
            section = section[part] if isinstance(section, dict) else getattr(section, part)
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            inner = [(f"{key}.{option.name}", reason) for option in dataclasses.fields(value)]
            refuse_ignored(config, inner, written)
        elif value != (default := default_of(section, name)) or key in written:
            advice = "Remove it"
            if value != default and isinstance(default, str | int | float | None):
                advice += f", or write {key}={json.dumps(default)} if a config that you use sets it"
            raise ConfigError(f"{key}: {reason}, so it would be ignored. {advice}.")


def default_of(section: Any, name: str) -> Any:
    """Return the default of an option of a section."""
    option = next(option for option in dataclasses.fields(section) if option.name == name)
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default
