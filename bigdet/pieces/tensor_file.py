"""safetensors files, written one tensor at a time and read by ranges of numbers.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the
header (JSON: type, shape and place of each tensor), then the numbers. safetensors' own library
writes only tensors that are all in memory, and reads ranges of rows, not of numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 1 << 30
"""Bytes; a longer one is no header."""


@dataclass(frozen=True)
class Spec:
    """Type (a key of `DTYPES`) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in memory."""
        return DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """How long it is in a file."""
        return self.count * self.torch_dtype.itemsize


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file, on the disk when this returns; return its SHA-256.

    Args:
        path: of the file.
        specs: of all tensors, by name.
        tensors: on the CPU, in the order of ``specs``; each is let go of before the next is taken.
        metadata: of the file.

    Raises:
        OSError: the file cannot be written; what was written of it is gone.
    """
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for block in _blocks(specs, tensors, metadata or {}):
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)  # on a full disk its bytes are missed
        raise
    return digest.hexdigest()


def write_state(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, which are on the CPU; see `write_tensors`.

    safetensors' own ``save_file`` makes files that only their owner can read, whatever the umask.

    Raises:
        OSError: the file cannot be written, with the path and what to do.
    """
    specs = {name: Spec(NAMES[value.dtype], tuple(value.shape)) for name, value in state.items()}
    try:
        write_tensors(path, specs, state.values(), metadata)
    except OSError as error:
        problem = error.strerror or error
        raise OSError(
            f"{path}: cannot be written: {problem}. Make room for it, or give another place."
        ) from error


def _blocks(
    specs: Mapping[str, Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> Iterable[bytes | memoryview]:
    """Yield the bytes of a file in order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        header[name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for spec, tensor in zip(specs.values(), tensors, strict=True):
        assert tensor.dtype == spec.torch_dtype, (tensor.dtype, spec)
        assert tensor.numel() == spec.count, (tensor.shape, spec)
        yield _bytes_of(tensor.detach().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """Give the memory of a contiguous tensor on the CPU."""
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file that is read by ranges of numbers; open only while it is read.

    As a mapping it reads each tensor anew.

    Attributes:
        path: of the file.
        specs: of all tensors, by name.
        metadata: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: the file is no safetensors file, or cut short.
        """
        self.path = path
        self._bytes: Tensor | None = None
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > MAX_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
                size = file.seek(0, os.SEEK_END)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.specs = {
                name: Spec(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
            }
            self._begins = {
                name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()
            }
            ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(
                f"{path}: cannot be read as safetensors ({error}). If it was cut off, copy "
                f"it again."
            ) from error
        if (expected := max(ends, default=8 + length)) != size:
            raise ValueError(
                f"{path}: cannot be read as safetensors (has {size} bytes, expected {expected}). "
                f"If it was cut off, copy it again."
            )

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.read(name).view(self.specs[name].shape)

    def mapped(self, name: str) -> Tensor:
        """Give a tensor whose numbers are read when they are used, and can leave the memory again.

        The file must not be changed as long as it is in use.
        """
        spec, begin = self.specs[name], self._begins[name]
        if not spec.count or begin % spec.torch_dtype.itemsize:  # which others may write
            return self[name]
        if self._bytes is None:
            size = self.path.stat().st_size
            self._bytes = torch.from_file(str(self.path), size=size, dtype=torch.uint8)
        return self._bytes[begin : begin + spec.num_bytes].view(spec.torch_dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.specs)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.specs)

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read consecutive numbers of a flattened tensor, by default all that follow ``first``."""
        spec = self.specs[name]
        count = spec.count - first if count is None else count
        assert 0 <= first <= first + count <= spec.count, (name, spec, first, count)
        numbers = torch.empty(count, dtype=spec.torch_dtype)
        with self.path.open("rb") as file:
            file.seek(self._begins[name] + first * numbers.itemsize)
            num_read = file.readinto(_bytes_of(numbers)) if count else 0
        if num_read != numbers.nbytes:
            raise ValueError(f"{self.path}: was cut short while it was read.")
        return numbers
