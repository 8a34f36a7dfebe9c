"""The options of a source of shards, taken from the function that converts it.

Its parameters become options: ``split: str`` becomes ``--split``, required unless it has a default,
with the parameter's line in the docstring's ``Args`` as its help. bigdet passes ``out``, ``making``
and ``progress``. This holds for bigdet's sources and for a user's own, ``bigdet shards
package.module:convert``: see ``data/making/sources/records.py``.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigdet.config.own import import_callable, parameters_of, type_name
from bigdet.data.format.manifest import Category, Manifest
from bigdet.data.making.conversion import Making, Progress
from bigdet.data.making.sources.categories import load_categories

Convert = Callable[..., Manifest | None]

GIVEN = ("out", "making", "progress")
_KINDS: dict[Any, Any] = {Path: Path, str: str, int: int, float: float, list[Category]: Path}
"""Types of parameters, and the types that words of the command line are converted to."""


def import_source(name: str) -> Convert:
    """Import a user's source of shards.

    Raises:
        ValueError: it does not exist, or ``bigdet shards`` cannot call it.
    """
    key = "bigdet shards"
    function: Convert = import_callable(key, name)
    parameters = parameters_of(key, name, function)
    if lacking := [each for each in GIVEN if each not in parameters]:
        raise ValueError(
            f"{key}: {name} takes ({', '.join(parameters)}), expected {', '.join(lacking)} too."
        )
    for each, kind in _kinds(key, name, function).items():
        if kind not in _KINDS:
            raise ValueError(
                f"{key}: {name} takes {each}: {kind}, expected Path, str, int, float or "
                f"list[Category]."
            )
    return function


def _kinds(key: str, name: str, function: Convert) -> dict[str, Any]:
    """Return the type of each parameter that is an option; without an annotation, text."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ValueError(f"{key}: {name}: a type of a parameter is unknown: {error}.") from error
    kinds = {}
    for each in inspect.signature(function).parameters:
        kind = hints.get(each, str)
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        kinds[each] = kind
    return {each: kind for each, kind in kinds.items() if each not in GIVEN}


def add_options(parser: argparse.ArgumentParser, function: Convert) -> None:
    """Add the options of a source to its parser."""
    parameters = inspect.signature(function).parameters
    for name, kind in _kinds("bigdet shards", parser.prog, function).items():
        default = parameters[name].default
        is_required = default is inspect.Parameter.empty
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_KINDS[kind],
            required=is_required,
            default=None if is_required else default,
            help=_help(function, name),
        )


def _help(function: Convert, name: str) -> str:
    """Return the text of the docstring on a parameter, as one line."""
    text = inspect.getdoc(function) or ""
    found = re.search(rf"^    {name}: (.*(?:\n {{5,}}.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()).replace("`", "").replace("%", "%%") if found else name


def call_source(
    name: str, function: Convert, arguments: argparse.Namespace, making: Making, progress: Progress
) -> Manifest | None:
    """Convert a source as the command line says.

    Raises:
        ValueError: a user's own does not return a manifest.
    """
    options = {}
    for each, kind in _kinds("bigdet shards", name, function).items():
        value = getattr(arguments, each)
        is_list = kind == list[Category] and value is not None
        options[each] = load_categories(value) if is_list else value
    manifest = function(**options, out=arguments.out, making=making, progress=progress)
    if not (isinstance(manifest, Manifest) or (manifest is None and making.part is not None)):
        raise ValueError(
            f"bigdet shards: {name} returned {type_name(manifest)}, expected the Manifest that "
            f"convert or convert_records returns."
        )
    return manifest
