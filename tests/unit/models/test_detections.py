"""Which candidates are reported, with hard and soft NMS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from bigdet.models.heads.detections import FlatDetections, best_detections

# Two boxes of 10 x 10 that share 8 x 10 (IoU 80 / 120 = 2/3), and one far away.
A, B, C = [0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [30.0, 30.0, 40.0, 40.0]
SIZES = torch.tensor([[50, 50], [50, 50]])


@dataclass(frozen=True)
class Settings:
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections_per_image: int = 100
    nms: str = "hard"
    nms_sigma: float = 0.5


def found_of(rows: list[tuple[int, list[float], float, int]], settings: object) -> list[object]:
    """Image, first edge, score and label of what is reported."""
    images, boxes, scores, labels = zip(*rows, strict=True)
    candidates = FlatDetections(
        torch.tensor(images), torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels)
    )
    found = best_detections(candidates, SIZES, 2, settings)
    edges, scores = found.boxes[:, 0].tolist(), [round(s, 4) for s in found.scores.tolist()]
    return list(zip(found.images.tolist(), edges, scores, found.labels.tolist(), strict=True))


ROWS = [(0, A, 0.9, 0), (0, B, 0.6, 0), (0, C, 0.5, 0), (0, B, 0.3, 1), (1, B, 0.8, 0)]


def test_hard_nms_drops_a_near_duplicate_of_its_class_and_image() -> None:
    kept = [(0, 0.0, 0.9, 0), (0, 30.0, 0.5, 0), (0, 2.0, 0.3, 1), (1, 2.0, 0.8, 0)]
    assert found_of(ROWS, Settings()) == kept
    older = SimpleNamespace(score_threshold=0.05, nms_iou=0.5, detections_per_image=100)
    assert found_of(ROWS, older) == kept  # a user's own settings


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        (Settings(nms="linear"), 0.6 * (1 - 2 / 3)),
        (Settings(nms="gaussian"), 0.6 * math.exp(-((2 / 3) ** 2) / 0.5)),
        (Settings(nms="gaussian", nms_sigma=0.2), 0.6 * math.exp(-((2 / 3) ** 2) / 0.2)),
    ],
)
def test_soft_nms_lowers_its_score_by_class_and_image(settings: Settings, score: float) -> None:
    rest = [(0, 30.0, 0.5, 0), (0, 2.0, 0.3, 1), (0, 2.0, round(score, 4), 0)]
    rest.sort(key=lambda row: -row[2])
    assert found_of(ROWS, settings) == [(0, 0.0, 0.9, 0), *rest, (1, 2.0, 0.8, 0)]


def test_scores_that_fall_to_the_threshold_are_not_reported() -> None:
    settings = Settings(nms="linear", score_threshold=0.25)
    assert (0, 2.0, 0.2, 0) not in found_of(ROWS, settings)
    assert len(found_of(ROWS, settings)) == 4


def test_a_limit_takes_the_best_after_scores_fell() -> None:
    found = found_of(ROWS, Settings(nms="linear", detections_per_image=2))
    assert found == [(0, 0.0, 0.9, 0), (0, 30.0, 0.5, 0), (1, 2.0, 0.8, 0)]


def test_no_candidates() -> None:
    nothing = FlatDetections(
        torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
    )  # fmt: skip
    assert len(best_detections(nothing, SIZES, 2, Settings(nms="linear")).boxes) == 0
