"""What every detector does: a batch in, losses or detections out; images in, detections out.

One of your own is named as ``model.detector=my_package.nets:build``, without a change in bigdet:

    # my_package/nets.py
    @describe_detector(parts=("backbone", "fpn", "retina_head"), options=("width", "retina"))
    def build(config, num_classes, backbone):
        fpn = RetinaFPN(backbone.channels[1:], config.width, "none")
        return MyDetector(backbone, fpn, MyHead(config.retina, num_classes))

``config.families.describe_detector`` says what the rules of the config have to know without
building it: the names of its parts, the options of ``model`` that it uses (others are refused),
which parts have norms with ``norm_scope: all``, and whether it learns masks or keypoints. The
function gets the model section, the number of classes and the backbone. It returns a `Detector`
that defines ``losses``, ``features``, ``find``, ``maps``, ``has_maps``, ``eval_settings`` and
``use_eval_settings``, and whose modules are the described parts; `Detector.pixels` gives it the
normalized images of a batch. It may not use batch normalization of torch. ``models/retinanet.py``
is an example to start from; ``models/build.py`` checks what can be seen of it when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.config.model import ModelConfig
from bigdet.models.backbone_base import Backbone, layers_with_weights
from bigdet.models.graphs import Graphs
from bigdet.models.heads.detections import EvalSettings, FlatDetections
from bigdet.models.heads.keypoint import find_keypoints
from bigdet.models.norms import count_lane
from bigdet.ops.boxes import scale_boxes
from bigdet.ops.devices import is_gpu
from bigdet.ops.resize import resize_image
from bigdet.ops.sizes import canvas_size, eval_size
from bigdet.pictures.files import Picture, list_pixels
from bigdet.structures import Batch, Detections, Targets

# RGB, 0..255, of ImageNet: what the published backbones were trained with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_DEVIATION = (58.395, 57.12, 57.375)

UNIT_NUMBERS = 20_000_000
"""Of the weights of consecutive blocks that are gathered together: 80 MB, as one block of ViT-H."""


class Detector(nn.Module):
    """A backbone and what follows it; subclasses say what follows and how it is trained.

    Attributes:
        backbone: images to features.
        config: the model section that it was built from.
        num_classes: K.
        dense_parts: those that see whole canvases, and nothing whose number varies.
        categories: what the labels ``0..K-1`` mean: id, name and more of each.
        eval_size: short side and longest long side, pixels, to which ``predict`` resizes.
    """

    config: ModelConfig
    num_classes: int

    dense_parts: tuple[str, ...]

    def __init__(self, backbone: Backbone) -> None:
        """Keep the backbone; names of parts are those of ``start_from.parts``."""
        super().__init__()
        self.backbone = backbone
        self._is_compiled = False
        self._graphs: Graphs | None = None
        self.categories: list[dict[str, Any]] = []
        self.eval_size = (800, 1333)
        mean, deviation = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_DEVIATION)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", deviation.view(3, 1, 1), persistent=False)

    @property
    def units(self) -> list[list[nn.Module]]:
        """Modules that an engine may shard and gather together: backbone stages, neck, heads.

        Each module is called in every forward pass, of training and of evaluation. A stage is
        given as its layers with weights, since backbones run the blocks of a stage one by one; a
        large one is several units.
        """
        stages = [
            [layer for part in unit for layer in layers_with_weights(part)]
            for stage in self.backbone.stages
            for unit in _cut(stage)
        ]
        heads = [
            called
            for name, part in self.named_children()
            if name != "backbone"
            for called in _called_modules(part)
        ]
        return [*stages, *([head] for head in heads)]

    def forward(self, batch: Batch, detect: Callable[[Batch], Any] | None = None) -> Any:
        """Give the losses of a batch in training mode, else the detections of its images.

        Losses are scalars by name; their sum is minimized. Detections are one of
        `structures.Detections` per image, boxes in pixels of the canvas.

        Args:
            batch: images, and in training mode their objects.
            detect: in evaluation mode what to return of the batch instead. It may call the
                detector's other methods: engines gather sharded weights in a forward pass only.
        """
        if not self.training:
            # Test images have many sizes: compiled for each, they would take longer than they save.
            eager = torch.compiler.set_stance("force_eager" if self._is_compiled else "default")
            with torch.no_grad(), eager:
                return (detect or self._detect)(batch)
        torch.manual_seed(batch.seed)  # all randomness of the model comes after this line
        losses = self.losses(batch)
        count_lane(self)
        return losses

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Give the losses of a batch, means over the lane."""
        raise NotImplementedError

    def _detect(self, batch: Batch) -> list[Detections]:
        """Give the detections of each image, best first."""
        features = self.features(batch)
        found = self.find(features, batch)
        return self.finish(found, self.maps(features, found), len(batch.images))

    def features(self, batch: Batch) -> Any:
        """Compute what the heads read."""
        raise NotImplementedError

    def find(self, features: Any, batch: Batch) -> FlatDetections:
        """Give boxes, scores and labels of the detections, boxes in pixels of the canvas."""
        raise NotImplementedError

    def candidates(self, features: Any, batch: Batch) -> FlatDetections:
        """Give what `find` chooses from: all boxes above the threshold, near duplicates too."""
        return self.find(features, batch)

    def maps(self, features: Any, found: FlatDetections) -> dict[str, Tensor]:
        """Give maps ``(D, ..., h, w)`` on grids over D boxes, such as masks, by name.

        Maps of the same boxes from several views of an image may be averaged.
        """
        raise NotImplementedError

    def finish(
        self, found: FlatDetections, maps: dict[str, Tensor], num_images: int
    ) -> list[Detections]:
        """Hand out detections by image.

        Args:
            found: D detections of all images.
            maps: what `maps` gave for them.
            num_images: of the batch.
        """
        counts = found.counts
        if counts is None:
            counts = torch.bincount(found.images, minlength=num_images).tolist()
        maps = dict(maps)
        if "keypoints" in maps:
            maps["keypoints"] = find_keypoints(maps["keypoints"], found.boxes).float()
        parts = zip(
            torch.split(found.boxes.float(), counts),
            torch.split(found.scores.float(), counts),
            torch.split(found.labels, counts),
            *(
                torch.split(maps[name], counts) if name in maps else [None] * num_images
                for name in ("masks", "keypoints")
            ),
            strict=True,
        )
        return [Detections(*part) for part in parts]

    @property
    def has_maps(self) -> bool:
        """Whether `maps` gives any."""
        raise NotImplementedError

    @property
    def eval_settings(self) -> EvalSettings:
        """Thresholds and limits of the detections."""
        raise NotImplementedError

    def compile_dense(self, **options: Any) -> None:
        """Let torch compile the dense parts for training, once for each size of the canvas.

        Args:
            options: of ``torch.compile``.
        """
        torch.compiler.reset()  # what was compiled for an earlier phase
        for name, part in self.named_children():
            if name in self.dense_parts:  # a model without a pyramid has no fpn
                part.compile(dynamic=False, **options)
        self._is_compiled = True

    def graph_dense(self) -> None:
        """Let CUDA replay the dense parts in training, recorded once for each shape of a batch."""
        dense = [part for name, part in self.named_children() if name in self.dense_parts]
        self._graphs = Graphs(dense)

    def run_dense(self, dense: Callable[[Batch], Any], batch: Batch) -> Any:
        """Give ``dense(batch)``, what the dense parts compute, replayed where that is wanted.

        Args:
            dense: reads the images and their sizes alone; the same in all calls.
            batch: of the training.
        """
        if self._graphs is None or not torch.is_grad_enabled() or not is_gpu(batch.images.device):
            return dense(batch)

        def given(images: Tensor, image_sizes: Tensor) -> Any:
            return dense(replace(batch, images=images, image_sizes=image_sizes))

        return self._graphs(given, batch.images, batch.image_sizes)

    def use_eval_settings(self, config: ModelConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        raise NotImplementedError

    def seen_size(self, batch: Batch) -> tuple[int, int]:
        """Return height and width of the `pixels`: the canvas, or the square around it."""
        height, width = batch.images.shape[-2:]
        largest = max(height, width)
        return (largest, largest) if self.config.pad_to_square else (height, width)

    def pixels(self, batch: Batch) -> Tensor:
        """Give the normalized images ``(B, 3, H, W)``; everything outside an image is 0."""
        mean, deviation = self.get_buffer("pixel_mean"), self.get_buffer("pixel_deviation")
        height, width = batch.images.shape[-2:]
        lines = (
            torch.arange(height, device=mean.device)[:, None] < batch.image_sizes[:, 0, None, None]
        )
        columns = torch.arange(width, device=mean.device) < batch.image_sizes[:, 1, None, None]
        pixels = batch.images.to(mean.dtype, memory_format=torch.channels_last)
        pixels = (pixels - mean).div_(deviation)
        pixels = pixels.mul_((lines & columns)[:, None])
        size = self.seen_size(batch)
        if size == (height, width):
            return pixels
        return F.pad(pixels, (0, size[1] - width, 0, size[0] - height))

    @torch.no_grad()
    def predict(self, images: Sequence[Picture]) -> list[Detections]:
        """Detect objects in images of any sizes, in one forward pass.

        Args:
            images: files, which are turned as their EXIF says, Pillow's images, or RGB as uint8
                arrays ``(h, w, 3)`` or tensors ``(3, h, w)``.

        Returns:
            Detections of each image, boxes in pixels of the image as given, on the device of the
            model. The model is put into evaluation mode for the call.
        """
        pixels = list_pixels(images)
        if not pixels:
            return []
        batch = collate_images(pixels, self.eval_size)
        resized = [(int(height), int(width)) for height, width in batch.image_sizes.tolist()]
        with evaluating(self):
            found = self(batch.to(self.get_buffer("pixel_mean").device))
        return [
            scale_detections(one, size, (image.shape[1], image.shape[2]))
            for one, size, image in zip(found, resized, pixels, strict=True)
        ]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a block, then restore it, also after an error."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _cut(stage: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Divide a stage into runs of blocks of at most ``UNIT_NUMBERS``, or of one block."""
    unit: list[nn.Module] = []
    count = 0
    for part in stage:
        numbers = sum(parameter.numel() for parameter in part.parameters())
        if unit and count + numbers > UNIT_NUMBERS:
            yield unit
            unit, count = [], 0
        unit.append(part)
        count += numbers
    yield unit


def _called_modules(module: nn.Module) -> list[nn.Module]:
    """List the outermost modules that have a forward pass of their own."""
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [called for child in module.children() for called in _called_modules(child)]


def scale_detections(
    found: Detections, from_size: tuple[int, int], to_size: tuple[int, int]
) -> Detections:
    """Move detections from an image to the same image at another size.

    Args:
        found: in pixels of the image at ``from_size``.
        from_size: height, width.
        to_size: height, width.
    """
    keypoints = found.keypoints
    if keypoints is not None:
        scales = [to_size[1] / from_size[1], to_size[0] / from_size[0], 1.0]
        keypoints = keypoints * keypoints.new_tensor(scales)
    boxes = scale_boxes(found.boxes, from_size, to_size)
    return replace(found, boxes=boxes, keypoints=keypoints)


def collate_images(images: Sequence[Tensor], short_and_long: tuple[int, int]) -> Batch:
    """Resize images and put them on one canvas, without targets.

    Args:
        images: ``(3, h, w)`` uint8 each.
        short_and_long: short side and longest long side to reach, pixels.
    """
    sizes = [eval_size(image.shape[1], image.shape[2], *short_and_long) for image in images]
    canvas = torch.zeros(len(images), 3, *canvas_size(sizes), dtype=torch.uint8)
    canvas = canvas.to(memory_format=torch.channels_last)
    for place, image, size in zip(canvas, images, sizes, strict=True):
        place[:, : size[0], : size[1]] = resize_image(image, size)
    empty = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        boxes=torch.zeros(0, 4),
        labels=empty,
        is_crowd=empty.bool(),
        offsets=torch.zeros(len(images) + 1, dtype=torch.int64),
    )
    return Batch(
        images=canvas,
        image_sizes=torch.tensor(sizes),
        original_sizes=torch.tensor([(image.shape[1], image.shape[2]) for image in images]),
        image_ids=torch.arange(len(images)),
        weights=torch.ones(len(images)),
        targets=targets,
        seed=0,
    )
