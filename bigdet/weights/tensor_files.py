"""Weights files that others wrote, read without running what may be in them.

safetensors; torch's files, with ``weights_only``, or where those of mmdetection hold notes of
training next to the weights, with these notes left out; pickles of Detectron and detectron2, in
which nothing but arrays, text and plain containers is admitted. What the names mean is left to
``backbone_names.py`` and ``whole_detectors.py``.
"""

from __future__ import annotations

import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdet.models.weights import read_safetensors
from bigdet.weights.moving_averages import NESTS, choose_weights


def read_tensors(file: Path, ema: bool | None = None) -> tuple[dict[str, Tensor], list[str] | None]:
    """Read the named tensors of a file in any of the formats, onto the CPU.

    Args:
        file: to read.
        ema: which weights of a file that has plain ones and their moving average; None: the usual.

    Returns:
        The tensors, and the names of the classes where mmdetection wrote them.

    Raises:
        ValueError: the file is cut, of another format, holds code, or not what ``ema`` asks for.
    """
    if file.suffix not in _READERS:
        raise ValueError(
            f"{file}: found the ending {file.suffix!r}, expected one of {', '.join(_READERS)}."
        )
    if not file.is_file():
        raise ValueError(f"{file}: found no such file. Give the file of the weights.")
    content: Any = _READERS[file.suffix](file)
    tensors = choose_weights(content, ema, file)
    if not tensors:
        raise ValueError(
            f"{file}: found no named tensors in it, expected them at the top or under one of "
            f"{', '.join(NESTS)}."
        )
    return tensors, _class_names(content)


def _class_names(content: Any) -> list[str] | None:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    for key in ("dataset_meta", "CLASSES", "classes"):
        if isinstance(meta, Mapping) and key in meta:
            meta = meta[key]
    is_list = isinstance(meta, list | tuple) and all(isinstance(name, str) for name in meta)
    return list(meta) if is_list and meta else None


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays in dicts and lists; any other name in it is refused.

    Not even numpy's own functions are called, whose states are trusted with raw memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the file means; called before anything of it could run."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


class _ArrayClass:
    """Takes the place of ``numpy.ndarray``, which pickles name."""


class _Dtype:
    """Takes the place of ``numpy.dtype``: numbers only."""

    def __init__(self, code: object, *_flags: object) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[biuf]\d", code)):
            raise pickle.UnpicklingError(f"it asks for an array of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder("<" if state[1] == "|" else state[1])

    def decode(self, content: str | bytes) -> np.ndarray[Any, Any]:
        """Return the numbers of raw bytes in this machine's order; Python 2 wrote bytes as text."""
        raw = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(raw, self.dtype).astype(self.dtype.newbyteorder("="))


class _Array:
    """Takes the place of numpy's ``_reconstruct``: an array that its state fills."""

    def __init__(self, *_kind_shape_type: object) -> None:
        self.values: np.ndarray[Any, Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self.values = dtype.decode(content).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(
    content: bytes, dtype: _Dtype, shape: Any, order: Any, *_axis_order: object
) -> _Array:
    """Take the place of what newer pickles call instead of ``_reconstruct``."""
    array = _Array()
    array.values = dtype.decode(bytes(content)).reshape(shape, order=order)
    return array


def _new_scalar(dtype: _Dtype, content: str | bytes) -> Any:
    return dtype.decode(content)[0]


def _encode(text: str, encoding: object) -> bytes:
    """Take the place of ``_codecs.encode``: how old pickles write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Take the place of ``bytes``, which old pickles call for an empty array."""
    return b""


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.{name}", function): stand_in
        for core in ("core", "_core")
        for name, function, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _new_scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


def _with_tensors(content: Any) -> Any:
    """Put tensors in the places of arrays, in dicts of dicts."""
    if isinstance(content, Mapping):
        return {key: _with_tensors(value) for key, value in content.items()}
    return torch.from_numpy(content.values) if isinstance(content, _Array) else content


def _read_pickle(file: Path) -> Any:
    try:
        with file.open("rb") as opened:
            content = _ArraysOnly(opened, encoding="latin1").load()  # Detectron's are Python 2's
            return _with_tensors(content)
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())  # some are of two lines
        raise ValueError(
            f"{file}: cannot be read as a pickle of arrays ({reason}). Nothing in it was run. "
            f"Expected the weights of Detectron or detectron2: names and numpy arrays. If "
            f"it was cut off, copy it again."
        ) from error


class _Note:
    """Takes the place of an object that is no weight; accepts any arguments and does nothing."""

    def __new__(cls, *_arguments: object, **_named: object) -> _Note:
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_named: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _value: object) -> None:
        pass

    def extend(self, _values: object) -> None:
        pass


class _TensorsOnly(pickle.Unpickler):
    """Reads tensors; notes of others' runs become nothing, any other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the file means; called before anything of it could run."""
        if (module, name) in _OF_TENSORS:
            return _OF_TENSORS[module, name]
        if module.partition(".")[0] in _OF_NOTES or (module, name) in _PLAIN:
            return _Note
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_OF_TENSORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_OF_NOTES = ("mmengine", "mmcv", "mmdet", "numpy", "addict", "pathlib", "datetime")
_PLAIN = {
    ("builtins", "set"), ("builtins", "slice"), ("__builtin__", "set"),
    ("collections", "defaultdict"), ("collections", "deque"), ("_codecs", "encode"),
    ("argparse", "Namespace"),
}  # fmt: skip
_PICKLES = types.SimpleNamespace(
    Unpickler=_TensorsOnly,
    load=lambda file, **options: _TensorsOnly(file, **options).load(),
    __name__="weights without code",
)
"""What torch takes for the ``pickle`` module."""


def _load_torch(file: Path) -> Any:
    # Mapped, numbers are read when they are used; files of before torch 1.6 cannot be.
    load = partial(torch.load, file, map_location="cpu", mmap=zipfile.is_zipfile(file))
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError:
        return load(weights_only=False, pickle_module=_PICKLES)


def _read_torch(file: Path) -> Any:
    try:
        return _load_torch(file)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{file}: torch cannot read it as weights alone ({reason}). Files with other objects "
            f"can run code and are refused: where you trust it, write its tensors into a "
            f".safetensors file. If it was cut off, copy it again."
        ) from error


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": lambda file: read_safetensors(file)[0],
    ".pkl": _read_pickle,
    **dict.fromkeys((".pth", ".pt", ".bin", ".th", ".tar"), _read_torch),
}
