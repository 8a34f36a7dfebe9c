"""Rows of a detector's weights that belong to classes, and moving them to another list of classes.

Letters: K classes, A anchor shapes, R rows (output channels) of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bigdet.data.format.mix import name_key
from bigdet.pieces.unread import Unread


def class_rows(
    name: str, num_rows: int, num_classes: int, *, is_agnostic: bool = False
) -> Tensor | None:
    """Return which rows of a tensor belong to which class.

    Args:
        name: of the tensor in the detector's state.
        num_rows: R, its first dimension.
        num_classes: K of the detector.
        is_agnostic: a region has one box for all classes, which for one class R does not show.

    Returns:
        ``(K + 1, r)`` int64, the last entry for the background, or ``(K, r)`` where there is none;
        None where the tensor is the same for all classes.
    """
    words = name.split(".")
    part, layer = words[0], words[-2] if len(words) > 1 else ""
    rows = torch.arange(num_rows)
    if (part, layer) == ("box_head", "classifier"):
        return rows[:, None] if num_rows == num_classes + 1 else None
    if (part, layer) == ("box_head", "regressor"):
        return rows.view(-1, 4) if num_rows == 4 * num_classes and not is_agnostic else None
    if (part, layer) == ("mask_head", "predictor"):
        return rows[:, None] if num_rows == num_classes else None
    if (part, layer) == ("retina_head", "classifier") and num_rows % num_classes == 0:
        return rows.view(-1, num_classes).t()  # the class runs fastest, within an anchor shape
    return None


def carry_classes(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source_classes: Sequence[str],
    classes: Sequence[str],
    *,
    is_agnostic: bool = False,
) -> tuple[Mapping[str, Tensor], int]:
    """Move the classes of named tensors to a detector's own labels, by name.

    Args:
        own: the detector's state; its rows stay where the source does not have a class.
        tensors: of the source, by the same names.
        source_classes: names in the order of the source's labels.
        classes: K names in the order of the detector's labels.
        is_agnostic: the detector or the source has one box for all classes of a region.

    Returns:
        The tensors, those with class rows in the detector's shape, and how many classes both have.
        What has not the rows that its number of classes calls for is left as it is.
    """
    place = {name_key(name): label for label, name in enumerate(source_classes)}
    place |= {name: label for label, name in enumerate(source_classes)}
    places = [place.get(name, place.get(name_key(name))) for name in classes]
    kept = [label for label, found in enumerate(places) if found is not None]
    taken = [found for found in places if found is not None]
    carried = {}
    for name in tensors:
        if name not in own or not own[name].ndim:
            continue
        rows = class_rows(name, len(own[name]), len(classes), is_agnostic=is_agnostic)
        if rows is None or not (tensor := tensors[name]).ndim:
            continue
        if tensor.shape[1:] != own[name].shape[1:]:
            continue
        source_rows = class_rows(name, len(tensor), len(source_classes))
        if source_rows is None or rows.shape[1] != source_rows.shape[1]:
            continue
        has_background = len(rows) > len(classes)
        to_rows = rows[kept + [len(classes)] * has_background].flatten()
        from_rows = source_rows[taken + [len(source_classes)] * has_background].flatten()
        carried[name] = own[name].clone()
        carried[name][to_rows] = tensor[from_rows].to(own[name])
    return Unread.changed(tensors, carried), len(kept)
