"""Detect objects in pictures: drawn copies and ``detections.json``.

    python -m bigdet.predict runs/quickstart photo.jpg holiday/ --out detected
    python -m bigdet.predict runs/x/model.safetensors holiday/ --out detected --score 0.3

``detections.json`` is in the COCO results format, with the file name beside a running number as
``image_id``; it has every detection that the model reports, the pictures those from --score on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bigdet import distributed
from bigdet.commands import run_command
from bigdet.drawing import draw_detections
from bigdet.evaluation.detections import Result
from bigdet.evaluation.predict import coco_results
from bigdet.log import setup_logging
from bigdet.models.detector import Detector
from bigdet.models.weights import load_detector

logger = logging.getLogger("bigdet.predict")  # __name__ is __main__ here

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
"""Files of a folder that are taken for pictures; a file given by name may have any."""


def main(arguments: Sequence[str]) -> int:
    """Detect, draw and write; return the exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0)
    paths = find_images(options.images)
    check_output(options.out, paths)
    detector = load_detector(options.model).to(distributed.device())
    if not 0 <= options.score <= 1:
        raise ValueError(f"--score: found {options.score}, expected a score in [0, 1].")
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    broken = 0
    for number, (path, name) in enumerate(zip(paths, picture_names(paths), strict=True), start=1):
        try:
            image = load_image(path)
        except ValueError as error:
            broken += 1
            logger.error("%s: %s; left out", path, error)
            continue
        found = predict_image(detector, image, number, path, options.score, options.out / name)
        shown = sum(result["score"] >= options.score for result in found)
        logger.info("%d of %d: %s: %d objects", number, len(paths), path, shown)
        results += found
    (options.out / "detections.json").write_text(json.dumps(results), encoding="utf-8")
    logger.info("%d pictures and detections.json are in %s", len(paths) - broken, options.out)
    if broken:
        raise ValueError(
            f"{broken} of {len(paths)} images could not be read (the log names each); the other "
            f"{len(paths) - broken} are in {options.out}. Repair them, or leave them out."
        )
    return 0


def predict_image(
    detector: Detector,
    image: NDArray[np.uint8],
    number: int,
    path: Path,
    score_threshold: float,
    picture: Path,
) -> list[Result]:
    """Detect the objects on one image, write the drawn picture, and return the COCO results.

    Args:
        detector: on any device.
        image: ``(H, W, 3)`` uint8 RGB.
        number: stands for an image id in the results.
        path: of the image, for the results.
        score_threshold: of the drawn detections.
        picture: the file to write.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    detections = detector.predict([pixels])[0].to(torch.device("cpu"))
    drawn = draw_detections(image, detections, detector.categories, score_threshold)
    drawn.save(picture, quality=90)
    ids = [category["id"] for category in detector.categories]
    size = (image.shape[0], image.shape[1])
    found = coco_results(detections, number, size, ids)
    return [result | {"file_name": str(path)} for result in found]


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that are meant: those given, and the pictures in the folders given."""
    paths: list[Path] = []
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given}: does not exist. Give pictures, or folders of pictures.")
        if given.is_file():
            paths.append(given)
            continue
        inside = sorted(path for path in given.iterdir() if path.suffix.lower() in SUFFIXES)
        if not inside:
            raise ValueError(
                f"{given}: the folder holds no picture ({', '.join(sorted(SUFFIXES))}; folders in "
                "it are not searched). Give the folder in which they lie."
            )
        paths += inside
    return list(dict.fromkeys(paths))  # one given twice is done once


def check_output(out: Path, paths: Sequence[Path]) -> None:
    """Raise ``ValueError`` where drawn pictures would replace the images themselves."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file. Give a folder for the pictures.")
    for path in paths:
        if path.resolve().parent == out.resolve():
            raise ValueError(
                f"--out {out}: {path} lies there and could be written over. Give another folder."
            )


def picture_names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a file name for each drawn picture; equal stems get a number."""
    taken: set[str] = set()
    for path in paths:
        name, count = path.stem, 1
        while name in taken:
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name)
        yield f"{name}.jpg"


def load_image(path: Path) -> NDArray[np.uint8]:
    """Return a picture as people see it: ``(H, W, 3)`` uint8 RGB, turned as EXIF says.

    Transparency is dropped, 16 bits per channel become 8.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits of gray, in whichever of Pillow's modes
                gray = np.asarray(image).astype(np.float64) / 257.0  # 65535 becomes 255
                image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
            if "transparency" in image.info:  # straight to RGB, Pillow would warn
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bigdet.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    parser.add_argument("images", type=Path, nargs="+", help="pictures or folders of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score drawn (0.5)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
