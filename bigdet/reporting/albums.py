"""The pictures of runs as data URLs for a page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from bigdet.reporting.runs import Groups, Run

LONG_SIDE = 900  # pixels, as wide as a page shows them
QUALITY = 75  # WebP: text stays legible, 30 to 80 kB each


def read_albums(groups: Groups) -> list[dict[str, Any]]:
    """Return the pictures of the last phase of the first run with pictures of each group."""
    albums = []
    for name, runs in groups.items():
        found = next((album for run in runs if (album := _pictures(run))), None)
        if found:
            albums.append({"name": name, "pictures": found})
    return albums


def _pictures(run: Run) -> list[dict[str, str]]:
    for phase in reversed(run.phases):
        file = run.run_dir.picture_list(phase)
        if not file.is_file():
            continue
        try:
            return [
                {
                    "truth": _address(file.parent / entry["truth"]),
                    "found": _address(file.parent / entry["found"]),
                    "text": f"{phase}, one of the {entry['among']}: image {entry['image_id']}, "
                    f"{entry['num_right']} found, {entry['num_missed']} missed, "
                    f"{entry['num_wrong']} wrong",
                }
                for entry in json.loads(file.read_text(encoding="utf-8"))
            ]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"{file}: not a list of existing pictures ({type(error).__name__}: {error}). "
                f"Remove the file to report without pictures."
            ) from error
    return []


def _address(file: Path) -> str:
    """Return a picture, made smaller, as a data URL."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
