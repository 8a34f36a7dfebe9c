"""Configs from before some options existed, or had other defaults: what was in force then.

A resolved config, as a run folder, a checkpoint and a weights file carry it, has every option of
its time. One that lacks an option below was written before it, and means what was done then.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.config.run import RunConfig

logger = logging.getLogger(__name__)

FORMER_VALUES: dict[str, Any] = {
    "model.rpn.low_quality_iou": 0.0,
    "model.roi.crowd_coverage": 0.7,
    "evaluation.tta.pool": "detections",
}
"""Options that did not exist, and what was done in their place."""

FORMER_DEFAULTS: dict[str, Any] = {
    "model.rpn.train_proposals": 2000,
    "model.rpn.low_quality_iou": 0.0,
    "model.roi.crowd_coverage": 0.7,
}
"""Options that matter in training whose defaults are others today."""


def fill_in_former(values: DictConfig) -> DictConfig:
    """Return a config with what was in force when it was written, if it is a resolved one.

    What somebody writes by hand never has all sections, and stays as it is.
    """
    if not all(field.name in values for field in dataclasses.fields(RunConfig)):
        return values
    filled = values.copy()
    if OmegaConf.select(filled, "model.detector") == "retinanet":  # which has no use for them
        for section in ("rpn", "roi"):
            filled.model.pop(section, None)
    for key, value in FORMER_VALUES.items():
        section = OmegaConf.select(filled, key.rpartition(".")[0])
        if isinstance(section, DictConfig) and key.rpartition(".")[2] not in section:
            OmegaConf.update(filled, key, value)
    return filled


def keep_former(config: RunConfig, before: RunConfig) -> RunConfig:
    """Return the config of a resumed run with the former defaults that it began with.

    So the command that began a run goes on with it, though a default is another by now. An option
    that was set to something else stays, and is refused if it may not change.

    Args:
        config: as the user wrote it.
        before: of the checkpoint.
    """
    sections = ModelConfig(rpn=RpnConfig(), roi=RoiConfig())
    plain = RunConfig(model=sections)
    kept = []
    for key, former in FORMER_DEFAULTS.items():
        own, theirs, default = (_option(each, key) for each in (config, before, plain))
        if own == default and theirs == former:
            config = _with_option(config, key.split("."), former)
            kept.append(f"{key}={former}")
    if kept:
        logger.info(
            "the run goes on as it began, with %s: the defaults of today are others",
            ", ".join(kept),
        )
    return config


def _option(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _with_option(section: Any, names: list[str], value: Any) -> Any:
    if len(names) > 1:
        value = _with_option(getattr(section, names[0]), names[1:], value)
    return dataclasses.replace(section, **{names[0]: value})
