"""Every option of a run: one frozen dataclass per section, one docstring per option.

Read with OmegaConf by ``config/load.py``; rules that tie options together stand in
``config/check.py``. ``MISSING`` marks what the config must say; ``None`` means "off" or "derived",
and the docstring below the option says which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

Detector = Literal[
    "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "keypoint_rcnn", "retinanet",
]  # fmt: skip
Backbone = Literal[
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext50_32x8d", "resnext101_32x4d", "resnext101_32x8d",
    "resnext152_32x8d",
    "swin_t", "swin_s", "swin_b", "swin_l", "swinv2_t", "swinv2_s", "swinv2_b",
    "convnext_t", "convnext_s", "convnext_b", "vit_s", "vit_b", "vgg16",
]  # fmt: skip
BoxHead = Literal["2fc", "4conv1fc"]
BoxLoss = Literal["l1", "smooth_l1", "giou"]
Norm = Literal["bn", "gn", "none"]
NormScope = Literal["backbone", "all"]
NormMode = Literal["live", "sync", "affine", "fixed"]
Pixels = Literal["rgb", "bgr", "bgr_255"]
Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "all"]
Order = Literal["shuffled", "windowed"]
Metric = Literal["coco", "voc07", "voc12"]
Part = Literal[
    "backbone", "fpn", "rpn", "box_head", "mask_head", "keypoint_head", "retina_head",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Some of the images: a number of them, or those of a list."""

    images: int | None = None
    """So many images, drawn from those that would be trained on."""
    seed: int = 0
    """Another seed draws others; of one seed, a smaller subset is part of a larger one."""
    ids: str | None = None
    """File with image ids: a JSON list, or numbers between blanks or line ends."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitConfig:
    """The images to learn from."""

    shards: str = MISSING
    """Folder of a shard set (``tools/make_shards.py`` makes one), or its address: ``https://``,
    ``s3://``, ``gs://``, ``hf://``, ..., or a command ``pipe:ssh HOST cat /data/coco/{}``."""
    more_shards: list[str] = field(default_factory=list)
    """Folders or addresses of further sets to mix in. Categories of the same name are one class;
    the others are appended to those of ``shards``."""
    weights: list[float] | None = None
    """How often a pass shows each image of each set, ``shards`` first: 1 is exactly once, 0.5 in
    every other pass. None: 1 for all."""
    subset: SubsetConfig | None = None
    """Train on some of the images only. None: all."""
    repeat_threshold: float | None = None
    """Images with classes that are on less than this part of the images are shown more often
    (repeat factor sampling; LVIS uses 0.001). Reads all annotations at start. None: off."""
    order: Order = "shuffled"
    """``shuffled``: over the whole set. ``windowed``: each lane walks through its own shards and
    shuffles within windows, for remote shards and slow disks."""
    window: int = 1024
    """Images that are shuffled together in ``windowed``."""
    keep_empty: bool = False
    """Train on images without objects too. The papers' code leaves them out."""
    max_damaged: int = 100
    """Damaged samples, over all ranks, that may be replaced before the run stops."""
    scaled_decoding: bool = False
    """Decode JPEGs of at least twice the size at which they are seen at 1/2, 1/4 or 1/8: faster,
    but other pixels (README). Evaluation always decodes whole."""


@dataclass(frozen=True, kw_only=True)
class ValSplitConfig:
    """The images to measure on; every one of them is used."""

    shards: str = MISSING
    """Folder or address of a shard set."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards that lie at an address are kept on this host; local sets do without."""

    mode: Literal["shards", "ranges"] = "shards"
    """``shards``: a shard is fetched whole when it is first read from. ``ranges``: in runs of
    8 MiB, for large shards, small caches and an early first step; not with ``pipe:``."""
    folder: str = "~/.cache/bigdet"
    """All processes and runs of a host may share it."""
    gib: float = 100.0
    """Room for shards; those used longest ago make room for others."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are read."""

    train: TrainSplitConfig = field(default_factory=TrainSplitConfig)
    """The training split."""
    val: ValSplitConfig = field(default_factory=ValSplitConfig)
    """The validation split."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Copies of remote shards."""
    workers: int = 2
    """Loader processes per rank; 0 decodes in the training process."""


@dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposals."""

    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the square anchor of each pyramid level P2 to P6, pixels. Without an FPN (vgg16): of
    all anchors of a point, in any number; Detectron has 64, 128, 256, 512."""
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height over width of the anchors, area kept."""
    anchors_per_image: int = 256
    """Sampled anchors per image in the loss, at most half of them positive."""
    train_proposals: int = 2000
    """Proposals per level before NMS, and per image after it, in training."""
    test_proposals: int = 1000
    """The same at test time."""
    train_candidates: int | None = None
    """Proposals per level before NMS in training, where they are not as many as after it. None:
    ``train_proposals``."""
    test_candidates: int | None = None
    """The same at test time. None: ``test_proposals``."""
    box_beta: float = 0.0
    """Where the box loss turns from square to linear (smooth L1); 0 is L1. Detectron: 1/9."""
    nms_iou: float = 0.7
    """Proposals of one level that overlap a better one by more than this are dropped."""


@dataclass(frozen=True, kw_only=True)
class RoiConfig:
    """Regions of interest: which are trained on and which are reported."""

    rois_per_image: int = 512
    """Sampled regions per image in the box loss."""
    positive_fraction: float = 0.25
    """At most this part of them on objects."""
    positive_iou: float = 0.5
    """A region on an object overlaps it by at least this. A cascade has its own three."""
    class_agnostic: bool | None = None
    """One box per region for all classes, instead of one per class. None: true if
    ``model.detector`` is a cascade, else false, for all phases."""
    box_loss: BoxLoss = "l1"
    """``l1`` and ``smooth_l1`` of the deltas, or ``giou`` of the boxes."""
    box_beta: float = 1.0
    """Of ``smooth_l1``: where it turns from square to linear. Detectron: 1, torchvision: 1/9."""
    box_loss_weight: float = 1.0
    """Factor of the box loss; with ``giou`` 10 is usual."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    nms_iou: float = 0.5
    """Detections of one class that overlap a better one by more than this are dropped."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


@dataclass(frozen=True, kw_only=True)
class RetinaConfig:
    """RetinaNet: its anchors, its loss, and what is reported."""

    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the smallest square anchor of each pyramid level P3 to P7, pixels."""
    scales_per_octave: int = 3
    """Anchor sizes of a level, from its smallest up to less than twice that."""
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height over width of the anchors, area kept."""
    positive_iou: float = 0.5
    """An anchor that overlaps an object by at least this, or more than all others do, is its."""
    negative_iou: float = 0.4
    """An anchor that overlaps no object by this is background; those between count nothing."""
    focal_alpha: float = 0.25
    """Weight of an anchor's own class in the focal loss; other classes weigh 1 - this."""
    focal_gamma: float = 2.0
    """How much less well-classified anchors count; 0 is cross entropy."""
    box_beta: float = 0.0
    """Where the smooth L1 loss of boxes turns from square to linear. 0: L1 (torchvision,
    mmdetection); detectron2 has 0.1."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    candidates_per_level: int = 1000
    """Detections per level and image before NMS."""
    nms_iou: float = 0.5
    """Detections of one class that overlap a better one by more than this are dropped."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """How the stages of a cascade are trained."""

    gradients: Literal["detectron2", "mmdet"] = "detectron2"
    """``detectron2``: all stages count alike, a third of their gradients goes into the pooled
    features, and a stage trains on all regions of the one before. ``mmdet``: the losses of the
    stages count 1, 0.5 and 0.25, and every stage samples anew among them and the objects."""


@dataclass(frozen=True, kw_only=True)
class KeypointConfig:
    """The keypoint head."""

    num_keypoints: int = 17
    """Keypoints of an object, as many as the categories of the data have (COCO's persons: 17)."""
    width: int = 512
    """Channels of its eight convolutions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector."""

    detector: Detector = MISSING
    """Which detector."""
    backbone: Backbone = MISSING
    """Which backbone."""
    box_head: BoxHead = "2fc"
    """Two fully connected layers, or four 3x3 convolutions and one."""
    norm: Norm = "bn"
    """Normalization of convolutional backbones and, by scope, of FPN and heads."""
    norm_scope: NormScope | None = None
    """Where ``norm`` goes: ``backbone`` or ``all`` (never the RPN head). None: ``backbone`` with
    bn, ``all`` with gn."""
    stride_in_1x1: bool = False
    """Bottlenecks of a ResNet make their steps in the first 1x1 convolution, as MSRA's (Caffe's)
    R-50 and R-101 do, and detectors on them: ``STRIDE_IN_1X1`` in detectron2, ``style='caffe'`` in
    mmdetection. Weights fit either way, but are right for one only."""
    width: int = 256
    """Channels of the FPN and of the convolutions in the heads. Without an FPN (vgg16) they are
    the backbone's."""
    fc_width: int = 1024
    """Channels of the fully connected layers of the box head."""
    compile: bool = False
    """torch.compile of backbone, FPN and RPN (or RetinaNet's) head in training. It pays where the
    canvas has few sizes: resizes ``direct`` and ``jitter``, and ``pad_to: two_shapes``. The first
    steps take minutes."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth in a Swin, ConvNeXt or ViT backbone, in [0, 1)."""
    rpn: RpnConfig = field(default_factory=RpnConfig)
    """Region proposals."""
    roi: RoiConfig = field(default_factory=RoiConfig)
    """Regions of interest."""
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    """Stages of a cascade."""
    keypoint: KeypointConfig = field(default_factory=KeypointConfig)
    """The head of ``keypoint_rcnn``."""
    retina: RetinaConfig = field(default_factory=RetinaConfig)
    """RetinaNet."""


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
class ResizeConfig:
    """The size at which a phase sees its images."""

    kind: Literal["short_side", "direct", "stitcher", "jitter"] = MISSING
    """``short_side``: short side to ``size``, long side at most ``cap``. ``direct``: scaled by a
    random factor about ``size``, then cropped or padded to (size, size); paper 2, section 3.2.
    ``stitcher``: as ``short_side``, then both sides divided by ``divide_by``; paper 2's other way.
    ``jitter``: large-scale jitter: long side to ``size`` times a factor from ``jitter_range``,
    then cropped or padded to (size, size); boxes that the crop cuts shrink to what is left of
    their masks, where the model has masks."""
    size: int = MISSING
    """Pixels: of the short side, or of the square. Also the size at test time."""
    cap: int | None = None
    """Longest long side for ``short_side`` and ``stitcher``, pixels. None: 1333 / 800 of ``size``.
    """
    sizes: list[int] | None = None
    """For ``short_side`` in training: the short side of each step is one of these, pixels. All
    images of a step share it. None: ``size``."""
    size_range: tuple[int, int] | None = None
    """For ``short_side`` in training: the short side of each step is a number from the first to the
    second, pixels. None: ``size``."""
    divide_by: int = 2
    """Of ``stitcher``: what both sides are divided by."""
    variant: Literal["released", "paper"] = "released"
    """Of ``direct`` in training. ``released``, as paper 2's code: the long side becomes ``size``
    times the factor, the aspect ratio stays. ``paper``, as its text: both sides become that."""
    scale_range: tuple[float, float] = (0.8, 1.2)
    """Range of the random factor of ``direct`` in training; 1 at test time."""
    jitter_range: tuple[float, float] = (0.1, 2.0)
    """Range of the random factor of ``jitter`` in training; 1 at test time."""
    pad_to: Literal["batch", "two_shapes"] = "batch"
    """For ``short_side`` and ``stitcher`` in training. ``batch``: a canvas is as large as its
    images need. ``two_shapes``: it is one of two, landscape or portrait, whichever most of its
    images are; one of the other kind is made smaller to fit. ``model.compile`` likes few shapes."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images beside scale, crop and flip: probabilities, 0 is off."""

    color_jitter: float = 0.0
    """Brightness, contrast and saturation of an image change by factors of 0.6 to 1.4."""
    copy_paste: float = 0.0
    """Some objects of another image of the group are pasted into an image, as their masks are."""
    mosaic: float = 0.0
    """An image is replaced by four at half their size side by side: itself and three others of its
    group. Nothing is pasted into a mosaic."""


@dataclass(frozen=True, kw_only=True)
class StartCostConfig:
    """What it took to make weights that come from elsewhere, as far as it is known."""

    preset: Literal["imagenet"] | None = None
    """``imagenet``: 1.28 million images of one object, 100 passes at 224x224 (paper 1)."""
    images: int | None = None
    """Images seen, repeats counted."""
    instances: int | None = None
    """Objects seen."""
    pixels: int | None = None
    """Pixels seen."""
    gpu_seconds: float | None = None
    """Seconds of training times GPUs."""


@dataclass(frozen=True, kw_only=True)
class StartFromConfig:
    """Which weights a phase starts from."""

    source: str | None = None
    """``random``; ``timm`` (the backbone's published ImageNet weights) or ``timm:NAME`` (others by
    timm's name); ``previous`` (the phase before); the path of a run or a ``model.safetensors``; or
    the file of a backbone that others wrote: ``.safetensors``, ``.pth``, ``.pkl`` (README). None:
    ``random`` in the first phase, ``previous`` in the others."""
    parts: list[Part] | None = None
    """The parts that are loaded, the others start anew. None: all parts of the model (``timm``
    and files of others: the backbone)."""
    pixels: Pixels | None = None
    """For ``.pkl`` files, which do not say it: how images were given to the network. ``rgb``:
    as torchvision and bigdet; ``bgr``: in reversed order (X-101-32x8d, X-152-32x8d); ``bgr_255``:
    reversed and not divided by the deviation (MSRA's R-50 and R-101)."""
    cost: StartCostConfig | None = None
    """For ``timm`` and paths: what the weights cost, to stand beside the run's own in
    ``metrics.jsonl`` (``imported/images``, ...). None: not stated."""


@dataclass(frozen=True, kw_only=True)
class PhaseModelConfig:
    """What a phase changes in the model; the other phases do not see it."""

    detector: Detector | None = None
    """Another detector of the R-CNN family. A cascade after a plain detector (late cascade) starts
    with copies of its box head in all stages. None: ``model.detector``."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One part of a run with settings of its own."""

    steps: int | None = None
    """Length of the phase in optimizer steps. One of ``steps``, ``passes`` and ``images`` says how
    long the phase is; the run folder's config has ``steps``."""
    passes: float | None = None
    """Length in passes through the training data."""
    images: int | None = None
    """Length in training images, so that the steps follow from ``images_per_step``."""
    images_per_gpu: int = MISSING
    """Images in one forward pass of one rank (micro-batch)."""
    images_per_step: int | None = None
    """Images per optimizer step over all ranks; what exceeds ranks x ``images_per_gpu`` is
    accumulated. None: one micro-batch per rank."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Size of the images."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Other random changes of the images."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = MISSING
    """Learning rate at ``reference_images_per_step``."""
    reference_images_per_step: int | None = None
    """Linear scaling rule: the rate used is ``lr`` x images per step / this, up or down. It scales
    nothing else; with a length in ``images`` or ``passes`` the steps follow the batch too. None:
    ``lr`` as it stands."""
    momentum: float = 0.9
    """Of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 1e-4
    """On weights; not on normalization layers, biases of them, and the position tables and scales
    of transformers."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """After the warm-up: ``constant``; ``step``: times ``decay_factor`` at each of ``drops``; or
    ``cosine``: half a cosine, from the full rate at the end of the warm-up to 0 at the end."""
    drops: list[int | float] | None = None
    """When the rate drops, in the unit of the phase's length; below 0: so long before its end
    (paper 1's last 60k and last 20k steps: -60_000, -20_000). None: at 2/3 and 11/12 of the length
    (8 and 11 of 12 passes)."""
    decay_factor: float = 0.1
    """Of each drop."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    warmup_factor: float = 0.001
    """Part of the rate at which the warm-up begins."""
    norm_mode: NormMode | None = None
    """For BN only. ``live``: statistics of the batch of each GPU. ``sync``: of the batches of all
    GPUs together, so that losses depend on their number. ``affine``: statistics fixed, scale and
    shift trained. ``fixed``: both fixed. Must be null without BN."""
    freeze_stages: int = 0
    """So many first stages of the backbone (the stem is the first) are not trained."""
    start_from: StartFromConfig = field(default_factory=StartFromConfig)
    """Where the weights come from."""
    model: PhaseModelConfig = field(default_factory=PhaseModelConfig)
    """What this phase changes in the model."""


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
    """Longest long side of all views, pixels."""
    vote_iou: float | None = 0.9
    """Boxes move to the mean of those of other views that overlap them by at least this. None: they
    stay."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how AP is measured; every phase also ends with an evaluation."""

    every: int | None = None
    """Steps between evaluations. None: only at the end of a phase."""
    images_per_gpu: int = 1
    """Images in one forward pass of one rank."""
    resize: ResizeConfig | None = None
    """Size of the images. None: that of the phase."""
    tta: TtaConfig | None = None
    """Test-time augmentation, in every evaluation; ``bigdet.evaluate --tta`` asks for it once. It
    takes two passes per view. None: one view at the size of ``resize``."""
    metric: Metric = "coco"
    """How AP is defined: as COCO does; of boxes, as PASCAL VOC does, over 11 recalls (``voc07``) or
    all of them (``voc12``), where AP50 is VOC's own number."""
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
    """Steps between lines of the log and of ``metrics.jsonl``."""
    tensorboard: bool = True
    """Write TensorBoard event files too, with pictures: a batch with its targets at the start of a
    phase, detections at each evaluation."""
    wandb: WandbConfig | None = None
    """Show the same on Weights & Biases. None: no."""
    stall_seconds: float | None = 1200.0
    """A rank without progress for so long writes its stacks and ends the run; longer than the
    longest step, save or computing of AP. None: never."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

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
