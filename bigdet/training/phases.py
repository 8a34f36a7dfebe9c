"""The detector of a phase, with its start weights and frozen layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bigdet import distributed
from bigdet.config.engine import EngineConfig, shards_frozen
from bigdet.config.run import RunConfig, graphed_phases, phase_model
from bigdet.engine.divided import DividedLayers
from bigdet.models import norms
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.backbones.build import freeze_stages
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.frozen import (
    FROZEN,
    MATRIX_TYPE,
    freeze_backbone,
    frozen_layers,
    frozen_tensors,
    open_frozen,
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
    config: RunConfig,
    name: str,
    classes: Sequence[str],
    run_dir: RunDir,
    frozen: Mapping[str, Tensor] | None = None,
) -> Iterator[Stored]:
    """Give the weights that a phase starts from, in a file until the block ends. Collective.

    Rank 0 writes it without ever having all of it in its memory. A frozen backbone is not among
    them: it is written to where it stays, and its hash is in the metadata.

    Args:
        config: resolved.
        name: a key of ``config.phases``.
        classes: names of the training set's categories, in the order of the labels.
        run_dir: has the checkpoint of the phase before.
        frozen: tensors of the types and shapes of a frozen backbone's, by name.
    """
    folder, index = run_dir.root / START_FOLDER, Index({}, {})
    with distributed.together():
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with parameters_in_file(folder / "parameters"):
                detector = _build(config, name, classes)
                read_start(detector, config, name, classes, run_dir)
                state, metadata = detector.state_dict(), {}
                if frozen:
                    metadata[FROZEN] = write_frozen(run_dir, frozen, state.__getitem__)
                left = {key: each for key, each in state.items() if key not in (frozen or {})}
                index = _write(folder, left, metadata)
            del detector, state, left
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
    if config.device.cuda_graphs and name in graphed_phases(config):
        detector.graph_dense()
    elif config.device.cuda_graphs:
        logger.info(f"phase {name}: no CUDA graphs, as its canvases have many shapes")
    detector.train()


def _write(folder: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> Index:
    """Write weights as a checkpoint has them, and return what is where."""
    file = pieces_file(0, 0)
    catalog = {name: Spec(NAMES[value.dtype], tuple(value.shape)) for name, value in state.items()}
    keys = {key_in(file, MODEL, name, 0): spec for name, spec in catalog.items()}
    write_tensors(folder / file, keys, iter(state.values()))
    places = {(MODEL, name): [Place(0, spec.count, file)] for name, spec in catalog.items()}
    return Index({MODEL: catalog}, places, metadata)


def load_frozen(
    detector: Detector,
    engine: EngineConfig,
    state: RunState,
    run_dir: RunDir,
    device: torch.device,
) -> None:
    """Give a detector the frozen backbone of its phase, or this rank's share of it.

    Rank 0 reads it from the run folder, one tensor after the other, and sends it to all. A
    collective; nothing for a phase without one.

    Raises:
        SharedError: on all ranks: the file is missing, or not the one of the checkpoint.
    """
    frozen = frozen_tensors(detector)
    if not frozen:
        return
    tensors: Mapping[str, Tensor] = {}
    file = run_dir.frozen(str(state.frozen))
    with distributed.together():
        if distributed.is_main():
            tensors = opened = open_frozen(run_dir.root, str(state.frozen), state.phase)
            file = opened.path  # of earlier versions it has another name
    is_divided = shards_frozen(engine) and distributed.world_size() > 1
    divided = DividedLayers(frozen_layers(detector) if is_divided else [])
    num_bytes = 0
    for name, like in frozen.items():
        value = tensors[name] if tensors else torch.empty(like.shape, dtype=like.dtype)
        whole = torch.empty_like(like, device="cpu").copy_(distributed.broadcast_tensor(value))
        owner, _, short = name.rpartition(".")
        module = detector.get_submodule(owner)
        if like.dtype == MATRIX_TYPE and divided.has(module):
            divided.divide(module, short, whole, device)
        else:
            module._buffers[short] = whole.to(device)
            num_bytes += whole.nbytes
    num_bytes += sum(share.nbytes for share in divided.shares)
    how = f"divided over {distributed.world_size()}" if is_divided else "the same on each"
    logger.info(
        f"phase {state.phase}: the backbone is frozen: {num_bytes / 2**20:.1f} MiB on each rank "
        f"({how}), in {file} and in no checkpoint"
    )
