"""Write ``bigdet/config/timm_backbones.csv``: what bigdet can take of each network of timm.

Every network is built on the meta device, and the first of those that are made of the same kinds of
layers is run forward and backward at an odd size; the row of one that fails has the reason. Run it
after a change of the backbones or with a newer timm (a quarter of an hour on one core): ``python -m
tests.timm_table``. With names, it prints the rows of these.
"""

import csv
import dataclasses
import re
import sys
import warnings

import timm
import torch
from timm.layers import DropPath
from timm.models import model_entrypoint
from torch import nn

from bigdet.config.timm_names import TABLE, TimmRow
from bigdet.models.backbone_base import STRIDES
from bigdet.models.backbones.timm_net import PLAIN, TimmPlain, TimmPyramid, has_scaled_rope
from bigdet.models.norms import batch_norms

SIZE = (61, 99)
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, IndexError, LookupError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What timm's networks raise at sizes that they do not take."""


def row_of(name: str) -> TimmRow:
    """Build and try a network of timm on the meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _row(name)
        except ValueError as error:
            return TimmRow(name=name, lacks=f"{error}".partition(" lacks ")[2] or f"{error}"[:100])
        except FAILURES as error:
            return TimmRow(name=name, lacks=f"layers as bigdet expects them ({error})"[:100])


def _row(name):
    backbone, has_drop_path = _build(name)
    if left := {
        type(layer).__name__
        for layer in backbone.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }:
        return TimmRow(name=name, lacks=f"a normalization other than {', '.join(left)}")
    layers = frozenset(type(layer).__qualname__ for layer in backbone.modules())
    if layers not in _tried:
        _tried[layers] = _lacks(backbone)
    if _tried[layers]:
        return TimmRow(name=name, lacks=_tried[layers])
    is_plain = isinstance(backbone, TimmPlain)
    heeds = {
        "norm": bool(batch_norms(backbone)),
        "drop_path": has_drop_path,
        "taps": is_plain,
        "token_window": is_plain and bool(backbone.windowed),
        "rope_window": is_plain and has_scaled_rope(backbone.net),
        "global_blocks": is_plain and (bool(backbone.windowed) or has_scaled_rope(backbone.net)),
        "image_windows": is_plain,
    }
    return TimmRow(
        name=name,
        parameters=sum(parameter.numel() for parameter in backbone.net.parameters()),
        channels=[backbone.net.embed_dim] if is_plain else backbone.channels,
        depth=len(backbone.net.blocks) if is_plain else 0,
        heeds=[option for option, is_heeded in heeds.items() if is_heeded],
        has_weights=timm.is_model_pretrained(name),
    )


def _build(name):
    """Build the backbone, with drop path where there is any; tell which."""
    try:
        backbone = _of_kind(name, drop_path=0.1)
    except TypeError:
        return _of_kind(name), False
    return backbone, any(isinstance(layer, DropPath) for layer in backbone.net.modules())


def _of_kind(name, **options):
    """Build a backbone of the kind that the strides of the features ask for."""
    if model_entrypoint(name).__module__.rpartition(".")[2] in PLAIN:
        return TimmPlain(name, **options)
    try:
        return TimmPyramid(name, **options)
    except ValueError as error:
        if len(set(re.findall(r"\d+", f"{error}".partition("(has ")[2]))) == 1:
            return TimmPlain(name, **options)
        raise


_tried: dict[frozenset[str], str] = {}
"""What networks lack in a pass, by their kinds of layers; empty where nothing."""


def _lacks(backbone):
    """Say what goes wrong in a forward and a backward pass; empty if nothing does."""
    try:
        _try(backbone)
    except FAILURES as error:
        if "more than 1 value per channel" in f"{error}":  # of pooled features
            return "statistics of a single image in its batch normalization"
        return "features at any image size"
    unreached = [name for name, p in backbone.net.named_parameters() if p.grad is None]
    return f"a use for {', '.join(unreached[:2])}" if unreached else ""


def _try(backbone):
    features = backbone(torch.zeros(1, 3, *SIZE))
    expected = [
        (1, channels, -(-SIZE[0] // stride), -(-SIZE[1] // stride))
        for channels, stride in zip(backbone.channels, STRIDES, strict=True)
    ]
    found = [tuple(each.shape) for each in features]
    assert found == expected, f"{found[0]} for {expected[0]}"
    sum(each.sum() for each in features).backward()


def main(names: list[str]) -> None:
    with sys.stdout if names else TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(each.name for each in dataclasses.fields(TimmRow))
        for name in names or timm.list_models():
            values = dataclasses.astuple(row_of(name))
            table.writerow(" ".join(map(str, v)) if isinstance(v, list) else v for v in values)
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
