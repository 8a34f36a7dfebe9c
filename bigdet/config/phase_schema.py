"""Options of a phase: its views, its start, its length and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.families import DETECTORS
from bigdet.config.model_schema import CHOICES
from bigdet.config.own import FORM

NormMode = Literal["live", "sync", "affine", "fixed"]
Pixels = Literal["rgb", "bgr", "bgr_255"]
PARTS = tuple(dict.fromkeys(part for facts in DETECTORS.values() for part in facts.parts))
"""Parts of bigdet's detectors; a user's own may have others."""


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
    draw: Literal["step", "image"] = "step"
    """For ``sizes`` and ``size_range``: one draw for all images of a ``step``, so that they fill
    their canvases and all ranks have equal work, or one for each ``image``, as in Detectron,
    detectron2 and mmdetection."""
    divide_by: int = 2
    """For ``stitcher``: both sides are divided by this."""
    variant: Literal["released", "paper"] = "released"
    """For ``direct`` in training. ``released``, as in paper 2's code: the long side becomes
    ``size`` times the factor, the aspect ratio stays. ``paper``, as in its text: both sides become
    that."""
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
    """Random changes of training images besides scale, crop and flip: probabilities, 0 is off."""

    color_jitter: float = 0.0
    """Brightness, contrast and saturation of an image change by factors of 0.6 to 1.4."""
    copy_paste: float = 0.0
    """Some objects of another image of the group are pasted into an image, as their masks are."""
    mosaic: float = 0.0
    """An image is replaced by four at half their size side by side: itself and three others of its
    group. Nothing is pasted into a mosaic."""


@dataclass(frozen=True, kw_only=True)
class StartCostConfig:
    """What it cost to train imported weights, as far as it is known."""

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
    the file of a backbone from another codebase: ``.safetensors``, ``.pth``, ``.pkl``. None:
    ``random`` in the first phase, ``previous`` in the others."""
    parts: list[str] | None = field(default=None, metadata={CHOICES: PARTS})
    """The parts that are loaded, the others start anew. None: all parts of the model (``timm``
    and files of others: the backbone; of ``vgg16`` they also have fc6 and fc7 for ``box_head``)."""
    pixels: Pixels | None = None
    """For ``.pkl`` files, which do not record it: how images were fed to the network. ``rgb``: as
    in torchvision and bigdet; ``bgr``: in reversed order (X-101-32x8d, X-152-32x8d); ``bgr_255``:
    reversed and not divided by the deviation (MSRA's R-50 and R-101)."""
    ema: bool | None = None
    """For files with both plain weights and their moving average (EMA): true for the average, false
    for the plain ones. None: the plain ones, but the average for files of mmengine, which puts it
    in their place. The log says what a file has and what was taken."""
    cost: StartCostConfig | None = None
    """For ``timm`` and paths: what the weights cost, reported next to the run's own cost in
    ``metrics.jsonl`` (``imported/images``, ...). None: unknown."""


@dataclass(frozen=True, kw_only=True)
class PhaseModelConfig:
    """What a phase changes in the model; the other phases do not see it."""

    detector: str | None = field(default=None, metadata={CHOICES: (*DETECTORS, FORM)})
    """Another detector of the R-CNN family. A cascade after a plain detector (late cascade) starts
    with copies of its box head in all stages. None: ``model.detector``."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One part of a run with settings of its own."""

    steps: int | None = None
    """Length of the phase in optimizer steps. Exactly one of ``steps``, ``passes`` and ``images``
    sets the length; the run folder's config has ``steps``."""
    passes: float | None = None
    """Length in passes through the training data."""
    images: int | None = None
    """Length in training images; the steps follow from ``images_per_step``."""
    images_per_gpu: int = MISSING
    """Images in one forward pass of one rank (micro-batch). Losses are normalized over these images
    (by their objects or samples), as in the published codes, and live BN takes its statistics from
    them: another number changes the gradient even if ``images_per_step`` stays."""
    images_per_step: int | None = None
    """Images per optimizer step over all ranks; beyond ranks x ``images_per_gpu``, gradients are
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
    ``lr`` as given."""
    momentum: float = 0.9
    """Momentum of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    weight_decay: float = 1e-4
    """On weights and biases; not on normalization layers (but see ``decay_norms``), nor on the
    position tables and scales of transformers."""
    decay_norms: bool = False
    """Also decay scale and shift of BN and GN, as mmdetection does unless a config says otherwise
    (its baselines, and paper 2's fine-tuning with affine or SyncBN)."""
    decay_biases: bool = True
    """Decay biases of other layers. False in Detectron."""
    bias_lr_factor: float = 1.0
    """Learning rate of these biases over that of the weights. 2 in Detectron."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """After the warm-up: ``constant``; ``step``: times ``decay_factor`` at each of ``drops``; or
    ``cosine``: half a cosine, from the full rate at the end of the warm-up to 0 at the end."""
    drops: list[int | float] | None = None
    """When the rate drops, in the unit of the phase's length; negative values count from its end
    (paper 1's last 60k and last 20k steps: -60_000, -20_000). None: at 2/3 and 11/12 of the length
    (8 and 11 of 12 passes)."""
    decay_factor: float = 0.1
    """Factor of each drop."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    warmup_factor: float = 0.001
    """Fraction of the rate at which the warm-up starts."""
    norm_mode: NormMode | None = None
    """For BN only. ``live``: statistics of the batch of each GPU. ``sync``: of the batches of all
    GPUs together, so that losses depend on their number. ``affine``: statistics fixed, scale and
    shift trained. ``fixed``: both fixed. Must be null without BN."""
    freeze_stages: int = 0
    """How many first stages of the backbone are not trained; the stem is the first."""
    start_from: StartFromConfig = field(default_factory=StartFromConfig)
    """Where the weights come from."""
    model: PhaseModelConfig = field(default_factory=PhaseModelConfig)
    """What this phase changes in the model."""
