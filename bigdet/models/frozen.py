"""A backbone that a phase does not train: kept in bf16, and left alone by the engine.

Its weights become buffers that are in no state: an engine does not step them, keeps no copy in
fp32, and no checkpoint has them. The run folder has them once, in a file that is named after their
hash (``frozen/HASH.safetensors``), and checkpoints have the hash.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bigdet.host.files import put_in_place
from bigdet.models.backbone_base import Backbone, layers_with_weights
from bigdet.models.backbones.any_size import derived
from bigdet.models.backbones.build import NUM_STAGES, freeze_stages
from bigdet.models.backbones.timm_net import TimmBackbone
from bigdet.pieces.tensor_file import NAMES, Spec, TensorFile, write_tensors
from bigdet.run_dir import RunDir

FROZEN = "frozen"
"""In the metadata of weights: the hash of a frozen backbone."""
WITH_FROZEN = "with_frozen"
"""In the metadata of weights: the frozen backbone is among them."""
MATRIX_TYPE = torch.bfloat16


class _Frozen(nn.Module):
    """Methods for a frozen network: it runs in bf16, and nothing in it is random.

    Attributes:
        frozen_names: of what does not change in the network, in its state before.
        frozen_parts: modules that have all of it.
        frozen_layers: modules that are called in each forward pass, the matrices among them.
    """

    frozen_names: list[str]
    frozen_parts: list[nn.Module]
    frozen_layers: list[nn.Module]

    def forward(self, x: Tensor, **options: Any) -> list[Tensor]:
        """Compute features in fp32."""
        with torch.autocast(x.device.type, MATRIX_TYPE):
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
    staged = [part for stage in backbone.stages for part in stage]
    layers = [layer for part in staged for layer in layers_with_weights(part)]
    net: nn.Module = backbone
    parts = staged
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
    net.frozen_layers = layers  # type: ignore[assignment]
    net.train(net.training)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _to_buffers(module: nn.Module) -> None:
    """Turn the parameters of one module into buffers, and keep its buffers out of its state."""
    is_matrix = isinstance(module, nn.Linear | _ConvNd)
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = parameter.detach()
        del module._parameters[name]
        dtype = MATRIX_TYPE if is_matrix and name == "weight" else value.dtype
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


def is_frozen(module: nn.Module) -> bool:
    """Tell whether a module is the network of a frozen backbone."""
    return isinstance(module, _Frozen)


def frozen_layers(detector: nn.Module) -> list[nn.Module]:
    """Return the layers of a frozen backbone that have its matrices, in the order of the model.

    Each is called in every forward pass.
    """
    found = [module for module in detector.modules() if isinstance(module, _Frozen)]
    layers = [layer for module in found for layer in module.frozen_layers]
    return [layer for layer in layers if any(each.dtype == MATRIX_TYPE for each in layer.buffers())]


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    numbers = tensor.detach().cpu().contiguous().flatten()
    digest.update(numbers.view(torch.uint8).numpy().data)


def write_frozen(run_dir: RunDir, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> str:
    """Write the tensors of a frozen backbone into the folder of a run, and return their hash.

    Args:
        run_dir: of the run.
        like: tensors of their types and shapes, by name; those on the meta device will do.
        read: gives a tensor, in any type; it is let go of before the next is asked for.
    """
    digest, folder = hashlib.sha256(), run_dir.frozen("").parent
    specs = {name: Spec(NAMES[like[name].dtype], tuple(like[name].shape)) for name in sorted(like)}

    def rounded(name: str) -> Tensor:
        tensor = read(name).to(like[name].dtype).contiguous()
        _add(digest, name, tensor)
        return tensor

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "new.tmp"
    write_tensors(temporary, specs, map(rounded, specs))
    put_in_place(temporary, run_dir.frozen(digest.hexdigest()))
    return digest.hexdigest()


def open_frozen(weights: Path, expected: str, phase: str) -> TensorFile:
    """Open the file with the frozen backbone of some weights, after a check of its hash.

    Args:
        weights: a run folder, a checkpoint of one, or a file in one of these.
        expected: hash of the tensors.
        phase: of the weights; earlier versions named the file after it.

    Raises:
        ValueError: the file is not there, or has other tensors.
    """
    file = find_frozen(weights, expected, phase)
    if file is None:
        raise ValueError(
            f"{weights}: its frozen backbone is not in it, and {RunDir(Path()).frozen(expected)} "
            f"is neither in its folder nor in one above it. Copy the folder frozen of its run "
            f"there, or give the model.safetensors that a finished run has at the top of its "
            f"folder, which has all weights (unless checkpoint.with_frozen is false)."
        )
    tensors = TensorFile(file)
    if (found := hash_of(tensors)) != expected:
        raise ValueError(
            f"{file}: its tensors have the hash {found[:12]}, expected {expected[:12]}: it is not "
            f"the frozen backbone that {weights} was trained with. Copy that of its run."
        )
    return tensors


def find_frozen(weights: Path, expected: str, phase: str) -> Path | None:
    """Return where the frozen backbone of weights is: in their folder or one above it.

    The arguments are those of `open_frozen`. None where there is no file of its name.
    """
    folders = [weights, *weights.absolute().parents][:4]
    files = [RunDir(folder).frozen(expected) for folder in folders]
    names = [each for file in files for each in (file, file.with_name(f"{phase}.safetensors"))]
    return next(filter(Path.is_file, names), None)


def add_frozen(weights: Path, out: Path) -> None:
    """Copy a ``model.safetensors``, with the frozen backbone that was left out of it, if any.

    Args:
        weights: in a run folder.
        out: the file that is written.
    """
    left = TensorFile(weights)
    if not lacks_frozen(left.metadata):
        shutil.copyfile(weights, out)
        return
    frozen = open_frozen(weights, left.metadata[FROZEN], left.metadata["phase"])
    values = itertools.chain(left.values(), frozen.values())
    write_tensors(out, left.specs | frozen.specs, values, left.metadata | {WITH_FROZEN: "true"})


def lacks_frozen(metadata: Mapping[str, str]) -> bool:
    """Tell by the metadata of weights whether a frozen backbone was left out of them."""
    return FROZEN in metadata and WITH_FROZEN not in metadata
