"""ConvNeXt (Liu et al. 2022): timm's modules; its ``stages`` are called ``layers`` here."""

from __future__ import annotations

from typing import Any

from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn

from bigdet.models.backbone_base import STRIDES, Backbone, cut_to_size, pad_to_multiple


class ConvNeXt(Backbone):
    """A ConvNeXt with a 4x4 stem and layer scale; C2 to C5 each get a LayerNorm."""

    def __init__(self, depths: list[int], widths: list[int], drop_path: float) -> None:
        """Build timm's, initialized as there."""
        super().__init__()
        timm_model = TimmConvNeXt(
            depths=depths, dims=widths, num_classes=0, drop_path_rate=drop_path
        )
        self.stem: nn.Module = timm_model.stem
        self.layers: Any = timm_model.stages
        self.channels = list(widths)
        self.add_output_norms()

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The stem and the four stages; the output norms belong to none of them."""
        return [[self.stem], *([stage] for stage in self.layers)]

    def group_matcher(self, coarse: bool = False) -> Any:
        """Give timm's patterns with the names of here."""
        blocks = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": "^stem", "blocks": blocks}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5; its strided layers would leave out edges, so images are padded."""
        height, width = images.shape[-2:]
        x = self.stem(pad_to_multiple(images, STRIDES[-1]))
        features = []
        for index, stage in enumerate(self.layers):
            x = self.run_all(stage.blocks, stage.downsample(x))
            features.append(self.output(index, x.permute(0, 2, 3, 1)))
        return cut_to_size(features, (height, width))
