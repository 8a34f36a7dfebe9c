"""From YAML files and ``key=value`` overrides to a ``RunConfig``: names and types are checked here.

Composition is one level deep: an experiment lists fragments under ``include``; the experiment
overrides its fragments, the command line overrides all. Lists are replaced, never merged.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from bigdet.config.earlier import fill_in_former
from bigdet.config.families import BACKBONES, DETECTORS
from bigdet.config.own import refuse_unknown
from bigdet.config.schema import RunConfig
from bigdet.config.shipped import find_config, nearest_shipped


class ConfigError(ValueError):
    """Something that a user wrote in a config file or on the command line."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read an experiment with its fragments and apply overrides.

    Args:
        path: the YAML file, or the name of one that comes with bigdet.
        overrides: ``key=value`` words, applied last; a phase may be changed, not added.

    Returns:
        The config, every required option present and every value of its type. The rules that tie
        options together are ``config/check.py``'s; its ``written`` tells them what the experiment
        and the overrides repeat. Fragments serve several experiments and may repeat defaults, and
        the config of a run folder lists every option.

    Raises:
        ConfigError: with the file and the full key.
    """
    path = find_config(path)
    experiment = read_yaml(path)
    if "runs" in experiment:
        raise ConfigError(f"{path}: is a sweep. Start it with `bigdet sweep {path}`.")
    merged = plain = OmegaConf.structured(RunConfig)
    owner: dict[str, Path] = {}
    for fragment_path in _included(path, experiment):
        try:
            fragment = read_yaml(fragment_path)
        except ConfigError as error:
            raise ConfigError(f"{path}: include: {error}") from error
        if "include" in fragment:
            raise ConfigError(
                f"{fragment_path}: include: a fragment includes nothing. List its fragments in "
                f"{path}."
            )
        for key in _leaves(OmegaConf.to_container(fragment)):
            if key in owner:
                raise ConfigError(
                    f"{fragment_path}: {key}: {owner[key]} sets it too. Two fragments may not set "
                    f"the same key; set it in {path}."
                )
            owner[key] = fragment_path
        merged = _merge(merged, fragment, str(fragment_path))
    base, merged = merged, _merge(merged, fill_in_former(experiment), str(path))
    repeated: set[str] = set()
    if not _is_resolved(experiment):
        repeated, chosen = _set_by(base, experiment, merged)
        of_fragments = {key for key in owner if _repeats(plain, base, key)}
        repeated |= {key for key in of_fragments if not _is_chosen_anew(key, chosen)}
    final, changes = _override(merged, overrides)
    also_repeated, changed = _set_by(merged, changes, final)
    repeated = {key for key in repeated if not _is_chosen_anew(key, changed)}
    return _complete(final, str(path), repeated | also_repeated)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a resolved config, as a run folder and its weights carry it.

    Args:
        text: YAML, as ``dump_config`` writes it.
        source: where it came from, for messages.
        overrides: as for ``load_config``.
    """
    try:
        values = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: not a config: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{source}: not a config: expected a mapping of sections.")
    merged = _merge(OmegaConf.structured(RunConfig), fill_in_former(values), source)
    final, changes = _override(merged, overrides)
    return _complete(final, source, _set_by(merged, changes, final)[0])


def check_phase(config: RunConfig, name: str) -> None:
    """Raise ``ConfigError`` unless the config has the phase that ``--phase`` names."""
    if name not in config.phases:
        names = list(config.phases)
        raise ConfigError(
            f"--phase {name}: there is no such phase{_nearest(name, names)} The config has "
            f"{', '.join(names)}."
        )


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML that repeats the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat_options(config: Any) -> dict[str, Any]:
    """Return every option of a config, or of a section, by its key in it, to compare two."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    return dict(_leaf_items(container))


_PLAIN_WORDS = {
    "is not Optional": "found null, expected a value. Write one, or leave the option out.",
    "Incompatible value 'None'": "found null, expected a value. Write one, or leave it out.",
    "Cannot convert 'ListConfig'": "found a list, expected one value.",
    "is not a ListConfig": "found one value, expected a list such as [value, value].",
    "is not a subclass of": "found one value, expected a section of options such as {key: value}.",
    "TupleConfig length": "found a list of another length than expected.",
    "read-only": "interpolations such as ${seed} are not supported. Write the value.",
}
"""OmegaConf's words for what users do wrong, and ours."""


def read_yaml(path: Path) -> DictConfig:
    """Read a file that holds a mapping of sections."""
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError as error:
        near = _nearest(str(path), [str(file) for file in path.parent.glob("*.yaml")])
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
        raise ConfigError(f"{path}: cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, such as `output: runs/x`.")
    return values


def _included(path: Path, experiment: DictConfig) -> list[Path]:
    """Take ``include`` out of an experiment and return its files, beside it or of bigdet."""
    names = experiment.pop("include", [])
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or []):
        raise ConfigError(f"{path}: include: expected a list of files, found {names!r}.")
    return [find_config(name, path.parent) for name in names or []]


def _merge(base: DictConfig, values: DictConfig, source: str) -> DictConfig:
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
    for key, value in _leaf_items(OmegaConf.to_container(values)):
        kind = ".".join(key.split(".")[-2:])
        names: dict[str, Collection[str]] = {
            "model.backbone": BACKBONES, "model.detector": DETECTORS,
        }  # fmt: skip
        known = names.get(kind)
        if known is not None and value is not None:
            try:
                refuse_unknown(key, str(value), known)
            except ValueError as error:
                raise ConfigError(f"{source}: {error}") from error


_CHOICES = ("detector", "backbone", "norm", "kind", "optimizer", "schedule", "order", "box_loss")
"""Options that choose a part, whose own options nothing else heeds."""


def _is_resolved(experiment: DictConfig) -> bool:
    """Tell whether a file is the config of a run folder: it lists (nearly) all there is."""
    known = _known_keys()
    return 2 * len(known.intersection(_leaves(OmegaConf.to_container(experiment)))) > len(known)


@functools.cache
def _known_keys() -> frozenset[str]:
    """Every option but those of phases."""
    return frozenset(_leaves(OmegaConf.to_container(OmegaConf.structured(RunConfig))))


def _set_by(
    before: DictConfig, values: DictConfig, after: DictConfig
) -> tuple[set[str], list[str]]:
    """Return the keys that a layer of the config sets to what they were anyway, and the others.

    null is among the others: it says that an option is off or not given.
    """
    repeated, changed = set(), []
    for key in _leaves(OmegaConf.to_container(values)):
        if _repeats(before, after, key):
            repeated.add(key)
        else:
            changed.append(key)
    return repeated, changed


def _repeats(before: DictConfig, after: DictConfig, key: str) -> bool:
    """Tell whether a layer that has an option sets it to what it was anyway."""
    new = _value_at(after, key)
    return new is not None and _value_at(before, key) in (None, new)


def _value_at(config: DictConfig, key: str) -> Any:
    """Return an option's value; None where it has none yet."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, DictConfig) or part not in value:
            return None
        value = value[part]
    return value


def _is_chosen_anew(key: str, changed: Sequence[str]) -> bool:
    """Tell whether the command line chose another part than that which a file has options for.

    So one config may serve a sweep over optimizers, detectors and the like.
    """
    for other in changed:
        section, _, name = other.rpartition(".")
        is_of_phase = section.startswith("phases.") and section.endswith(".model")
        if name in _CHOICES and key.startswith("model." if is_of_phase else f"{section}."):
            return True
    return False


def _override(merged: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """Apply the words of the command line; return the config and what they set."""
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
                f"command line: {key}: there is no phase {parts[1]!r}{_nearest(parts[1], phases)} "
                f"The config has {', '.join(phases)}; the command line can change a phase, not add "
                f"one."
            )
        try:
            changes.append(OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"command line: {word!r}: {_one_line(error)}") from error
    together = OmegaConf.merge(DictConfig({}), *changes)  # much faster than one by one
    assert isinstance(together, DictConfig)
    try:
        return _merge(merged, together, ""), together
    except ConfigError:
        for word, change in zip(overrides, changes, strict=True):
            merged = _merge(merged, change, f"command line: {word}")
        return merged, together


def _complete(merged: DictConfig, source: str, written: Collection[str]) -> RunConfig:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(
            f"{source}: required and not set: {', '.join(missing)}. Set them in the file, or on "
            f"the command line as {missing[0]}=VALUE."
        )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    output, resume = os.path.expanduser(config.output), os.path.expanduser(config.resume)
    config = dataclasses.replace(config, output=output, resume=resume)  # in a file no shell did
    object.__setattr__(config, "written", frozenset(written))
    return config


def _leaf_items(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaf_items(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _leaves(values: Any) -> list[str]:
    return [key for key, _ in _leaf_items(values)]


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def explain(error: OmegaConfBaseException) -> str:
    """Turn OmegaConf's message of several lines into ``full.key: what is wrong``."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        known = [option.name for option in dataclasses.fields(error.object_type)]
        near = _nearest(str(error.key), known)
        message = (
            f"there is no such option{near if '?' in near else '. There are: ' + ', '.join(known)}"
        )
    for found, said in _PLAIN_WORDS.items():
        if found in message:
            message = said
    if message.endswith("could not be converted to Integer"):
        message += ". Write a whole number without a point or an e, such as 300_000."
    return f"{key}: {message}" if key else message
