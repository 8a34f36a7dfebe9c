"""Pictures of an evaluation: the images with the most and the fewest mistakes.

They are drawn from the detections that were scored, so the model runs only once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.data.examples.samples import load_sample
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.coco_metrics import category_ids, never_counts
from bigdet.evaluation.detections import DetectionTable, Kind, Result, read_detections
from bigdet.evaluation.error_types import find_cover, match_all
from bigdet.evaluation.ground_truth import GroundTruth, read_ground_truth
from bigdet.evaluation.matching import NOTHING
from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.pictures.drawing import SURE_LOGIT, draw
from bigdet.run_dir import RunDir

MIN_SCORE = 0.5  # detections below it are neither drawn nor judged
PIXEL_CENTER = 0.5  # COCO's keypoints are relative to the center of the first pixel


@dataclass(frozen=True)
class Verdict:
    """How well the objects of one image were found, by boxes at an IoU of 0.5.

    Attributes:
        image_id: the image's id in the data set.
        num_right: detections that find an object of their class.
        num_missed: objects that no detection finds.
        num_wrong: detections that find no object, without those in crowds.
    """

    image_id: int
    num_right: int
    num_missed: int
    num_wrong: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.num_right / (2 * self.num_right + self.num_missed + self.num_wrong)


def judge_images(
    truth: GroundTruth, found: DetectionTable, max_detections: int = MAX_DETECTIONS
) -> list[Verdict]:
    """Judge every image with objects or detections.

    Args:
        truth: the objects.
        found: the detections, with boxes; scores below ``MIN_SCORE`` do not count.
        max_detections: how many of an image count, the best first; at least 100.
    """
    cover = find_cover(truth, found, "bbox", max(MAX_DETECTIONS, max_detections))
    finds = match_all(truth, cover, same_class=True, min_score=MIN_SCORE)
    is_right = finds != NOTHING
    is_wrong = (cover.scores >= MIN_SCORE) & ~is_right & ~cover.in_crowd
    is_missed = ~never_counts(truth, "bbox")
    is_missed[finds[is_right]] = False
    count = len(truth.image_ids)
    right, wrong, missed = (
        np.bincount(images, minlength=count).tolist()
        for images in (cover.images[is_right], cover.images[is_wrong], truth.images[is_missed])
    )
    verdicts = map(Verdict, truth.image_ids.tolist(), right, missed, wrong)
    return [each for each in verdicts if each.num_right + each.num_missed + each.num_wrong]


def pick(verdicts: Sequence[Verdict], count: int) -> list[tuple[str, Verdict]]:
    """Choose ``count`` images: ``worst``, the worst first, then as many ``best``, best first."""
    by_quality = sorted(verdicts, key=lambda v: (v.f1, -v.num_missed - v.num_wrong, v.image_id))
    worst = by_quality[: -(-count // 2)]
    others = by_quality[len(worst) :]
    best = sorted(others, key=lambda v: (-v.f1, -v.num_right, v.image_id))[: count // 2]
    return [("worst", each) for each in worst] + [("best", each) for each in best]


def write_pictures(
    shards: ShardSet,
    results: Iterable[Result],
    kinds: Sequence[Kind],
    count: int,
    run_dir: RunDir,
    phase: str,
    max_detections: int = MAX_DETECTIONS,
    *,
    has_own_set: bool = False,
) -> None:
    """Draw the worst and the best images, ground truth and detections, into the run folder.

    Detections become ``pictures/PHASE-KEY.jpg``, the ground truth ``pictures/truth/KEY.jpg``, and
    ``pictures/PHASE.json`` lists them.

    Args:
        shards: the validation set.
        results: detections of all its images; iterated more than once.
        kinds: the kinds that were scored: masks and keypoints are drawn if they are among them.
        count: number of images to draw.
        run_dir: where the pictures go.
        phase: part of their names.
        max_detections: how many of an image count, the best first.
        has_own_set: the set is of this phase alone, whose keys other phases may use too: the
            ground truth becomes ``pictures/truth/PHASE-KEY.jpg``.
    """
    truth = read_ground_truth(shards, "segm" in kinds, "keypoints" in kinds)
    found = read_detections(results, truth, ["bbox"])
    chosen = pick(judge_images(truth, found, max_detections), count)
    of_image = results_of(results, {verdict.image_id for _, verdict in chosen})
    (run_dir.pictures / "truth").mkdir(parents=True, exist_ok=True)
    for old in run_dir.pictures.glob(f"{phase}-*.jpg"):
        old.unlink()  # of an evaluation that was interrupted
    listed = []
    for among, verdict in chosen:
        row = int(np.flatnonzero(shards.index["image_id"] == verdict.image_id)[0])
        pixels = read_pixels(shards, row)
        key = shards.key(row)
        own = f"{phase}-{key}.jpg"
        names = {"found": own, "truth": f"truth/{own if has_own_set else f'{key}.jpg'}"}
        drawn = draw_results(pixels, of_image[verdict.image_id], shards)
        drawn.save(run_dir.pictures / names["found"], quality=90)
        drawn = draw_truth(pixels, truth, verdict.image_id)
        drawn.save(run_dir.pictures / names["truth"], quality=90)
        listed.append({"among": among, **asdict(verdict), **names})
    write_text(run_dir.picture_list(phase), to_json(listed, indent=1))


def read_pixels(shards: ShardSet, row: int) -> NDArray[np.uint8]:
    """Return an image of a shard set: ``(H, W, 3)`` uint8 RGB."""
    pixels: NDArray[np.uint8] = load_sample(shards, row)[0].permute(1, 2, 0).numpy()
    return pixels


def results_of(results: Iterable[Result], image_ids: Collection[int]) -> dict[int, list[Result]]:
    """Return the results of some images, by image id, without scores below ``MIN_SCORE``."""
    found: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        if result["image_id"] in image_ids and result["score"] >= MIN_SCORE:
            found[result["image_id"]].append(result)
    return found


def draw_results(
    pixels: NDArray[np.uint8], results: Sequence[Result], shards: ShardSet
) -> Image.Image:
    """Draw the detections of one image.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
        results: in the COCO results format, best first.
        shards: the shard set of the image, for its categories.
    """
    label_of = {number: label for label, number in enumerate(category_ids(shards))}
    labels = [label_of[result["category_id"]] for result in results]
    boxes = np.array([result["bbox"] for result in results], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks, keypoints = None, None
    if results and "segmentation" in results[0]:
        masks = [coco_mask.decode(result["segmentation"]).astype(bool) for result in results]
    if results and "keypoints" in results[0]:
        points = np.array([result["keypoints"] for result in results], dtype=np.float64)
        shift = (PIXEL_CENTER, PIXEL_CENTER, -SURE_LOGIT)
        keypoints = points.reshape(len(results), -1, 3) + shift
    categories = shards.categories
    return draw(
        pixels,
        boxes,
        [categories[label].name for label in labels],
        labels,
        [result["score"] for result in results],
        masks,
        keypoints,
        [categories[label].skeleton or [] for label in labels],
    )


def draw_truth(pixels: NDArray[np.uint8], truth: GroundTruth, image_id: int) -> Image.Image:
    """Draw the objects of one image, with masks and keypoints if the ground truth has them.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
        truth: of the whole set.
        image_id: the image's id in the data set.
    """
    place = int(np.searchsorted(truth.image_ids, image_id))
    rows = np.flatnonzero(truth.images == place)
    labels = truth.labels[rows].tolist()
    boxes = truth.boxes[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    masks: list[Any] | None = None
    if truth.masks:
        size = list(pixels.shape[:2])
        masks = [
            coco_mask.decode({"size": size, "counts": truth.masks[row]}).astype(bool)
            if truth.has_mask[row]
            else None
            for row in rows.tolist()
        ]
    keypoints = None
    if truth.keypoints.shape[1]:
        keypoints = truth.keypoints[rows] + (PIXEL_CENTER, PIXEL_CENTER, 0.0)
    names = [
        truth.categories[label].name + (" (crowd)" if is_crowd else "")
        for label, is_crowd in zip(labels, truth.is_crowd[rows].tolist(), strict=True)
    ]
    skeletons = [truth.categories[label].skeleton or [] for label in labels]
    return draw(pixels, boxes, names, labels, None, masks, keypoints, skeletons)
