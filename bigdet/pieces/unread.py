"""Named tensors that are read when they are asked for, so that all of them need no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Unread(Mapping[str, Tensor]):
    """Tensors by name, each read anew whenever it is asked for."""

    def __init__(self, read: Callable[[str], Tensor], names: Iterable[str]) -> None:
        """Take the names, and what reads the tensor of one."""
        self._read, self._names = read, dict.fromkeys(names)

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Unread:
        """Give tensors other names: from each new one to that of before."""
        return cls(lambda name: tensors[names[name]], names)

    @classmethod
    def changed(cls, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Unread:
        """Put others in place of tensors, or next to them."""
        return cls(
            lambda name: others[name] if name in others else tensors[name], [*tensors, *others]
        )

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._names)
