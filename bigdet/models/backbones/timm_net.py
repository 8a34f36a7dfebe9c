"""Any network of timm that gives features of its inner layers, by its name in timm.

`TimmPyramid` is for networks whose features have several strides, `TimmPlain` for those with one.
Blocks, positions, class and register tokens and layer scale are timm's own, as is the forward pass;
other image sizes are in ``any_size.py``, windows in ``windows.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingCat
from timm.models import group_parameters, model_entrypoint
from torch import Tensor, nn

from bigdet.models.backbone_base import STRIDES, Backbone, cut_to_size, pad_to_multiple
from bigdet.models.backbones.any_size import adapt, derived
from bigdet.models.backbones.timm_norms import replace_batch_norms
from bigdet.models.backbones.vit import NUM_QUARTERS, PATCH, equal_runs, simple_pyramid
from bigdet.models.backbones.windows import cut_image, join_windows, use_windows
from bigdet.models.norms import Kind

_ANY_SIZE = {"strict_img_size": False, "always_partition": True}
_OPTIONS: dict[str, dict[str, Any]] = {
    "swin_transformer": _ANY_SIZE,
    "swin_transformer_v2": _ANY_SIZE,
}
"""What timm is given to build networks for any image size, by its modules."""
PLAIN = ("vision_transformer", "deit", "eva")
"""Modules of networks whose patches can be of another size."""


class _Features(nn.Module):
    """Methods for a network of timm: calling it gives the features of inner layers.

    They are computed in a call so that an engine that shards weights gathers those that belong to
    the network itself.
    """

    def forward(self, x: Tensor, **options: Any) -> list[Tensor]:
        """Compute ``(B, C, h, w)`` of each of the layers ``indices``."""
        features: list[Tensor] = self.forward_intermediates(  # type: ignore[operator]
            x, intermediates_only=True, output_fmt="NCHW", **options
        )
        return features


def create_net(name: str, drop_path: float | None = None, **options: Any) -> Any:
    """Build a network of timm, without classifier, with random weights.

    One of patches gets those of 16x16 pixels, and keeps the grid of its positions.

    Args:
        name: in timm, without a tag of weights.
        drop_path: highest rate of stochastic depth. None: the network has none.
        options: more of timm's.
    """
    module = _module_of(name)
    options = {"num_classes": 0, **_OPTIONS.get(module, {}), **options}
    if drop_path is not None:  # timm's own default may be another than 0
        options["drop_path_rate"] = drop_path
    if module in PLAIN:
        with torch.device("meta"):
            grid = timm.create_model(name, **{**options, "pretrained": False}).patch_embed.grid_size
        options |= {"dynamic_img_size": True, "patch_size": PATCH}
        options["img_size"] = tuple(PATCH * count for count in grid)
    return timm.create_model(name, **options)


def _module_of(name: str) -> str:
    """Return the module of timm that has a network."""
    return str(model_entrypoint(name).__module__).rpartition(".")[2]


class TimmBackbone(Backbone):
    """What both kinds have in common.

    Attributes:
        name: of the network in timm.
        options: of timm's that it was built with.
        input_scale: ``(3, 1, 1)``; with ``input_shift`` it makes of images that are normalized with
            bigdet's mean and deviation those that the weights were trained on.
    """

    net: Any
    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, net: Any, name: str, options: Mapping[str, Any]) -> None:
        """Take a network of timm, without the layers that are not used."""
        super().__init__()
        self.name, self.options = name, options
        self.net = net
        adapt(net)
        net.__class__ = derived(type(net), _Features)
        self.register_buffer("input_scale", torch.ones(3, 1, 1))
        self.register_buffer("input_shift", torch.zeros(3, 1, 1))

    @property
    def stem_parameters(self) -> list[nn.Parameter]:
        """Those of the network itself, such as class tokens and positions."""
        staged = {
            id(parameter)
            for modules in self.stages
            for module in modules
            for parameter in module.parameters()
        }
        return [each for each in self._inner_parameters() if id(each) not in staged]

    def _inner_parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def group_matcher(self, coarse: bool = False) -> Any:
        """Say which layer each parameter belongs to, as timm does."""
        found = group_parameters(self.net, self.net.group_matcher(coarse), reverse=True)
        return lambda name: found.get(name.removeprefix("net."), math.inf)

    def _prepared(self, images: Tensor, multiple: int) -> Tensor:
        self.net.set_grad_checkpointing(
            self.is_checkpointed and self.training and torch.is_grad_enabled()
        )
        # Padding first: it is then like what is outside an image, which is 0 as it comes here.
        return pad_to_multiple(images, multiple) * self.input_scale + self.input_shift


class TimmPyramid(TimmBackbone):
    """A network with features of strides 4, 8, 16 and 32.

    Where the network has LayerNorm, each of C2 to C5 gets one too, as in Swin's and MViTv2's
    detectors.
    """

    def __init__(
        self, name: str, norm: Kind = "bn", drop_path: float | None = None, **options: Any
    ) -> None:
        """Build timm's, initialized as there.

        Args:
            name: in timm.
            norm: what to put in the place of batch normalization.
            drop_path: highest rate of stochastic depth.
            options: more of timm's, for small networks in tests.

        Raises:
            ValueError: features of some stride are missing.
        """
        net = create_net(name, drop_path, **options)
        infos = feature_infos(net)
        strides = [info["reduction"] for info in infos]
        if missing := [stride for stride in STRIDES if stride not in strides]:
            wanted = " and ".join(map(str, missing))
            raise ValueError(f"timm's {name} lacks features of stride {wanted} (has {strides})")
        self._indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
        net.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        replace_batch_norms(net, norm)
        super().__init__(net, name, options)
        names = [_module_name(net, infos[index]["module"]) for index in self._indices]
        before = [info["module"] for info in infos[: self._indices[0]] if info["reduction"] > 1]
        self._ends = [before[-1] if before else None, *names]
        self.channels = [infos[index]["num_chs"] for index in self._indices]
        self._has_output_norms = any(isinstance(layer, nn.LayerNorm) for layer in net.modules())
        if self._has_output_norms:
            self.add_output_norms()

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages."""
        return _split(self.net, self._ends)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5."""
        features = self.net(self._prepared(images, STRIDES[-1]), indices=self._indices)
        if self._has_output_norms:
            features = [self.output(i, x.permute(0, 2, 3, 1)) for i, x in enumerate(features)]
        return cut_to_size(features, (images.shape[2], images.shape[3]))


class TimmPlain(TimmBackbone):
    """A network with features of stride 16; C2 to C5 come from the last by (de)convolutions."""

    def __init__(
        self,
        name: str,
        norm: Kind = "bn",
        drop_path: float | None = None,
        *,
        token_window: int | None = 14,
        rope_window: int | None = None,
        global_blocks: int = NUM_QUARTERS,
        image_windows: int = 1,
        taps: Sequence[int] = (),
        final_norm: bool = False,
        **options: Any,
    ) -> None:
        """Build timm's, initialized as there; the pyramid with MSRA weights.

        Args:
            name: in timm.
            norm: what to put in the place of batch normalization.
            drop_path: highest rate of stochastic depth.
            token_window: tokens on a side of the windows that all blocks attend in but
                ``global_blocks``, where positions are added to the tokens. None: all blocks attend
                over the whole image.
            rope_window: the same where positions are rotary and scaled to the grid of the training.
            global_blocks: how many blocks attend over the whole image: the last of as many runs.
            image_windows: the image is cut into so many windows a side, each of which goes through
                the network by itself, as does the whole image at the size of a window.
            taps: depths of the features, in blocks; they are concatenated. Empty: the last block.
            final_norm: apply the network's last norm to features.
            options: more of timm's, for small networks in tests.
        """
        net = create_net(name, drop_path, **options)
        if (stride := feature_infos(net)[-1]["reduction"]) != PATCH:
            raise ValueError(f"timm's {name} lacks features of stride {PATCH} (has {stride})")
        self._indices = [depth - 1 for depth in taps] or [len(net.blocks) - 1]
        net.prune_intermediate_layers(self._indices, prune_norm=not final_norm, prune_head=True)
        replace_batch_norms(net, norm)
        super().__init__(net, name, options)
        self._final_norm, self._image_windows = final_norm, image_windows
        self.windowed: list[Any] = []
        self._window = rope_window if has_scaled_rope(net) else token_window
        has_windows = has_scaled_rope(net) or getattr(net, "rope", None) is None
        if self._window is not None and has_windows and _module_of(name) in PLAIN:
            runs = equal_runs(net.blocks, global_blocks)
            self.windowed = [block.attn for run in runs for block in run[:-1]]
            for attention in self.windowed:
                use_windows(attention, self._window, net.num_prefix_tokens)
        width = net.embed_dim * len(self._indices) * (1 if image_windows == 1 else 2)
        self.channels, self.pyramid = simple_pyramid(width)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The patch embedding and the blocks in quarters; the last norm belongs to none of them."""
        stem = [self.net.patch_embed, self.net.norm_pre]
        return [stem, *equal_runs(self.net.blocks)]

    def _inner_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.net.named_parameters() if not name.startswith("norm.")]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5."""
        features = self.features(self._prepared(images, self._image_windows * STRIDES[-1]))
        return cut_to_size(
            [level(features) for level in self.pyramid], (images.shape[2], images.shape[3])
        )

    def features(self, x: Tensor) -> Tensor:
        """Give the map ``(B, C, H / 16, W / 16)`` of ``(B, 3, H, W)``."""
        count = self._image_windows
        if count == 1:
            return self._map(x)
        windows = cut_image(x, count)
        size = windows.shape[-2:]
        whole = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        maps = self._map(torch.cat([windows, whole]))
        joined = join_windows(maps[: len(windows)], count)
        spread = F.interpolate(maps[len(windows) :], size=joined.shape[-2:], mode="bilinear")
        return torch.cat([joined, spread], dim=1)

    def _map(self, x: Tensor) -> Tensor:
        rope = None
        if self.windowed and has_scaled_rope(self.net):
            rope = self.net.rope.get_embed((self._window, self._window))
        for attention in self.windowed:
            attention.grid_size = (x.shape[2] // PATCH, x.shape[3] // PATCH)
            attention.window_rope = rope
        return torch.cat(self.net(x, indices=self._indices, norm=self._final_norm), dim=1)


def has_scaled_rope(net: Any) -> bool:
    """Tell whether the positions of a network are rotary, and those of any grid are scaled to one.

    A window of tokens then has the positions of a whole image of that size.
    """
    rope = getattr(net, "rope", None)
    return isinstance(rope, RotaryEmbeddingCat) and rope.ref_feat_shape is not None


def feature_infos(net: Any) -> list[dict[str, Any]]:
    """Return what timm says of a network's features: ``module``, ``reduction``, ``num_chs``."""
    infos = net.feature_info
    found: list[dict[str, Any]] = infos if isinstance(infos, list) else infos.info
    return found


def _module_name(net: nn.Module, name: str) -> str:
    """Return the name of a feature's module (timm's MViTv2 says ``block`` of its ``stages``)."""
    return name if name in dict(net.named_modules()) else name.replace("block", "stages")


def _split(net: nn.Module, ends: Sequence[str | None]) -> list[list[nn.Module]]:
    """Cut the modules of a network, in their order, behind each of five of them.

    Args:
        net: of timm.
        ends: the last modules of the stem and of the four stages, by name. None for the stem: it
            ends where the list begins that the first stage is in.
    """
    names = [end for end in ends if end is not None]
    parts = _outermost(net, "", names)
    places = [name for name, _ in parts]
    cuts = [0, *(places.index(name) + 1 for name in names)]
    if ends[0] is None:
        container = f"{names[0].rpartition('.')[0]}."
        cuts.insert(1, next(i for i, name in enumerate(places) if name.startswith(container)))
    return [[module for _, module in parts[start:end]] for start, end in pairwise(cuts)]


def _outermost(module: nn.Module, prefix: str, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """List modules by name, taken apart where one of ``names`` is inside."""
    parts = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if any(inner.startswith(f"{full}.") for inner in names):
            parts += _outermost(child, f"{full}.", names)
        else:
            parts.append((full, child))
    return parts
