"""The numbers of pycocotools."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def pycocotools_stats(truth, results, kind):
    """Return ``COCOeval.stats`` and the AP of each category by its id; None for its -1.

    Args:
        truth: the content of a COCO file.
        results: COCO results. The area of a mask is that of its pixels, as in the COCO server;
            pycocotools would take that of a box in the result.
        kind: ``bbox``, ``segm`` or ``keypoints``.
    """
    annotations = [truth_of(annotation, kind) for annotation in truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        gt, found = COCO(), COCO()
        gt.dataset = {**truth, "annotations": annotations}
        gt.createIndex()
        if results:
            key = "segmentation" if kind == "segm" else kind
            keys = ("image_id", "category_id", "score", key)
            found = gt.loadRes([{key: result[key] for key in keys} for result in results])
        evaluation = COCOeval(gt, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [None if number < 0 else float(number) for number in evaluation.stats]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, categories)
    aps = {}
    for place, number in enumerate(evaluation.params.catIds):
        defined = precision[:, :, place][precision[:, :, place] > -1]
        aps[number] = float(defined.mean()) if defined.size else None
    return stats, aps


def truth_of(annotation, kind):
    """Copy an annotation, which pycocotools writes into, with what this kind needs of it."""
    if kind == "segm" and "segmentation" not in annotation:
        x, y, width, height = annotation["bbox"]
        right, bottom = x + width, y + height
        corners = [[x, y, right, y, right, bottom, x, bottom]]
        return {**annotation, "segmentation": corners, "iscrowd": 1}
    if kind == "keypoints":
        points = annotation.get("keypoints", [0] * 51)
        num_labeled = sum(visibility > 0 for visibility in points[2::3])
        return {**annotation, "keypoints": points, "num_keypoints": num_labeled}
    return dict(annotation)
