"""Find and name weights that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_NAMED = 3


def describe_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Say which tensors hold NaN or infinities; nothing where none does.

    Args:
        tensors: by name, of any shape and type.

    Returns:
        Such as ``2 of 60 tensors are not finite: fpn.bias (1 of 64 numbers), rpn.bias (3 of 3)``.
    """
    bad = {name: tensor for name, tensor in tensors.items() if not is_finite(tensor)}
    if not bad:
        return ""
    named = [
        f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers)"
        for name, tensor in list(bad.items())[:_NAMED]
    ]
    are = "is" if len(bad) == 1 else "are"
    more = ", ..." if len(bad) > _NAMED else ""
    return f"{len(bad)} of {len(tensors)} tensors {are} not finite: {', '.join(named)}{more}"


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinities."""
    if not tensor.is_floating_point() or tensor.is_meta:  # meta tensors have no values
        return True
    # The sum alone is several times as fast, but may overflow.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())
