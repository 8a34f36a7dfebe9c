"""The options of a run: one frozen dataclass per section, one docstring per option.

Read with OmegaConf by ``config/load.py``; rules that tie options together are in
``config/check.py``. ``MISSING`` marks options that the config must set; ``None`` means "off" or
"derived", and the docstring below the option says which.
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
    """Precision of convolutions and matrix products; weights, gradients and their sums are always
    fp32. ``fp16`` uses automatic loss scaling."""
    offload: Offload = "none"
    """What is kept and updated in CPU memory: ``optimizer`` (its state; ZeRO 1 to 3), or ``all``
    (weights too; ZeRO 3 and fsdp)."""
    activation_checkpointing: bool = False
    """Blocks of the backbone, the FPN and convolutions of the heads keep only their inputs and run
    again in the backward pass: less memory, about a third more time, the same results."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global L2 norm. None: no clipping."""
    max_bad_steps: int = 20
    """Steps with a loss or gradient that is not finite are skipped; more than this many in a run
    stop it."""


@dataclass(frozen=True, kw_only=True)
class TtaConfig:
    """Test-time augmentation: several views of each image, merged."""

    flip: bool = True
    """Also use the mirror image of every size."""
    scales: list[int] = field(
        default_factory=lambda: [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
    )
    """Short sides of the views, pixels."""
    cap: int = 2000
    """Longest long side of the views, pixels. With ``pool: candidates`` the view at the size of the
    plain evaluation has that one's own, 1333 for a short side of 800."""
    pool: Literal["candidates", "detections"] = "candidates"
    """What is merged. ``candidates``: all boxes of all views above ``model.roi.score_threshold``,
    then NMS and voting, and the best ``detections_per_image`` are kept, as in Detectron.
    ``detections``: the detections of each view after its own NMS, as in detectron2; faster."""
    vote_iou: float | None = 0.9
    """A box becomes the mean of the boxes of other views that overlap it by at least this. None: no
    voting."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how AP is measured; every phase also ends with an evaluation."""

    every: int | None = None
    """Steps between evaluations. None: only at the end of a phase."""
    images_per_gpu: int = 1
    """Images in one forward pass of one rank. They are padded to the size of the largest, and
    another padding changes AP a little: compare runs with the same value."""
    resize: ResizeConfig | None = None
    """Size of the images. None: as in the phase."""
    tta: TtaConfig | None = None
    """Test-time augmentation in every evaluation; ``--tta`` of ``bigdet evaluate`` uses it once. It
    takes two passes per view. None: one view at the size of ``resize``."""
    metric: Metric = "coco"
    """How AP is defined: as COCO does; of boxes, as PASCAL VOC does, over 11 recalls (``voc07``) or
    all of them (``voc12``), where AP50 is VOC's own number."""
    precise_bn: int | None = None
    """Before an evaluation during training, measure the running statistics of BN with the current
    weights on the training images of this many steps, instead of using the moving average over past
    weights (detectron2: 200). For ``norm_mode`` live and sync only. The order of training does not
    change. None: the moving average."""
    max_detections: int = MAX_DETECTIONS
    """How many detections per class and image AP and AR count, best first, for boxes and masks; 10
    to 10,000. COCO's value is 100; another value gives another AP, like ``maxDets`` of pycocotools.
    ``detections_per_image`` limits what the model reports. VOC's AP counts all."""
    pictures: int = 8
    """Validation images drawn at the end of a phase, ground truth and detections: one half the
    worst, the other the best."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved; every phase also ends with a checkpoint."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints to keep, besides the best and the last of each phase."""
    at: list[str] = field(default_factory=list)
    """Further checkpoints, PHASE-STEP, to write and keep, for other runs to fork from."""
    keep_every: int | None = None
    """Also keep checkpoints at multiples of this many steps of a phase. None: none of them."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run of Weights & Biases, which has to be installed (``pip install wandb``)."""

    project: str = MISSING
    """Project of the run."""
    name: str | None = None
    """Name of the run. None: the name of the run folder."""
    entity: str | None = None
    """User or team. None: the default of the account that is logged in."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes to OUTPUT/wandb only, for ``wandb sync``."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports."""

    every: int = 20
    """Steps between lines of the log and of ``metrics.jsonl``. Losses and ``grad_norm`` of a line
    are means over all steps since the previous line, weighted by training images (masked slots at
    the end of a pass do not count), and do not depend on ranks or accumulation. ``grad_norm`` is
    that of the mean loss over the lanes with an image, before clipping. Skipped steps are left out
    and counted by ``bad_steps``; the mean of no step is null."""
    tensorboard: bool = True
    """Write TensorBoard event files too, with pictures: a batch with its targets at the start of a
    phase, detections at each evaluation."""
    wandb: WandbConfig | None = None
    """Show the same on Weights & Biases. None: no."""
    boards: list[str] = field(default_factory=list)
    """Boards of your own that show the same, each ``package.module:Class``."""
    stall_seconds: float | None = 1200.0
    """A rank without progress for so long writes its stacks and ends the run, seconds. Must exceed
    the longest step, save or scoring. None: never."""


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
    """``auto``: resume if the run folder has a checkpoint. ``never``: refuse a folder that has one.
    Otherwise the path of a checkpoint to resume from."""
    change_batch: bool = False
    """Let a resumed run continue with another ``images_per_step`` or ``images_per_gpu`` of its
    phase. ``lr`` follows by the linear rule (``reference_images_per_step`` must be set), ``steps``,
    ``warmup_steps`` and ``drops`` may change too, and training continues with the next pass."""
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
    """What the run reports."""
