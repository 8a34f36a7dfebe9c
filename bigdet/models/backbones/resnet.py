"""ResNet and ResNeXt (He et al. 2015; Xie et al. 2016): timm's modules and names."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.timm_norms import add_biases
from bigdet.models.norms import Kind, make_norm, take_relu


class ResNet(Backbone):
    """A ResNet or ResNeXt with a 7x7 stem; bottlenecks have their stride in the 3x3 convolution."""

    group_matcher = TimmResNet.group_matcher

    def __init__(
        self,
        layers: list[int],
        norm: Kind,
        *,
        is_bottleneck: bool = True,
        stride_in_1x1: bool = False,
        cardinality: int = 1,
        base_width: int = 64,
    ) -> None:
        """Build timm's; convolutions MSRA, scale 1 and shift 0 (the last norms of blocks too)."""
        super().__init__()
        timm_model = TimmResNet(
            Bottleneck if is_bottleneck else BasicBlock,
            layers,
            num_classes=0,
            cardinality=cardinality,
            base_width=base_width,
            norm_layer=partial(_timm_norm, kind=norm),
            zero_init_last=False,
        )
        self.conv1: nn.Module = timm_model.conv1
        self.bn1: nn.Module = timm_model.bn1
        self.act1: nn.Module = timm_model.act1
        self.maxpool: nn.Module = timm_model.maxpool
        self.layer1: nn.Sequential = timm_model.layer1
        self.layer2: nn.Sequential = timm_model.layer2
        self.layer3: nn.Sequential = timm_model.layer3
        self.layer4: nn.Sequential = timm_model.layer4
        self.channels = [info["num_chs"] for info in timm_model.feature_info[1:]]
        self._join_norms_and_relus()
        if norm == "none":
            add_biases(self)
        if stride_in_1x1:
            self._put_stride_in_1x1()

    def _join_norms_and_relus(self) -> None:
        """Let group normalization do the ReLUs that follow it, but for those after a sum."""
        pairs: list[tuple[nn.Module, str, str]] = [(self, "bn1", "act1")]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                pairs.append((block, "bn1", "act1"))
                if isinstance(block, Bottleneck):
                    pairs.append((block, "bn2", "act2"))
        for owner, norm, relu in pairs:
            left = take_relu(owner.get_submodule(norm), owner.get_submodule(relu))
            setattr(owner, relu, left)

    def _put_stride_in_1x1(self) -> None:
        """Let the first convolutions of bottlenecks make the steps, as in Caffe's ResNets."""
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                first, second = block.get_submodule("conv1"), block.get_submodule("conv2")
                assert isinstance(first, nn.Conv2d)
                assert isinstance(second, nn.Conv2d)
                assert first.kernel_size == (1, 1), "a block that is no bottleneck"
                first.stride, second.stride = second.stride, first.stride

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5."""
        x = self.maxpool(self.run(self._stem, images))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.run_all(layer, x)
            features.append(x)
        return features

    def _stem(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.act1(self.bn1(self.conv1(images)))
        return hidden


def _timm_norm(channels: int, *, kind: Kind, **_factory: Any) -> nn.Module:
    """Build a norm where timm passes device and dtype too (None: its defaults)."""
    return make_norm(kind, channels)
