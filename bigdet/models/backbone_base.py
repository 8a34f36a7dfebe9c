"""What a backbone is: images in, features of four strides out, stages that can be frozen.

One of your own is named as ``model.backbone=my_package.nets:Plain``, without a change in
bigdet, here in ten lines:

  # my_package/nets.py
  from itertools import accumulate, pairwise
  from torch import nn
  from bigdet.models.backbone_base import Backbone
  from bigdet.models.norms import conv_norm

  class Plain(Backbone):
      def __init__(self, norm):
          super().__init__()
          self.channels = [32, 64, 128, 256]
          pairs = pairwise([3, 32, *self.channels])
          stack = [nn.Sequential(nn.MaxPool2d(2), conv_norm(*w, 3, norm, relu=True)) for w in pairs]
          self.blocks = nn.ModuleList(stack)
      stages = property(lambda self: [[block] for block in self.blocks])
      def forward(self, images):
          return list(accumulate(self.blocks, lambda x, f: self.run(f, x), initial=images))[2:]

The class, or a function that returns such a backbone, is called with the options of ``model`` that
are among its parameters: ``norm`` (``bn``, ``gn`` or ``none``: what its layers of
``norms.make_norm`` and ``norms.conv_norm`` are), ``drop_path`` and ``stride_in_1x1``. Those that it
does not take are refused in the config. It must

- subclass `Backbone`: ``channels`` of C2 to C5, ``stages`` of five lists (freezing and sharding
  go by them; one may be empty), ``forward`` for images whose sides 32 divides;
- use no batch normalization of torch, which knows no ``norm_mode``;
- draw its first weights from torch's generator alone, so that all ranks begin with the same;
- call its layers instead of reading their weights, since under FSDP and ZeRO-3 these are there
  during a call only, and run its blocks through ``self.run`` for activation checkpointing.

``models/backbones/build.py`` checks what can be seen of it when it is built. Weights that ``timm``
names are for bigdet's own backbones; one of yours starts from random weights, a run, or a file with
its own names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.models.activation_checkpointing import Checkpointed

STRIDES = [4, 8, 16, 32]


class Backbone(Checkpointed):
    """Images to features of four strides.

    Attributes:
        channels: of C2 to C5.
        strides: of C2 to C5, pixels.
        stages: the modules of the stem and of the four stages, in the order of freezing.
    """

    channels: list[int]
    strides = STRIDES

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages."""
        raise NotImplementedError

    @property
    def stem_parameters(self) -> list[nn.Parameter]:
        """Parameters of the stem that are in no module of ``stages``, such as positions."""
        return []

    def group_matcher(self, coarse: bool = False) -> Any:
        """Say which layer each parameter belongs to, in the form that timm's models do.

        By default the stem is the first layer. After it, every module of `stages` is a layer; of an
        ``nn.Sequential`` every child.

        Args:
            coarse: timm's other way, by stages; not used here.

        Returns:
            A function from a parameter's name to what its layer is sorted by, or the patterns of
            names that timm's models give.
        """
        stem, *stages = self.stages
        layers = [stem, *([layer] for stage in stages for part in stage for layer in _parts(part))]
        number = {
            id(parameter): place
            for place, layer in enumerate(layers)
            for module in layer
            for parameter in module.parameters()
        }
        number |= {id(parameter): 0 for parameter in self.stem_parameters}
        numbers = {name: number.get(id(p), math.inf) for name, p in self.named_parameters()}
        return numbers.__getitem__

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images: ``(B, 3, H, W)`` normalized, any H and W, best in channels_last memory.

        Returns:
            C2 to C5: ``(B, C_i, ceil(H / stride_i), ceil(W / stride_i))``.
        """
        raise NotImplementedError

    def run_all(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run blocks one after the other, each by itself where checkpointing is on."""
        for block in blocks:
            x = self.run(block, x)
        return x

    def add_output_norms(self) -> None:
        """Give each of C2 to C5 a LayerNorm over channels, ``norm0`` to ``norm3``."""
        for index, channels in enumerate(self.channels):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))

    def output(self, index: int, x: Tensor) -> Tensor:
        """Normalize ``(B, h, w, C)`` of stage ``index`` into ``(B, C, h, w)``, channels_last."""
        normalized: Tensor = getattr(self, f"norm{index}")(x)
        return normalized.permute(0, 3, 1, 2)


def layers_with_weights(module: nn.Module) -> list[nn.Module]:
    """List the outermost modules that have parameters of their own, in the model's order."""
    if any(True for _ in module.parameters(recurse=False)):
        return [module]
    return [layer for child in module.children() for layer in layers_with_weights(child)]


def _parts(module: nn.Module) -> list[nn.Module]:
    """Children of a container, or the module itself."""
    return list(module) if isinstance(module, nn.Sequential) else [module]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Append zeros below and to the right of ``(B, C, H, W)`` until the multiple divides both."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def cut_to_size(features: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Drop what lies wholly outside an image of ``size`` from features of `STRIDES`."""
    return [
        feature[..., : -(-size[0] // stride), : -(-size[1] // stride)]
        for feature, stride in zip(features, STRIDES, strict=True)
    ]
