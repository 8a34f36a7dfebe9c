"""Every rule that ties options together; each message names the full key.

``check_config`` needs the config alone and runs in a second on a laptop; what depends on the data
or on the number of ranks is checked by the parts that know them, also before the first step.
"""

from __future__ import annotations

import re

from bigdet.config.check_family import check_model, check_tta
from bigdet.config.check_heads import check_detector, check_hand_over, check_heads
from bigdet.config.check_schedule import check_cost, check_kept, check_length, check_schedule
from bigdet.config.data_schema import DataConfig, TrainSplitConfig
from bigdet.config.derived import (
    has_batch_norm,
    has_fpn,
    has_masks,
    is_foreign_file,
    is_square,
    is_timm,
    largest_plan,
    model_parts,
    parts_with_batch_norm,
    phase_model,
    phase_source,
    start_parts,
)
from bigdet.config.load import ConfigError
from bigdet.config.model_schema import ModelConfig
from bigdet.config.own import import_callable
from bigdet.config.phase_schema import PhaseConfig, ResizeConfig
from bigdet.config.rules import not_negative as _not_negative
from bigdet.config.rules import positive as _positive
from bigdet.config.rules import require as _require
from bigdet.config.rules import unused as _unused
from bigdet.config.rules import user_wrote
from bigdet.config.schema import MAX_DETECTIONS, EngineConfig, Metric, RunConfig
from bigdet.ops.sizes import CANVAS_MULTIPLE

_BACKBONE_STAGES = 5
_RESIZE_KINDS = {
    "cap": ("short_side", "stitcher"),
    "sizes": ("short_side",),
    "size_range": ("short_side",),
    "divide_by": ("stitcher",),
    "variant": ("direct",),
    "scale_range": ("direct",),
    "jitter_range": ("jitter",),
    "pad_to": ("short_side", "stitcher"),
    "draw": ("short_side",),
}
"""The kinds of resize that heed each option; ``size`` is for all."""
_DRAWN_RESIZE = ("sizes", "size_range", "variant", "scale_range", "jitter_range", "pad_to", "draw")
"""Options of a resize that only training heeds."""
_MOSAIC_IMAGES = 4


def check_config(config: RunConfig) -> None:
    """Check everything that can be checked without data and without a GPU.

    Raises:
        ConfigError: with the full key, what was found and what to write instead.
    """
    with user_wrote(config.written):
        _check_all(config)


def _check_all(config: RunConfig) -> None:
    check_model(config.model)
    _check_numbers(config)
    check_train_split(config.data.train)
    if not config.phases:
        raise ConfigError("phases: found none, expected at least one, such as train: {...}.")
    check_heads(config)
    for name, phase in config.phases.items():
        key, source = f"phases.{name}", phase_source(config, name)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"{key}: a phase names files, so letters, digits and _ only, a letter first."
            )
        if source == "previous" and name == next(iter(config.phases)):
            raise ConfigError(
                f"{key}.start_from.source: found previous, but this is the first phase. Write "
                f"random, timm, or the path of a run or a model.safetensors."
            )
        model = phase_model(config, name)
        check_detector(config, name)
        _check_phase(key, phase, model, source)
        _check_start(config, name)
    check_kept(config)


def _check_numbers(config: RunConfig) -> None:
    engine = config.engine
    _check_addresses(config.data)
    _check_engine(engine)
    for key, value in (
        ("engine.clip_norm", engine.clip_norm),
        ("data.cache.gib", config.data.cache.gib),
        ("evaluation.every", config.evaluation.every),
        ("evaluation.images_per_gpu", config.evaluation.images_per_gpu),
        ("evaluation.precise_bn", config.evaluation.precise_bn),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("checkpoint.keep_every", config.checkpoint.keep_every),
        ("log.every", config.log.every),
        ("log.stall_seconds", config.log.stall_seconds),
    ):
        _positive(key, value)
    for key, count in (
        ("engine.max_bad_steps", engine.max_bad_steps),
        ("data.workers", config.data.workers),
        ("data.train.max_damaged", config.data.train.max_damaged),
        ("data.train.min_keypoints", config.data.train.min_keypoints),
        ("evaluation.pictures", config.evaluation.pictures),
    ):
        _not_negative(key, count)
    for name in config.log.boards:
        import_callable("log.boards", name)
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    _require(
        keep_every is None or keep_every % every == 0,
        "checkpoint.keep_every", keep_every, f"a multiple of checkpoint.every, {every}",
    )  # fmt: skip
    check_tta(config.evaluation.tta)
    if not any(phase.norm_mode in ("live", "sync") for phase in config.phases.values()):
        reason = "is for phases with norm_mode live or sync, of which there is none"
        _unused("evaluation", config.evaluation, "precise_bn", reason)
    check_max_detections(config.evaluation.max_detections, config.evaluation.metric)
    if config.evaluation.resize is not None:
        if config.evaluation.tta is not None:
            raise ConfigError(
                "evaluation.resize: with test-time augmentation evaluation.tta.scales say the "
                "sizes, so it would be ignored. Remove one of them."
            )
        _check_resize("evaluation.resize", config.evaluation.resize)
        for name in _DRAWN_RESIZE:
            _unused("evaluation.resize", config.evaluation.resize, name, "is for training")


def check_max_detections(value: int, metric: Metric) -> None:
    """Check how many detections count; VOC's metrics know no limit."""
    key = "evaluation.max_detections"
    _require(10 <= value <= 10_000, key, value, "10 to 10000")
    if metric != "coco" and value != MAX_DETECTIONS:
        raise ConfigError(
            f"{key}: found {value}, but {metric} counts all detections, so it would be ignored. "
            f"Write {MAX_DETECTIONS}, or leave it out."
        )


def _check_engine(engine: EngineConfig) -> None:
    stage, key = engine.zero_stage, "engine.offload"
    if engine.kind == "fsdp":
        if stage is not None:
            raise ConfigError(
                f"engine.zero_stage: found {stage}, but engine.kind is fsdp, which has no stages. "
                f"Write null, or engine.kind: deepspeed."
            )
        if engine.offload == "optimizer":
            raise ConfigError(
                f"{key}: found optimizer, but fsdp steps the optimizer where the weights are. "
                f"Write all or none, or engine.kind: deepspeed."
            )
        return
    _require(stage in (0, 1, 2, 3), "engine.zero_stage", stage, "0, 1, 2 or 3 under deepspeed")
    assert stage is not None
    lowest = {"none": 0, "optimizer": 1, "all": 3}[engine.offload]
    if stage < lowest:
        raise ConfigError(
            f"{key}: found {engine.offload}, which needs engine.zero_stage of at least {lowest}, "
            f"found {stage}: only what is sharded can lie on the CPU. Write none, or raise it."
        )


def check_train_split(split: TrainSplitConfig) -> None:
    """Check what says which images are trained on, in which order."""
    key = "data.train"
    num_sets = 1 + len(split.more_shards)
    weights = split.weights
    if weights is not None and (len(weights) != num_sets or min(weights) <= 0):
        raise ConfigError(
            f"{key}.weights: found {weights}, expected a number above 0 for each of {num_sets} "
            f"sets: shards, then more_shards."
        )
    threshold = split.repeat_threshold
    _require(
        threshold is None or 0 < threshold <= 1,
        f"{key}.repeat_threshold", threshold, "above 0, at most 1",
    )  # fmt: skip
    if split.order == "windowed":
        _require(256 <= split.window <= 2048, f"{key}.window", split.window, "256 to 2048")
    else:
        _unused(key, split, "window", "is for order: windowed")
    if (subset := split.subset) is not None:
        if (subset.images is None) == (subset.ids is None):
            raise ConfigError(f"{key}.subset: write one of images (a number) and ids (a file).")
        _positive(f"{key}.subset.images", subset.images)
        if subset.ids is not None:
            _unused(f"{key}.subset", subset, "seed", "is for a number of images")
            if split.more_shards:
                raise ConfigError(
                    f"{key}.subset.ids: image ids may mean several images when sets are mixed. "
                    f"Write subset.images, or make shards of the images that you want."
                )


def _check_addresses(data: DataConfig) -> None:
    """Check what can be told of remote shards without asking for them."""
    _require(bool(data.cache.folder), "data.cache.folder", "nothing", "a folder")
    for key, address in (
        ("data.train.shards", data.train.shards),
        *(("data.train.more_shards", address) for address in data.train.more_shards),
        ("data.val.shards", data.val.shards),
    ):
        if not address.startswith("pipe:"):
            continue
        _require(
            "{}" in address, key, address,
            "{} in the command where the name of a file goes, such as pipe:ssh HOST cat /data/{}",
        )  # fmt: skip
        if data.cache.mode == "ranges":
            raise ConfigError(
                f"data.cache.mode: found ranges, but {key} is a pipe:, which can only be read "
                f"whole. Write shards."
            )


def _check_phase(key: str, phase: PhaseConfig, model: ModelConfig, source: str) -> None:
    for name in ("images_per_gpu", "images_per_step", "lr", "reference_images_per_step"):
        _positive(f"{key}.{name}", getattr(phase, name))
    for name in ("warmup_steps", "weight_decay"):
        _not_negative(f"{key}.{name}", getattr(phase, name))
    _require(0 <= phase.flip <= 1, f"{key}.flip", phase.flip, "in [0, 1]")
    _require(
        0 <= phase.freeze_stages <= _BACKBONE_STAGES,
        f"{key}.freeze_stages", phase.freeze_stages, f"0 to {_BACKBONE_STAGES}",
    )  # fmt: skip
    if phase.images_per_step is not None and phase.images_per_step % phase.images_per_gpu:
        raise ConfigError(
            f"{key}.images_per_step: found {phase.images_per_step}, expected a multiple of "
            f"images_per_gpu, {phase.images_per_gpu}."
        )
    _check_resize(f"{key}.resize", phase.resize)
    _check_augment(key, phase, model)
    check_schedule(key, phase)
    check_length(key, phase)
    _check_norm_mode(key, phase, model)


def _check_resize(key: str, resize: ResizeConfig) -> None:
    _positive(f"{key}.size", resize.size)
    for name, kinds in _RESIZE_KINDS.items():
        if resize.kind not in kinds:
            _unused(key, resize, name, f"is for kind: {' or '.join(kinds)}")
    if is_square(resize):
        is_multiple = resize.size % CANVAS_MULTIPLE == 0
        _require(is_multiple, f"{key}.size", resize.size, f"a multiple of {CANVAS_MULTIPLE}")
    for name in ("scale_range", "jitter_range", "size_range"):
        found = getattr(resize, name)
        if found is not None:
            expected = "two numbers above 0, rising"
            _require(0 < found[0] <= found[1], f"{key}.{name}", found, expected)
    if resize.sizes is not None:
        is_list = bool(resize.sizes) and min(resize.sizes) > 0
        _require(is_list, f"{key}.sizes", resize.sizes, "a list of numbers above 0")
        _unused(key, resize, "size_range", "sizes says the same")
    if resize.draw == "image" and resize.pad_to == "two_shapes":
        raise ConfigError(
            f"{key}.draw: found image with pad_to: two_shapes, which makes all images of a step as "
            f"large as one size says. Write draw: step, or pad_to: batch."
        )
    _require(resize.divide_by > 1, f"{key}.divide_by", resize.divide_by, "2 or more")
    size = largest_plan(resize)[0] if resize.kind == "short_side" else resize.size
    if resize.cap is not None and resize.cap < size:
        raise ConfigError(f"{key}.cap: found {resize.cap}, expected at least size, {size}.")


def _check_augment(key: str, phase: PhaseConfig, model: ModelConfig) -> None:
    augment = phase.augment
    for name in ("color_jitter", "copy_paste", "mosaic"):
        probability = getattr(augment, name)
        _require(0 <= probability <= 1, f"{key}.augment.{name}", probability, "in [0, 1]")
    if augment.copy_paste and not has_masks(model):
        raise ConfigError(
            f"{key}.augment.copy_paste: objects are pasted as their masks are, but "
            f"{model.detector} has no use for masks. Remove it, or choose mask_rcnn."
        )
    for name, num_images in (("copy_paste", 2), ("mosaic", _MOSAIC_IMAGES)):
        if getattr(augment, name) and phase.images_per_gpu < num_images:
            raise ConfigError(
                f"{key}.augment.{name}: the other images come from the same group, so it needs "
                f"images_per_gpu of at least {num_images}, found {phase.images_per_gpu}."
            )


def _check_norm_mode(key: str, phase: PhaseConfig, model: ModelConfig) -> None:
    if phase.decay_norms and model.norm != "gn" and phase.norm_mode in (None, "fixed"):
        raise ConfigError(
            f"{key}.decay_norms: no BN or GN is trained here, so it would be ignored. Remove it."
        )
    if has_batch_norm(model) and phase.norm_mode is None:
        raise ConfigError(
            f"{key}.norm_mode: not set, but the model has BN. Write live (statistics of the "
            f"batch), sync (of all GPUs' batches), affine, or fixed (paper 2's fine-tuning)."
        )
    if not has_batch_norm(model) and phase.norm_mode is not None:
        raise ConfigError(
            f"{key}.norm_mode: found {phase.norm_mode}, but the model has no BN ({model.backbone} "
            f"with norm: {model.norm}). Remove it, or write null."
        )


def _check_start(config: RunConfig, name: str) -> None:
    key, phase, model = f"phases.{name}", config.phases[name], phase_model(config, name)
    source, parts = phase_source(config, name), phase.start_from.parts
    if parts is not None and not parts:
        raise ConfigError(f"{key}.start_from.parts: found none. Write source: random instead.")
    absent = [part for part in parts or [] if part not in model_parts(model)]
    if absent:
        raise ConfigError(
            f"{key}.start_from.parts: {model.detector} has no {', '.join(absent)}. It has "
            f"{', '.join(model_parts(model))}."
        )
    if source == "random" and parts:
        raise ConfigError(
            f"{key}.start_from.parts: found {parts}, but source is random, so nothing is loaded. "
            f"Remove parts, or name a source."
        )
    if parts is not None and (is_timm(source) or is_foreign_file(source)):
        fc_layers = [] if has_fpn(model) else ["box_head"]
        if sorted(parts) not in (["backbone"], ["backbone", *fc_layers]):
            beside = ", and of box_head (fc6, fc7) beside it" if fc_layers else " only"
            raise ConfigError(
                f"{key}.start_from.parts: found {', '.join(parts)}, but {source} has weights of "
                f"the backbone{beside}."
            )
    pixels = phase.start_from.pixels
    if source.endswith(".pkl") != (pixels is not None):
        raise ConfigError(
            f"{key}.start_from.pixels: found {pixels} with source {source}. It is for .pkl files, "
            f"which do not say it: rgb, bgr (X-101-32x8d, X-152-32x8d) or bgr_255 (MSRA's R-50 "
            f"and R-101 and what was trained from them)."
        )
    if phase.start_from.ema is not None and (source in ("random", "previous") or is_timm(source)):
        raise ConfigError(
            f"{key}.start_from.ema: is for files of weights, but the source is {source}, so it "
            f"would be ignored. Remove it."
        )
    if phase.start_from.cost is not None:
        check_cost(f"{key}.start_from.cost", phase.start_from.cost, source)
    loaded = start_parts(config, name)
    if source == "previous":
        check_hand_over(config, name, loaded)
    if phase.freeze_stages and "backbone" not in loaded:
        raise ConfigError(
            f"{key}.freeze_stages: found {phase.freeze_stages}, but the backbone starts from "
            f"random weights, and frozen random filters cost about 3 AP. Write 0."
        )
    untrained = [part for part in parts_with_batch_norm(model) if part not in loaded]
    if phase.norm_mode in ("affine", "fixed") and untrained:
        raise ConfigError(
            f"{key}.norm_mode: found {phase.norm_mode}, but nothing is loaded into "
            f"{', '.join(untrained)}, so the BN statistics there were never trained. Write live or "
            f"sync, or name a start_from.source that has them."
        )
