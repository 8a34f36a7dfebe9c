"""The configs, fragments and sweeps that come with bigdet: found by name, from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

SHIPPED = (Path(__file__).parents[1] / "configs").resolve()
"""The top folder ``configs`` of the sources, or its copy beside an installed package."""

SUFFIX = ".yaml"


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """Return the file that a name stands for: a local one, else one that comes with bigdet.

    Of those that come with it, ``quickstart``, ``quickstart.yaml`` and ``configs/quickstart.yaml``
    are the same one.

    Args:
        name: path or name; ``.yaml`` may be left out.
        folder: a relative path begins there. None: in the current folder.

    Returns:
        The path itself where there is no such file.
    """
    local = Path(name) if folder is None else folder / name
    candidates = [local, Path(f"{local}{SUFFIX}")]
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        candidates.append(SHIPPED / f"{_plain(name)}{SUFFIX}")
    return next((file for file in candidates if file.is_file()), local)


def list_shipped() -> Iterator[tuple[str, str]]:
    """Yield name and first line of comment of each file that comes with bigdet."""
    for file in sorted(SHIPPED.rglob(f"*{SUFFIX}"), key=lambda file: (len(file.parts), file)):
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        yield _plain(file.relative_to(SHIPPED)), first if first.endswith(".") else f"{first} ..."


def nearest_shipped(path: Path) -> str | None:
    """Return the name that a misspelled one is nearest to."""
    names = [_plain(file.relative_to(SHIPPED)) for file in SHIPPED.rglob(f"*{SUFFIX}")]
    typed = _plain(path) if not path.is_absolute() else path.stem
    return next(iter(difflib.get_close_matches(typed, names, n=1)), None)


def _plain(name: str | Path) -> str:
    """Return a name without ``configs/`` before it and ``.yaml`` behind it."""
    return Path(name).as_posix().removeprefix("configs/").removesuffix(SUFFIX)
