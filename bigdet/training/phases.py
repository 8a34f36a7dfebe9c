"""The hand-over between phases: which weights a phase starts from, which of them it trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.config.derived import (
    has_cascade,
    is_timm,
    num_steps,
    phase_before,
    phase_model,
    phase_source,
    start_parts,
    stated_cost,
)
from bigdet.config.schema import RunConfig
from bigdet.models import backbones, norms, weights
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.heads.cascade import spread_over_stages
from bigdet.ops.random import seed_of
from bigdet.run_dir import RunDir
from bigdet.weights import backbone_names
from bigdet.weights.start import other_options, other_sampling, start_table, to_own_classes

logger = logging.getLogger(__name__)


def build_for_phase(
    config: RunConfig,
    name: str,
    classes: Sequence[str],
    run_dir: RunDir,
    device: torch.device,
    is_resumed: bool,
) -> Detector:
    """Build the detector with the weights that a phase starts from, and freeze what it freezes.

    Args:
        config: of the run.
        name: of the phase.
        classes: names of the training set's categories, in the order of the labels.
        run_dir: where the phase before left its weights.
        device: of the detector.
        is_resumed: the weights come from a checkpoint of this phase afterwards.

    Returns:
        The detector in training mode. Its random weights depend on the seed and the phase alone.
    """
    phase = config.phases[name]
    torch.manual_seed(seed_of("weights", config.seed, name))
    detector = build_detector(phase_model(config, name), len(classes))
    if not is_resumed:
        _load_start(detector, config, name, classes, run_dir)
    if phase.norm_mode is not None:
        norms.set_norm_mode(detector, phase.norm_mode)
    backbones.freeze_stages(detector.backbone, phase.freeze_stages)
    if config.engine.activation_checkpointing:
        enable_checkpointing(detector)
    if phase_model(config, name).compile:
        detector.compile_dense()
    return detector.to(device).train()


def check_start(config: RunConfig, name: str, classes: Sequence[str]) -> None:
    """Try the weights that a phase to come starts from, so that a misfit is told now (rank 0).

    They are from elsewhere, not from the phase before; timm's are downloaded here.

    Args:
        config: of the run.
        name: of the phase.
        classes: names of the training set's categories, in the order of the labels.

    Raises:
        ValueError: with the phase, and what does not fit.
    """
    source = phase_source(config, name)
    try:
        if not is_timm(source):
            weights.find_weights(Path(source))
        if distributed.is_main():
            detector = build_detector(phase_model(config, name), len(classes))
            _read_start(detector, config, name, classes, RunDir(Path(config.output)))
    except ValueError as error:
        raise ValueError(f"phases.{name}.start_from: {error}") from error


def _load_start(
    detector: Detector, config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> None:
    """Fill the detector with the weights of the phase's source and say what came from where.

    Rank 0 reads and the others get them from it (a collective), so that a phase's weights need
    not lie on a disk that all hosts see.
    """
    rows: list[weights.LoadedPart] = []
    kept: int | None = None
    with distributed.together():
        if distributed.is_main():
            rows, kept = _read_start(detector, config, name, classes, run_dir)
    for tensor in detector.state_dict().values():
        tensor.copy_(distributed.broadcast_tensor(tensor))
    for line in start_table(detector, rows, len(classes), kept):
        logger.info("phase %s: %s", name, line)
    source, parts = phase_source(config, name), start_parts(config, name)
    if "box_head" in parts and not (
        source == "previous" or is_timm(source) or backbone_names.is_published_file(Path(source))
    ):
        said = other_sampling(Path(source), config, name) if distributed.is_main() else ""
        if said:
            logger.warning("phases.%s.start_from: %s", name, said)
    if source not in ("random", "previous"):
        cost = config.phases[name].start_from.cost
        stated = "not stated (start_from.cost)"
        if cost is not None:
            stated = ", ".join(f"{number:,} {key}" for key, number in stated_cost(cost).items())
        logger.info("phase %s: cost of the weights from elsewhere: %s", name, stated)


def _read_start(
    detector: Detector, config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> tuple[list[weights.LoadedPart], int | None]:
    """Load the detector; say what was loaded, and how many classes kept their weights.

    The number is None where the source has the same classes, or does not say which.
    """
    source = phase_source(config, name)
    if source == "random":
        return [], None
    if is_timm(source):
        parts = start_parts(config, name)
        rows = backbone_names.load_timm_backbone(detector, source, config.model.backbone, parts)
        return rows, 0
    path = _end_of_previous(config, name, run_dir) if source == "previous" else Path(source)
    start = config.phases[name].start_from
    if backbone_names.is_published_file(path):
        rows = backbone_names.load_backbone_file(
            detector, path, start.parts, start.pixels, start.ema
        )
        return rows, 0
    if start.ema:
        raise ValueError(
            f"{path}: found no moving average (EMA) of its weights in it. Leave out ema."
        )
    tensors, source_classes = weights.read_weights(path)
    if has_cascade(phase_model(config, name)):
        tensors = spread_over_stages(tensors)
    kept = None
    if source_classes is not None and source_classes != list(classes):
        tensors, kept = to_own_classes(detector, tensors, source_classes, classes)
    try:
        return weights.load_parts(detector, tensors, start_parts(config, name), str(path)), kept
    except ValueError as error:
        raise ValueError(f"{error}{other_options(path, config, name)}") from error


def _end_of_previous(config: RunConfig, name: str, run_dir: RunDir) -> Path:
    """Return the checkpoint that the phase before ends with."""
    before = phase_before(config, name)
    return run_dir.checkpoint(before, num_steps(config.phases[before]))
