"""From YAML files and ``key=value`` words to a ``RunConfig`` that obeys all rules.

Composition is one level deep: an experiment lists fragments under ``include``; the experiment
overrides its fragments, the command line overrides all. Lists are replaced, never merged.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bigdet.config.compare import leaf_items
from bigdet.config.earlier import fill_in_former
from bigdet.config.layers import merge, one_line, override, read_yaml
from bigdet.config.model import settle_sections
from bigdet.config.own import is_own
from bigdet.config.rules import ConfigError, nearest
from bigdet.config.run import RunConfig, check_config
from bigdet.config.shipped import find_config

Layer = tuple[DictConfig, DictConfig, DictConfig]
"""A layer of a config: the config without it, its values, the config with it."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read an experiment with its fragments, apply overrides, and check all rules.

    Args:
        path: the YAML file, or the name of one that comes with bigdet.
        overrides: ``key=value`` words, applied last; a phase may be changed, not added.

    Raises:
        ConfigError: with the file and the full key.
    """
    config, written = read_unchecked(path, overrides)
    check_config(config, written)
    return config


def read_unchecked(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, set[str]]:
    """Do as `load_config` without the rules.

    Returns:
        The config, and the keys that were set to the values that they had anyway.
    """
    path = find_config(path)
    experiment = read_yaml(path)
    if "runs" in experiment:
        raise ConfigError(f"{path}: is a sweep. Start it with `bigdet sweep {path}`.")
    plain = OmegaConf.structured(RunConfig)
    fragments = _read_fragments(path, experiment)
    base = merge(plain, fragments, str(path))
    merged = merge(base, fill_in_former(experiment), str(path))
    final, changes = override(merged, overrides)
    layers = [(plain, fragments, base), (base, experiment, merged), (merged, changes, final)]
    if _is_resolved(experiment):  # it lists options without effect too
        layers = layers[2:]
    written = _repeated(layers)
    return _settle(_complete(final, str(path)), written), written


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a resolved config, as a run folder and its weights have it; ``source`` is for messages.

    The rules were checked when it was written. They are checked again if there are overrides.
    """
    try:
        values = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: not a config: {one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{source}: not a config: expected a mapping of sections.")
    merged = merge(OmegaConf.structured(RunConfig), fill_in_former(values), source)
    final, changes = override(merged, overrides)
    config = _complete(final, source)
    if overrides:
        written = _repeated([(merged, changes, final)])
        config = _settle(config, written)
        check_config(config, written)
    elif not is_own(config.model.detector):  # importing a user's code is left to those who run it
        config = _settle(config, ())
    return config


def read_config(path: Path) -> RunConfig:
    """Read the config of a run folder."""
    return parse_config(path.read_text(encoding="utf-8"), str(path))


def check_phase(config: RunConfig, name: str) -> None:
    """Raise ``ConfigError`` unless the config has the phase that ``--phase`` names."""
    if name not in config.phases:
        names = list(config.phases)
        raise ConfigError(
            f"--phase {name}: there is no such phase{nearest(name, names)} The config has "
            f"{', '.join(names)}."
        )


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML that repeats the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_fragments(path: Path, experiment: DictConfig) -> DictConfig:
    """Take ``include`` out of an experiment and return what its files set together."""
    names = experiment.pop("include", None) or []
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include: expected a list of files, found {names!r}.")
    together = DictConfig({})
    owner: dict[str, Path] = {}
    for file in [find_config(name, path.parent) for name in names]:
        try:
            fragment = read_yaml(file)
        except ConfigError as error:
            raise ConfigError(f"{path}: include: {error}") from error
        if "include" in fragment:
            raise ConfigError(
                f"{file}: include: a fragment includes nothing. List its fragments in {path}."
            )
        for key in _leaves(fragment):
            if key in owner:
                raise ConfigError(
                    f"{file}: {key}: {owner[key]} sets it too. Two fragments may not set the same "
                    f"key; set it in {path}."
                )
            owner[key] = file
        merge(OmegaConf.structured(RunConfig), fragment, str(file))  # names the file in errors
        together = merge(together, fragment, str(file))
    return together


_CHOICES = ("detector", "backbone", "norm", "kind", "optimizer", "schedule", "order", "box_loss")
"""Options that choose a part. The options of a part have no effect without it."""


def _is_resolved(experiment: DictConfig) -> bool:
    """Tell whether a file is the config of a run folder, which lists (nearly) all options."""
    known = _known_keys()
    return 2 * len(known.intersection(_leaves(experiment))) > len(known)


@functools.cache
def _known_keys() -> frozenset[str]:
    """Every option except those of phases."""
    return frozenset(_leaves(OmegaConf.structured(RunConfig)))


def _repeated(layers: Sequence[Layer]) -> set[str]:
    """Return the keys that layers set to the values that they had anyway.

    Keys set to null are left out (the option is off or not given), and so are those that a later
    layer sets back, and options of a part that a later layer replaces, so that one config may serve
    a sweep over optimizers or detectors.
    """
    repeated: set[str] = set()
    for before, values, after in layers:
        keys = _leaves(values)
        same = {key for key in keys if _value_at(after, key) is not None}
        same = {key for key in same if _value_at(before, key) in (None, _value_at(after, key))}
        changed = [key for key in keys if key not in same]
        kept = (key for key in repeated if key not in changed and not _is_chosen_anew(key, changed))
        repeated = {*kept, *same}
    return repeated


def _value_at(config: DictConfig, key: str) -> Any:
    """Return the value of an option; None if it has none yet."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, DictConfig) or part not in value:
            return None
        value = value[part]
    return value


def _is_chosen_anew(key: str, changed: Sequence[str]) -> bool:
    """Tell whether an option belongs to a part that was replaced."""
    for other in changed:
        section, _, name = other.rpartition(".")
        if re.fullmatch(r"phases\..*\.model", section):
            section = "model"
        if name in _CHOICES and key.startswith(f"{section}."):
            return True
    return False


def _complete(merged: DictConfig, source: str) -> RunConfig:
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(
            f"{source}: required and not set: {', '.join(missing)}. Set them in the file, or on "
            f"the command line as {missing[0]}=VALUE."
        )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    output, resume = os.path.expanduser(config.output), os.path.expanduser(config.resume)
    return dataclasses.replace(config, output=output, resume=resume)  # as a shell would


def _settle(config: RunConfig, written: Collection[str]) -> RunConfig:
    """Give the model the sections of the detectors of all phases, and no others."""
    own = [phase.model.detector for phase in config.phases.values()]
    detectors = {config.model.detector, *(name for name in own if name is not None)}
    model = settle_sections(config.model, detectors, written)
    return dataclasses.replace(config, model=model)


def _leaves(values: DictConfig) -> list[str]:
    return [key for key, _ in leaf_items(OmegaConf.to_container(values))]
