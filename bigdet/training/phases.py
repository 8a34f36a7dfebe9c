"""The hand-over between phases: which weights a phase starts from, which of them it trains."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from bigdet.config.derived import model_parts, phase_source
from bigdet.config.load import ConfigError
from bigdet.config.schema import PhaseConfig, RunConfig
from bigdet.models import backbones, norms, weights
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.ops.random import seed_of
from bigdet.run_dir import RunDir

logger = logging.getLogger(__name__)


def build_for_phase(
    config: RunConfig, name: str, num_classes: int, run_dir: RunDir, device: torch.device
) -> Detector:
    """Build the detector with the weights that a phase starts from, and freeze what it freezes.

    Args:
        config: the run.
        name: the phase.
        num_classes: K of the training set.
        run_dir: where the phase before left its weights.
        device: of the detector.

    Returns:
        The detector in training mode. Its random weights depend on the seed and the phase alone.
    """
    phase = config.phases[name]
    torch.manual_seed(seed_of(config.seed, name, "weights"))
    detector = build_detector(config.model, num_classes)
    _load_start(detector, config, name, run_dir)
    if phase.norm_mode is not None:
        norms.set_norm_mode(detector, phase.norm_mode)
    backbones.freeze_stages(detector.backbone, phase.freeze_stages)
    return detector.to(device, memory_format=torch.channels_last).train()


def last_checkpoint(config: RunConfig, name: str, run_dir: RunDir) -> Path:
    """Return the checkpoint that the phase before ``name`` ends with."""
    names = list(config.phases)
    before = names[names.index(name) - 1]
    return run_dir.checkpoint(before, config.phases[before].steps)


def _load_start(detector: Detector, config: RunConfig, name: str, run_dir: RunDir) -> None:
    phase = config.phases[name]
    source = phase_source(config, name)
    if source == "random":
        logger.info("phase %s: all weights random", name)
        return
    parts = _wanted_parts(config, phase, source)
    if source == "timm":
        rows = weights.load_timm_backbone(detector, config.model.backbone)
    else:
        path = last_checkpoint(config, name, run_dir) if source == "previous" else Path(source)
        rows = weights.load_parts(detector, weights.read_tensors(path), parts, str(path))
    for row in rows:
        logger.info(
            "phase %s: %-9s from %s: %d tensors, %s parameters",
            name, row.part, row.source, row.tensors, f"{row.parameters:,}",
        )  # fmt: skip
    fresh = [part for part in model_parts(config.model) if part not in {row.part for row in rows}]
    if fresh:
        logger.info("phase %s: random: %s", name, ", ".join(fresh))


def _wanted_parts(config: RunConfig, phase: PhaseConfig, source: str) -> list[str]:
    if source not in ("timm", "previous") and not Path(source).exists():
        raise ConfigError(
            f"start_from.source: {source} does not exist. Write random, timm, previous, or the "
            f"path of a run or a model.safetensors."
        )
    return list(phase.start_from.parts or model_parts(config.model))
