"""The detector of a phase, with its start weights and frozen layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from bigdet import distributed
from bigdet.config.run import RunConfig, phase_model
from bigdet.models import norms
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.backbones.build import freeze_stages
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.frozen import (
    freeze_backbone,
    frozen_tensors,
    hash_of,
    read_frozen,
    write_frozen,
)
from bigdet.ops.random import seed_of
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState
from bigdet.weights.start import load_start

logger = logging.getLogger(__name__)


def build_for_phase(
    config: RunConfig,
    name: str,
    classes: Sequence[str],
    run_dir: RunDir,
    device: torch.device,
    is_resumed: bool,
) -> Detector:
    """Build the detector of a phase with its start weights and frozen layers.

    Args:
        config: resolved.
        name: a key of ``config.phases``.
        classes: names of the training set's categories, in the order of the labels.
        run_dir: has the checkpoint of the phase before.
        device: where the detector is moved to.
        is_resumed: do not load start weights, as a checkpoint of this phase is loaded later.

    Returns:
        The detector in training mode. Its random weights depend only on seed and phase.
    """
    phase = config.phases[name]
    torch.manual_seed(seed_of("weights", config.seed, name))
    model = phase_model(config, name)
    detector = build_detector(model, len(classes))
    if not is_resumed:
        load_start(detector, config, name, classes, run_dir)
    if phase.norm_mode is not None:
        norms.set_norm_mode(detector, phase.norm_mode)
    freeze_stages(detector.backbone, phase.freeze_stages)
    if phase.freeze == "backbone":
        freeze_backbone(detector.backbone)
    if config.engine.activation_checkpointing:
        enable_checkpointing(detector)
    if model.compile:
        detector.compile_dense()
    return detector.to(device).train()


def settle_frozen(
    detector: Detector, state: RunState, run_dir: RunDir, *, is_resumed: bool
) -> None:
    """Write the frozen backbone of a phase at its start, and read it again in a resumed run.

    A collective; nothing for a phase without one.

    Raises:
        SharedError: on all ranks: the file is missing, or not the one of the checkpoint.
    """
    frozen, file = frozen_tensors(detector), run_dir.frozen(state.phase)
    if not frozen:
        return
    with distributed.together():
        if distributed.is_main() and is_resumed:
            for name, tensor in read_frozen(file, str(state.frozen)).items():
                frozen[name].copy_(tensor)
        elif distributed.is_main():
            write_frozen(file, frozen)
            state.frozen = hash_of(frozen)
    state.frozen = distributed.broadcast_object(state.frozen)
    size = sum(tensor.nbytes for tensor in frozen.values())
    logger.info(
        "phase %s: the backbone is frozen: %.1f MiB on each rank, kept in %s and in no checkpoint",
        state.phase, size / 2**20, file,
    )  # fmt: skip
    if is_resumed:
        for tensor in frozen.values():
            tensor.copy_(distributed.broadcast_tensor(tensor))
