"""The options of a run: one frozen dataclass per section, one docstring per option.

Read with OmegaConf by ``config/load.py``; rules that tie options together stand in
``config/check.py``. ``MISSING`` marks what the config must say; ``None`` means "off" or "derived",
and the docstring below the option says which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from omegaconf import MISSING

from bigdet.config.data_schema import DataConfig
from bigdet.config.model_schema import ModelConfig
from bigdet.config.phase_schema import PhaseConfig, ResizeConfig

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "all"]
Metric = Literal["coco", "voc07", "voc12"]
MAX_DETECTIONS = 100  # of a class on an image, as COCO counts


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How weights are updated."""

    kind: Literal["deepspeed", "fsdp"] = "deepspeed"
    """``deepspeed`` (ZeRO), or ``fsdp``: torch's FSDP2, which shards as ZeRO-3 does."""
    zero_stage: int | None = 2
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3
    weights too. Must be null under fsdp."""
    precision: Precision = "bf16"
    """Of convolutions and matrix products; weights, gradients and their sums are fp32 always.
    ``fp16`` has a loss scale, which finds itself."""
    offload: Offload = "none"
    """What lies in the memory of the CPU while it is not needed, and is stepped there:
    ``optimizer`` (its state; ZeRO 1 to 3), or ``all`` (weights too; ZeRO 3 and fsdp)."""
    activation_checkpointing: bool = False
    """Blocks of the backbone, the FPN and convolutions of the heads keep their inputs only and run
    again in the backward pass: less memory, about a third more time, the same results."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global L2 norm. None: no clipping."""
    max_bad_steps: int = 20
    """Steps with a loss or gradient that is not finite are skipped; more than this many in a run
    stop it."""


@dataclass(frozen=True, kw_only=True)
class TtaConfig:
    """Test-time augmentation: several views of each image, put together."""

    flip: bool = True
    """Every size also mirrored."""
    scales: list[int] = field(
        default_factory=lambda: [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
    )
    """Short sides of the views, pixels."""
    cap: int = 2000
    """Longest long side of the views, pixels. With ``pool: candidates`` the view at the size of the
    plain evaluation has that one's own, 1333 for a short side of 800."""
    pool: Literal["candidates", "detections"] = "candidates"
    """What the views give. ``candidates``: all boxes above ``model.roi.score_threshold``, then NMS
    and voting over all views, and the best ``detections_per_image`` are kept, as in Detectron.
    ``detections``: what is left of each view after its own NMS, as in detectron2; faster."""
    vote_iou: float | None = 0.9
    """Boxes move to the mean of those of other views that overlap them by at least this. None: they
    stay."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how AP is measured; every phase also ends with an evaluation."""

    every: int | None = None
    """Steps between evaluations. None: only at the end of a phase."""
    images_per_gpu: int = 1
    """Images in one forward pass of one rank. They are padded to the size of the largest, and
    another padding changes AP a little: compare numbers of the same value."""
    resize: ResizeConfig | None = None
    """Size of the images. None: that of the phase."""
    tta: TtaConfig | None = None
    """Test-time augmentation, in every evaluation; ``bigdet evaluate --tta`` asks for it once. It
    takes two passes per view. None: one view at the size of ``resize``."""
    metric: Metric = "coco"
    """How AP is defined: as COCO does; of boxes, as PASCAL VOC does, over 11 recalls (``voc07``) or
    all of them (``voc12``), where AP50 is VOC's own number."""
    precise_bn: int | None = None
    """Before an evaluation during training the running statistics of BN become the mean over so
    many steps' training images at the present weights, instead of a moving average over weights of
    the past (detectron2: 200); for ``norm_mode`` live and sync, others have nothing to measure. The
    order of the training stays what it was. None: the moving average."""
    max_detections: int = MAX_DETECTIONS
    """The best detections of a class on an image that AP and AR count, of boxes and masks; 10 to
    10,000. COCO's is 100; with another one AP is another number, as ``maxDets`` of pycocotools.
    What the model gives is ``detections_per_image``. VOC counts all."""
    pictures: int = 8
    """Validation images drawn at the end of a phase, ground truth and detections: one half the
    worst, the other the best."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved; every phase also ends with a checkpoint."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """The newest checkpoints that stay, beside the best one and the last one of each phase."""
    at: list[str] = field(default_factory=list)
    """Further checkpoints, PHASE-STEP, that are written and stay: what other runs fork from."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps of a phase stay too. None: none of them."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run of Weights & Biases, which has to be installed (``pip install wandb``)."""

    project: str = MISSING
    """Project of the run."""
    name: str | None = None
    """Name of the run. None: that of the run folder."""
    entity: str | None = None
    """User or team. None: the default one of who is logged in."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes to OUTPUT/wandb only, for ``wandb sync``."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells."""

    every: int = 20
    """Steps between lines of the log and of ``metrics.jsonl``. The losses and ``grad_norm`` of a
    line are means over all steps since the line before, weighted by training images (masked slots
    at the end of a pass count nothing), and do not depend on ranks or accumulation. ``grad_norm``
    is that of the mean loss over the lanes with an image, before clipping. A step that was skipped
    is left out: ``bad_steps`` counts it, and a mean of no step is null."""
    tensorboard: bool = True
    """Write TensorBoard event files too, with pictures: a batch with its targets at the start of a
    phase, detections at each evaluation."""
    wandb: WandbConfig | None = None
    """Show the same on Weights & Biases. None: no."""
    boards: list[str] = field(default_factory=list)
    """Boards of your own that show the same, each ``package.module:Class``."""
    stall_seconds: float | None = 1200.0
    """A rank without progress for so long writes its stacks and ends the run; longer than the
    longest step, save or computing of AP. None: never."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    written: ClassVar[frozenset[str]] = frozenset()
    """No option: full keys that a user set to the value that they had anyway. Where nothing heeds
    such an option, it is refused like one that was changed. A config changed in code has none."""
    output: str = MISSING
    """The run folder."""
    seed: int = 0
    """Seed of everything: weights, order, augmentation, sampling."""
    resume: str = "auto"
    """``auto``: go on if the run folder has a checkpoint. ``never``: refuse a folder that has one.
    Else the path of a checkpoint to go on from."""
    change_batch: bool = False
    """Let a resumed run go on with another ``images_per_step`` or ``images_per_gpu`` of its phase.
    ``lr`` follows by the linear rule (``reference_images_per_step`` must be set), ``steps``,
    ``warmup_steps`` and ``drops`` may change too, and the pass under way is left for the next."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images are."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The detector."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How weights are updated."""
    phases: dict[str, PhaseConfig] = MISSING
    """The phases by name, in the order in which they run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and how AP is measured."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    log: LogConfig = field(default_factory=LogConfig)
    """What the run tells."""
