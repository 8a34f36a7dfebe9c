"""One layer of a config: a YAML file or the words of a command line, merged over what it changes.

Names and types are checked here, by OmegaConf and the schema.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from bigdet.config.compare import leaf_items
from bigdet.config.families import BACKBONES, DETECTORS
from bigdet.config.own import refuse_unknown
from bigdet.config.rules import ConfigError, nearest
from bigdet.config.shipped import nearest_shipped
from bigdet.config.timm_names import PREFIX as TIMM
from bigdet.config.timm_names import timm_row

_PLAIN_WORDS = {
    "is not Optional": "found null, expected a value. Write one, or leave the option out.",
    "Incompatible value 'None'": "found null, expected a value. Write one, or leave it out.",
    "Cannot convert 'ListConfig'": "found a list, expected one value.",
    "is not a ListConfig": "found one value, expected a list such as [value, value].",
    "is not a subclass of": "found one value, expected a section of options such as {key: value}.",
    "TupleConfig length": "found a list of another length than expected.",
    "read-only": "interpolations such as ${seed} are not supported. Write the value.",
}
"""Parts of OmegaConf's messages about what users write wrong, and bigdet's messages."""


def read_yaml(path: Path) -> DictConfig:
    """Read a file that holds a mapping of sections."""
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError as error:
        near = nearest(str(path), [str(file) for file in path.parent.glob("*.yaml")])
        if near == "." and (shipped := nearest_shipped(path)) is not None:
            near = f"; did you mean {shipped!r}, which comes with bigdet?"
        raise ConfigError(
            f"{path}: there is no such config file{near} `bigdet configs` lists those that come "
            f"with bigdet."
        ) from error
    except IsADirectoryError as error:
        inside = sorted(path.glob("*.yaml"))
        such = f", such as {inside[0]}" if inside else ""
        raise ConfigError(f"{path}: is a folder. Give a YAML file{such}.") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, such as `output: runs/x`.")
    return values


def merge(base: DictConfig, values: DictConfig, source: str) -> DictConfig:
    """Return ``base`` with the values of a layer; lists are replaced.

    ``source`` is the file or the word of the layer, for messages.
    """
    try:
        merged = OmegaConf.merge(base, values)
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {explain(error)}") from error
    assert isinstance(merged, DictConfig)
    _check_names(values, source)
    return merged


def _check_names(values: DictConfig, source: str) -> None:
    """Refuse names of backbones and detectors that are neither bigdet's nor a user's own."""
    for key, value in leaf_items(OmegaConf.to_container(values)):
        kinds: dict[str, Collection[str]] = {"backbone": BACKBONES, "detector": DETECTORS}
        *_, section, name = ["", *key.split(".")]
        if section != "model" or name not in kinds or value is None:
            continue
        try:
            if str(value).startswith(TIMM):
                timm_row(str(value))
            else:
                refuse_unknown(key, str(value), kinds[name])
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from error


def override(merged: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """Apply the words of a command line; return the config, and the values that they set."""
    phases = [] if OmegaConf.is_missing(merged, "phases") else list(merged.phases)
    changes = []
    for word in overrides:
        key, found, _ = word.partition("=")
        if not found or not key or key.startswith("-"):
            raise ConfigError(f"command line: {word!r}: expected key=value, such as seed=1.")
        parts = key.split(".")
        if key == "phases" or word.endswith("=???"):
            raise ConfigError(
                f"command line: {word!r}: would change nothing. Write a value, for a phase as "
                f"phases.NAME.option=value."
            )
        if parts[0] == "phases" and len(parts) > 1 and parts[1] not in phases:
            raise ConfigError(
                f"command line: {key}: there is no phase {parts[1]!r}{nearest(parts[1], phases)} "
                f"The config has {', '.join(phases)}; the command line can change a phase, not add "
                f"one."
            )
        try:
            changes.append(OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"command line: {word!r}: {one_line(error)}") from error
    together = OmegaConf.merge(DictConfig({}), *changes)  # much faster than one by one
    assert isinstance(together, DictConfig)
    try:
        return merge(merged, together, ""), together
    except ConfigError:
        for word, change in zip(overrides, changes, strict=True):
            merged = merge(merged, change, f"command line: {word}")
        return merged, together


def explain(error: OmegaConfBaseException) -> str:
    """Turn an error of OmegaConf, whose message has several lines, into ``full.key: problem``."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        known = [option.name for option in dataclasses.fields(error.object_type)]
        near = nearest(str(error.key), known)
        message = f"there is no such option{near}"
        message += f" There are: {', '.join(known)}." if near == "." else ""
    message = next((plain for words, plain in _PLAIN_WORDS.items() if words in message), message)
    if message.endswith("could not be converted to Integer"):
        message += ". Write a whole number without a point or an e, such as 300_000."
    return f"{key}: {message}" if key else message


def one_line(error: Exception) -> str:
    """Return the message of an error without line ends."""
    return " ".join(str(error).split())
