"""The whole run: its sections, what follows from several of them, and the check of all rules.

A section's file has its options, what is derived from them, and their rules. ``MISSING`` marks
options that the config must set; ``None`` means "off" or "derived", and the docstring below the
option says which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from omegaconf import MISSING

from bigdet.config.checkpoint import CheckpointConfig, check_checkpoint
from bigdet.config.data import (
    DataConfig,
    check_data,
    check_splits,
    ignored_in_train_split,
)
from bigdet.config.device import DeviceConfig
from bigdet.config.engine import EngineConfig, check_engine, shards_frozen
from bigdet.config.evaluation import EvaluationConfig, check_evaluation, ignored_in_evaluation
from bigdet.config.families import BACKBONES, DETECTORS, detector_facts
from bigdet.config.log import LogConfig, check_log
from bigdet.config.model import (
    ModelConfig,
    check_drop_path,
    check_model,
    has_keypoints,
    ignored_in_model,
    is_class_agnostic,
    used,
)
from bigdet.config.phase import SPLITS, PhaseConfig, check_phase, data_key, ignored_in_phase
from bigdet.config.resize import ResizeConfig, has_few_shapes
from bigdet.config.rules import ConfigError, Ignored, ignored_by_choice, refuse_ignored
from bigdet.config.start import check_start, loaded_parts, source_of, stated_cost


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    output: str = MISSING
    """The run folder."""
    seed: int = 0
    """Seed of everything: weights, order, augmentation, sampling."""
    resume: str = "auto"
    """``auto``: resume if the run folder has a checkpoint. ``never``: refuse a folder that has one.
    Otherwise the path of a checkpoint to resume from; once the run has gone on from there, the same
    command resumes its newest one."""
    change_batch: bool = False
    """Let a resumed run continue with another ``images_per_step`` or ``images_per_gpu`` of its
    phase. ``lr`` follows by the linear rule (``reference_images_per_step`` must be set), ``steps``,
    ``warmup_steps`` and ``drops`` may change too, and training continues with the next pass."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images are; a phase may have others (``phases.NAME.data``)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The detector."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How weights are updated."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """How CUDA computes and keeps memory."""
    phases: dict[str, PhaseConfig] = MISSING
    """The phases by name, in the order in which they run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and how AP is measured."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    log: LogConfig = field(default_factory=LogConfig)
    """What the run reports."""


def phase_model(config: RunConfig, name: str) -> ModelConfig:
    """Return the model that a phase trains: that of the run with what the phase changes.

    Boxes stay class-specific, or class-agnostic, so that a box head fits those of all phases.
    """
    model, own = config.model, config.phases[name].model
    if own.drop_path is not None:
        model = dataclasses.replace(model, drop_path=own.drop_path)
    if (detector := own.detector) is None:
        return model
    roi = dataclasses.replace(used(model.roi), class_agnostic=is_class_agnostic(model))
    return dataclasses.replace(model, detector=detector, roi=roi)


def phase_data(config: RunConfig, name: str) -> DataConfig:
    """Return the data of a phase: those of the run with the splits that the phase replaces."""
    own = config.phases[name].data
    train, val = own.train or config.data.train, own.val or config.data.val
    return dataclasses.replace(config.data, train=train, val=val)


def phase_before(config: RunConfig, name: str) -> str:
    """Return the name of the phase before a phase that is not the first."""
    names = list(config.phases)
    return names[names.index(name) - 1]


def model_before(config: RunConfig, name: str) -> ModelConfig | None:
    """Return the model that the phase before a phase trains; None before the first."""
    is_first = name == next(iter(config.phases))
    return None if is_first else phase_model(config, phase_before(config, name))


def phase_source(config: RunConfig, name: str) -> str:
    """Return where the weights of a phase come from, with the default filled in."""
    is_first = name == next(iter(config.phases))
    return source_of(config.phases[name].start_from, is_first=is_first)


def start_parts(config: RunConfig, name: str) -> list[str]:
    """Return the parts that a phase loads, with the default filled in."""
    start, model = config.phases[name].start_from, phase_model(config, name)
    return loaded_parts(start, phase_source(config, name), model, model_before(config, name))


def imported_cost(config: RunConfig, name: str) -> dict[str, float]:
    """Return the stated cost of the weights that a phase and those before it took from elsewhere.

    A phase that does not start from the one before has nothing of what that one took.
    """
    total: dict[str, float] = {}
    for phase in config.phases:
        if phase_source(config, phase) != "previous":
            total = {}
        cost = config.phases[phase].start_from.cost
        for key, number in (stated_cost(cost) if cost is not None else {}).items():
            total[key] = total.get(key, 0) + number
        if phase == name:
            break
    return total


def eval_resize(config: RunConfig, name: str) -> ResizeConfig:
    """Return the resize of the images on which the model of a phase is evaluated."""
    return config.evaluation.resize or config.phases[name].resize


def check_config(config: RunConfig, written: Collection[str] = ()) -> None:
    """Check everything that can be checked without data and without a GPU.

    Args:
        config: the whole config.
        written: full keys that a user set to their defaults, refused if they have no effect.

    Raises:
        ConfigError: with the full key, what was found and what to write instead.
    """
    check_data(config.data)
    check_model(config.model)
    check_engine(config.engine)
    if config.model.compile and config.engine.zero_stage == 3:
        raise ConfigError(
            "model.compile: found true with engine.zero_stage: 3, which gathers weights in hooks "
            "inside the compiled parts. Write false, another stage, or engine.kind: fsdp."
        )
    if not config.phases:
        raise ConfigError("phases: found none, expected at least one, such as train: {...}.")
    if config.device.cuda_graphs:
        _check_graphs(config)
    refuse_ignored(config, ignored_options(config), written)
    _check_splits_used(config)
    for name, phase in config.phases.items():
        key = f"phases.{name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"{key}: files are named after a phase. Use letters, digits and _, a letter first."
            )
        _check_detector(config, name)
        check_drop_path(f"{key}.model", phase_model(config, name))
        check_splits(f"{key}.data", phase.data.train, phase.data.val, config.data.cache)
        source, model = phase_source(config, name), phase_model(config, name)
        check_start(key, phase.start_from, source, model, model_before(config, name))
        check_phase(key, phase, model, start_parts(config, name))
    check_evaluation(config.evaluation)
    check_checkpoint(config.checkpoint, config.phases)
    check_log(config.log, config.phases)


def graphed_phases(config: RunConfig) -> list[str]:
    """Return the phases that ``device.cuda_graphs`` is for: canvases of one or two shapes."""
    return [name for name, phase in config.phases.items() if has_few_shapes(phase.resize)]


def _check_graphs(config: RunConfig) -> None:
    """Check that nothing is recorded that is not the same in each step."""
    engine, model, found = config.engine, config.model, []
    if engine.kind == "fsdp" or engine.zero_stage == 3:
        kind = "engine.kind: fsdp" if engine.kind == "fsdp" else "engine.zero_stage: 3"
        found.append((kind, "which gathers weights anew in each step", "engine.zero_stage: 2"))
    if engine.activation_checkpointing:
        key = "engine.activation_checkpointing"
        found.append((f"{key}: true", "which draws random numbers again", f"{key}: false"))
    if model.compile:
        found.append(("model.compile: true", "which launches less too", "model.compile: false"))
    keeps = "which may keep tensors from one step to the next"
    if model.backbone not in BACKBONES:
        found.append((f"model.backbone: {model.backbone}", keeps, "a backbone of bigdet's own"))
    names = graphed_phases(config)
    if not names:
        few = "resize.kind: direct or jitter, or pad_to: two_shapes"
        found.append(("no phase with one or two shapes of canvases", "so nothing is recorded", few))
    for name in names:
        phase, detector = config.phases[name], phase_model(config, name).detector
        if detector not in DETECTORS:
            found.append((f"the detector {detector}", keeps, "one of bigdet's own"))
        if phase.norm_mode == "sync":
            why = "which exchanges statistics between the ranks"
            key = f"phases.{name}.norm_mode"
            found.append((f"{key}: sync", why, f"{key}: live"))
        if phase.freeze == "backbone" and shards_frozen(engine):
            why = "which gathers the frozen backbone in each step"
            found.append(("engine.shard_frozen: true", why, "engine.shard_frozen: false"))
    for what, why, instead in found:
        raise ConfigError(
            f"device.cuda_graphs: found true with {what}, {why}. Write false, or {instead}."
        )


def _check_splits_used(config: RunConfig) -> None:
    """Check that some phase has the data of the run."""
    for split in SPLITS:
        if all(getattr(phase.data, split) is not None for phase in config.phases.values()):
            raise ConfigError(
                f"data.{split}: every phase has a split of its own, so it would be ignored. Write "
                f"the one of some phase as data.{split}, and leave out phases.NAME.data.{split} "
                f"there."
            )


def _check_detector(config: RunConfig, name: str) -> None:
    """Check that a phase changes the detector within the family that shares its parts."""
    detectors = (config.model.detector, phase_model(config, name).detector)
    is_shared = all("rpn" in detector_facts(detector).parts for detector in detectors)
    if detectors[0] != detectors[1] and not is_shared:
        raise ConfigError(
            f"phases.{name}.model.detector: found {detectors[1]} where model.detector is "
            f"{detectors[0]}, expected two of the R-CNN family, which share their parts. "
            f"Write two runs instead; the second may start from parts of the first."
        )


def ignored_options(config: RunConfig) -> Ignored:
    """Yield the options and sections that have no effect in a config, each with why."""
    models = {name: phase_model(config, name) for name in config.phases}
    yield from ignored_by_choice(config)
    yield from ignored_in_model(config.model, [model.detector for model in models.values()])
    yield from _ignored_in_data(config, [name for name in models if has_keypoints(models[name])])
    for name, phase in config.phases.items():
        yield from ignored_in_phase(f"phases.{name}", phase)
    frozen = [phase.freeze is not None for phase in config.phases.values()]
    own = [phase.model.drop_path is not None for phase in config.phases.values()]
    if all(map(any, zip(frozen, own, strict=True))):
        yield "model.drop_path", "every phase has a frozen backbone or a drop_path of its own"
    if not any(frozen):
        yield "engine.shard_frozen", "no phase has freeze: backbone"
    if not (frozen and frozen[-1]):
        yield "checkpoint.with_frozen", "the last phase has no freeze: backbone"
    has_live_norms = any(phase.norm_mode in ("live", "sync") for phase in config.phases.values())
    yield from ignored_in_evaluation(config.evaluation, has_live_norms=has_live_norms)


def _ignored_in_data(config: RunConfig, with_keypoints: Sequence[str]) -> Ignored:
    """Yield the options of data without effect; these phases learn keypoints."""
    keys = {name: data_key(name, phase, "train") for name, phase in config.phases.items()}
    having = {keys[name] for name in with_keypoints}
    for name, key in keys.items():
        split = phase_data(config, name).train
        yield from ignored_in_train_split(key, split, has_keypoints=key in having)
    if config.data.workers == 0:
        yield "data.worker_kind", "is for data.workers above 0"
