"""The configs, fragments and sweeps that come with bigdet: found by name, from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

SHIPPED = (Path(__file__).parents[1] / "configs").resolve()
"""The top folder ``configs`` of the sources, or its copy in an installed package."""

SUFFIX = ".yaml"


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """Return the file of a name or path: a local one, else one that comes with bigdet.

    ``quickstart``, ``quickstart.yaml`` and ``configs/quickstart.yaml`` are the same file of bigdet.

    Args:
        name: path or name; ``.yaml`` may be left out.
        folder: what a relative path is relative to. None: the current folder.

    Returns:
        The local path itself if there is no such file.
    """
    local = Path(name) if folder is None else folder / name
    candidates = [local, Path(f"{local}{SUFFIX}")]
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        candidates.append(SHIPPED / f"{_plain(name)}{SUFFIX}")
    return next((file for file in candidates if file.is_file()), local)


def list_shipped() -> Iterator[tuple[str, str]]:
    """Yield the name and the first line of comment of each file that comes with bigdet."""
    for file in sorted(SHIPPED.rglob(f"*{SUFFIX}"), key=lambda file: (len(file.parts), file)):
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        yield _plain(file.relative_to(SHIPPED)), first if first.endswith(".") else f"{first} ..."


def nearest_shipped(path: Path) -> str | None:
    """Return the name nearest to a misspelled one, if any is near."""
    names = [_plain(file.relative_to(SHIPPED)) for file in SHIPPED.rglob(f"*{SUFFIX}")]
    typed = _plain(path) if not path.is_absolute() else path.stem
    return next(iter(difflib.get_close_matches(typed, names, n=1)), None)


def _plain(name: str | Path) -> str:
    """Return a name without ``configs/`` before it and ``.yaml`` behind it."""
    return Path(name).as_posix().removeprefix("configs/").removesuffix(SUFFIX)
