"""A backbone that a phase does not train: kept in bf16, and left alone by the engine.

Its weights become buffers that are in no state: an engine neither shards nor steps them, keeps no
copy in fp32, and no checkpoint has them. They are written once per phase into the run folder
(``frozen/PHASE.safetensors``), and checkpoints hold the hash of that file's tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.any_size import derived
from bigdet.models.backbones.build import NUM_STAGES, freeze_stages
from bigdet.models.backbones.timm_net import TimmBackbone

FOLDER = "frozen"
"""In the run folder: a file per phase."""


class _Frozen(nn.Module):
    """Methods for a frozen network: it runs in bf16, and nothing in it is random.

    Attributes:
        frozen_names: of what does not change in the network, in its state before.
    """

    frozen_names: list[str]
    frozen_parts: list[nn.Module]

    def forward(self, x: Tensor, **options: Any) -> list[Tensor]:
        """Compute features in fp32."""
        with torch.autocast(x.device.type, torch.bfloat16):
            features = super().forward(x, **options)
        return [feature.to(x.dtype) for feature in features]

    def train(self, mode: bool = True) -> Any:
        """Set the mode of what is trained; drop path and dropout stay off in what is not."""
        super().train(mode)
        for part in self.frozen_parts:
            part.eval()
        return self


def freeze_backbone(backbone: Backbone) -> None:
    """Freeze the stem and all stages of a backbone (not output norms and a pyramid behind them).

    Matrices and kernels are rounded to bf16, as autocast does in each pass; the rest stays in fp32.
    No activation of them is kept, since nothing in them or before them has a gradient.
    """
    freeze_stages(backbone, NUM_STAGES)
    net: nn.Module = backbone
    parts = [part for stage in backbone.stages for part in stage]
    if isinstance(backbone, TimmBackbone):
        net, parts = backbone.net, list(backbone.net.children())
        for parameter in net.parameters():  # the last norm too
            parameter.requires_grad_(False)
    modules = [module for part in parts for module in part.modules()]
    if net is not backbone:
        modules.append(net)  # with class tokens and positions
    inside = {id(tensor) for module in modules for tensor in _own_tensors(module)}
    names = [name for name, each in net.state_dict(keep_vars=True).items() if id(each) in inside]
    for module in modules:
        _to_buffers(module)
    net.__class__ = derived(type(net), _Frozen)
    net.frozen_names, net.frozen_parts = names, parts  # type: ignore[assignment]
    net.train(net.training)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _to_buffers(module: nn.Module) -> None:
    """Turn the parameters of one module into buffers, and keep its buffers out of its state."""
    is_matrix = isinstance(module, nn.Linear | _ConvNd)
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = parameter.detach()
        del module._parameters[name]
        dtype = torch.bfloat16 if is_matrix and name == "weight" else value.dtype
        module.register_buffer(name, value.to(dtype), persistent=False)
    module._non_persistent_buffers_set.update(module._buffers)


def frozen_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a frozen backbone by their names in the detector; else nothing."""
    found: dict[str, Tensor] = {}
    for prefix, module in detector.named_modules():
        if isinstance(module, _Frozen):
            buffers = dict(module.named_buffers())
            found |= {f"{prefix}.{name}": buffers[name] for name in module.frozen_names}
    return found


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_frozen(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a frozen backbone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, file)


def read_frozen(file: Path, expected: str) -> dict[str, Tensor]:
    """Read the tensors of a frozen backbone.

    Args:
        file: of `write_frozen`.
        expected: their hash.

    Raises:
        ValueError: the file is not there, or holds others.
    """
    if not file.is_file():
        raise ValueError(
            f"{file}: not found, but it holds the frozen backbone of a checkpoint, which is in no "
            f"checkpoint itself. Copy it from the folder of the run."
        )
    tensors = load_file(file)
    if (found := hash_of(tensors)) != expected:
        raise ValueError(
            f"{file}: its tensors have the hash {found[:12]}, expected {expected[:12]}: it is not "
            f"the frozen backbone that the checkpoint was trained with. Copy that of its run."
        )
    return tensors


def find_frozen(weights: Path, phase: str) -> Path:
    """Return where the frozen backbone of weights is: in their folder or one above it."""
    name = Path(FOLDER) / f"{phase}.safetensors"
    folders = [weights, *weights.absolute().parents][:4]
    return next((each / name for each in folders if (each / name).is_file()), weights.parent / name)
