"""The detector of a phase, with its start weights and frozen layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
from bigdet.pieces.building import module_at, parameters_in_file, parameters_on_meta
from bigdet.pieces.index import MODEL, Index, Place, key_in, pieces_file
from bigdet.pieces.reading import Stored
from bigdet.pieces.tensor_file import NAMES, Spec, write_tensors
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState
from bigdet.weights.start import load_start, read_start

logger = logging.getLogger(__name__)

START_FOLDER = ".start"
"""In the run folder: the weights that a phase starts from, until every rank has its part."""


def build_for_phase(
    config: RunConfig,
    name: str,
    classes: Sequence[str],
    run_dir: RunDir,
    device: torch.device,
    is_resumed: bool,
) -> Detector:
    """Build the detector of a phase whole, with its start weights and frozen layers.

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
    detector = _build(config, name, classes)
    if not is_resumed:
        load_start(detector, config, name, classes, run_dir)
    _prepare(detector, config, name)
    return detector.to(device)


def build_empty(config: RunConfig, name: str, classes: Sequence[str]) -> Detector:
    """Build the detector of a phase as `build_for_phase` does, with parameters without memory.

    Those of a network that needs the numbers of its parameters while it is built have memory, and
    random numbers.
    """
    try:
        with parameters_on_meta():
            detector = _build(config, name, classes)
        cause = ", ".join(key for key, buffer in detector.named_buffers() if buffer.is_meta)
    except (NotImplementedError, RuntimeError) as error:  # of torch, for numbers that are not there
        cause = f"{module_at(error)}: {str(error).splitlines()[0]}"
    if cause:
        logger.warning(
            "phase %s: the detector is built whole on each rank, which needs memory for all of it: "
            "it is computed from the numbers of parameters while it is built (%s)",
            name, cause,
        )  # fmt: skip
        detector = _build(config, name, classes)
    _prepare(detector, config, name)
    return detector


@contextmanager
def start_weights(
    config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> Iterator[Stored]:
    """Give the weights that a phase starts from, in a file until the block ends. Collective.

    Rank 0 writes it without ever having all of it in its memory.

    Args:
        config: resolved.
        name: a key of ``config.phases``.
        classes: names of the training set's categories, in the order of the labels.
        run_dir: has the checkpoint of the phase before.
    """
    folder, index = run_dir.root / START_FOLDER, Index({}, {})
    with distributed.together():
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with parameters_in_file(folder / "parameters"):
                detector = _build(config, name, classes)
                read_start(detector, config, name, classes, run_dir)
                index = _write(folder, detector)
            del detector
            (folder / "parameters").unlink()
    yield Stored(folder, distributed.broadcast_object(index))
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder)


def _build(config: RunConfig, name: str, classes: Sequence[str]) -> Detector:
    """Build the detector of a phase with random weights that depend only on seed and phase."""
    torch.manual_seed(seed_of("weights", config.seed, name))
    return build_detector(phase_model(config, name), len(classes))


def _prepare(detector: Detector, config: RunConfig, name: str) -> None:
    """Freeze layers, and set modes and how it runs."""
    phase = config.phases[name]
    if phase.norm_mode is not None:
        norms.set_norm_mode(detector, phase.norm_mode)
    freeze_stages(detector.backbone, phase.freeze_stages)
    if phase.freeze == "backbone":
        freeze_backbone(detector.backbone)
    if config.engine.activation_checkpointing:
        enable_checkpointing(detector)
    if phase_model(config, name).compile:
        detector.compile_dense()
    detector.train()


def _write(folder: Path, detector: Detector) -> Index:
    """Write the weights of a detector as a checkpoint has them, and return what is where."""
    state, file = detector.state_dict(), pieces_file(0, 0)
    catalog = {name: Spec(NAMES[value.dtype], tuple(value.shape)) for name, value in state.items()}
    keys = {key_in(file, MODEL, name, 0): spec for name, spec in catalog.items()}
    write_tensors(folder / file, keys, iter(state.values()))
    places = {(MODEL, name): [Place(0, spec.count, file)] for name, spec in catalog.items()}
    return Index({MODEL: catalog}, places)


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
