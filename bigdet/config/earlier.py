"""Configs that older versions wrote, before some options existed or with other defaults.

The resolved config of a run folder, a checkpoint or a weights file has every option of its version.
If it lacks one of those below, an older version wrote it, and what that version did holds.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bigdet.config.compare import flat_options
from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.config.run import RunConfig

logger = logging.getLogger(__name__)

LATER_SECTIONS = {"device"}
"""Sections that resolved configs of earlier versions lack."""

FORMER_VALUES: dict[str, Any] = {
    "model.rpn.low_quality_iou": 0.0,
    "model.roi.crowd_coverage": 0.7,
    "evaluation.tta.pool": "detections",
}
"""Options that did not exist, and the values that do what was done then."""

FORMER_DEFAULTS: dict[str, Any] = {
    "model.rpn.train_proposals": 2000,
    "model.rpn.low_quality_iou": 0.0,
    "model.roi.crowd_coverage": 0.7,
    "engine.gather_precision": "fp32",
}
"""Options of training whose defaults have changed, and the former ones."""


def fill_in_former(values: DictConfig) -> DictConfig:
    """Return a resolved config with the options that did not exist when it was written.

    A config that a user wrote never has all sections, and is returned as it is.
    """
    sections = {field.name for field in dataclasses.fields(RunConfig)} - LATER_SECTIONS
    if not all(name in values for name in sections):
        return values
    filled = values.copy()
    if OmegaConf.select(filled, "model.detector") == "retinanet":  # they were listed without effect
        for section in ("rpn", "roi"):
            filled.model.pop(section, None)
    for key, value in FORMER_VALUES.items():
        section = OmegaConf.select(filled, key.rpartition(".")[0])
        if isinstance(section, DictConfig) and key.rpartition(".")[2] not in section:
            OmegaConf.update(filled, key, value)
    return filled


def keep_former(config: RunConfig, before: RunConfig) -> RunConfig:
    """Return the config of a resumed run with the former defaults that it began with.

    So the command that started a run also resumes it after a default has changed. An option that
    was set to another value stays, and is refused if it may not change.

    Args:
        config: as the user wrote it.
        before: that of the checkpoint.
    """
    plain = RunConfig(model=ModelConfig(rpn=RpnConfig(), roi=RoiConfig()))
    own, theirs, default = map(flat_options, (config, before, plain))
    kept = []
    for key, former in FORMER_DEFAULTS.items():
        if own.get(key) == default[key] and theirs.get(key) == former:
            config = _with_option(config, key.split("."), former)
            kept.append(f"{key}={former}")
    if kept:
        listed = ", ".join(kept)
        logger.info("the run continues as it began, with %s: the defaults have changed", listed)
    return config


def _with_option(section: Any, names: list[str], value: Any) -> Any:
    if len(names) > 1:
        value = _with_option(getattr(section, names[0]), names[1:], value)
    return dataclasses.replace(section, **{names[0]: value})
