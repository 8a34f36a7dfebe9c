"""Every option as text: its key, type and default, and the docstring below it in the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union

from omegaconf import MISSING

from bigdet.config.rules import CHOICES, ConfigError, nearest
from bigdet.config.run import RunConfig
from bigdet.config.timm_names import timm_table

WIDTH = 100  # of the text, characters
INDENT = "    "
ANY_NAME = "NAME"  # in place of the name of a phase


@dataclass(frozen=True)
class Option:
    """One option, or a section of them.

    Attributes:
        key: in full, with ``NAME`` for the name of a phase.
        kind: its type, or its choices; empty for a section.
        default: in YAML; empty if there is none. Of a section: ``null`` if it may be absent.
        text: what it is, with its unit.
    """

    key: str
    kind: str
    default: str
    text: str


def list_options(section: type = RunConfig, prefix: str = "") -> Iterator[Option]:
    """Yield the options of a section of the schema, each section before its options."""
    hints = typing.get_type_hints(section)
    texts = _docstrings(section)
    for field in dataclasses.fields(section):
        key, hint = prefix + field.name, hints[field.name]
        inner, is_optional = _section_in(hint)
        if inner is None:
            kind = _kind(hint)
            if choices := field.metadata.get(CHOICES):
                kind = kind.replace("str", " | ".join(choices))
            yield Option(key, kind, _default(field), texts[field.name])
            continue
        if typing.get_origin(hint) is dict:
            key = f"{key}.{ANY_NAME}"
        default = "null" if is_optional else ""
        yield Option(key, "", default, texts[field.name])
        yield from list_options(inner, f"{key}.")


def describe_options(prefix: str = "") -> str:
    """Return the options whose keys begin with a prefix as text.

    Args:
        prefix: whole words of a key, such as ``data.train``; a phase is ``NAME`` or any name.

    Raises:
        ConfigError: there is no such option.
    """
    options = list(list_options())
    wanted = prefix.split(".") if prefix else []
    if wanted[:1] == ["phases"] and len(wanted) > 1:
        wanted[1] = ANY_NAME
    chosen = [option for option in options if option.key.split(".")[: len(wanted)] == wanted]
    if not chosen:
        near = nearest(prefix, [option.key for option in options])
        raise ConfigError(f"--options {prefix}: there is no such option or section{near}")
    text = "\n".join(_lines(option) for option in chosen) + "\n"
    return text + timm_table() if wanted == ["model", "backbone"] else text


def _lines(option: Option) -> str:
    """Return an option as text of several lines: key, type and default, then what it is."""
    head = option.key
    if option.kind:
        head += f": {option.kind} = {option.default}" if option.default else f": {option.kind}"
        head += "" if option.default else " (required)"
    else:
        head += ":" if not option.default else ": (a section) = null"
    lines = textwrap.wrap(head, WIDTH, subsequent_indent=2 * INDENT)
    lines += textwrap.wrap(option.text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(lines)


def _section_in(hint: Any) -> tuple[type | None, bool]:
    """Return the section in a type such as ``dict[str, Section]``, and whether it may be null."""
    choices = typing.get_args(hint)
    for choice in (hint, *choices):
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice, type(None) in choices
    return None, False


def _kind(hint: Any) -> str:
    """Return a type as text; of a choice its values."""
    if hint is type(None):
        return "null"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (types.UnionType, Union):
        return " | ".join(map(_kind, inner))
    if origin in (list, tuple):
        return f"[{', '.join(map(_kind, inner))}{', ...' if origin is list else ''}]"
    return str(hint.__name__)


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option in YAML, empty if there is none."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING or value == MISSING:
        return ""
    return json.dumps(value).replace('"', "")


@cache
def _docstrings(section: type) -> dict[str, str]:
    """Return the docstring below each option of a section: Python itself does not keep them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            words = str(below.value.value).replace("None:", "null:").split()  # as YAML has it
            texts[node.target.id] = " ".join(words)
    return texts
