from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bigdet.config.model_schema import ModelConfig, RoiConfig, RpnConfig
from bigdet.config.schema import TtaConfig
from bigdet.data.manifest import Category
from bigdet.evaluation.predict import predict_split
from bigdet.evaluation.tta import AugmentedDetector, View, mirror, vote
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector, collate_images
from bigdet.models.heads.detections import FlatDetections
from bigdet.structures import Batch

CONFIG = ModelConfig(
    detector="mask_rcnn",
    backbone="resnet10",
    width=16,
    fc_width=32,
    rpn=RpnConfig(anchor_sizes=[12, 24, 48, 96, 192], test_proposals=50),
    roi=RoiConfig(score_threshold=0.01, detections_per_image=20),
)
ONE = TtaConfig(flip=False, scales=[64], cap=128, vote_iou=None)


class Bright(Detector):
    """Finds the one bright rectangle of each image, and how bright its left and right half are.

    What it says of a mirrored image is the mirror of what it says of the image.
    """

    num_classes = 2
    config = CONFIG

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.passes = 0

    def features(self, batch: Batch) -> Tensor:
        self.passes += 1
        return batch.images[:, 0].float()

    def find(self, features: Tensor, batch: Batch) -> FlatDetections:
        boxes = []
        for image in features:
            ys, xs = (image > 60).nonzero(as_tuple=True)
            boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        number = len(features)
        return FlatDetections(
            torch.arange(number),
            torch.tensor(boxes).float(),
            torch.full((number,), 0.75),
            torch.ones(number, dtype=torch.int64),
        )

    def maps(self, features: Tensor, found: FlatDetections) -> dict[str, Tensor]:
        halves = []
        for image, box in zip(
            found.images.tolist(), found.boxes.round().int().tolist(), strict=True
        ):
            x0, y0, x1, y1 = box
            middle = (x0 + x1) // 2
            crops = features[image, y0:y1, x0:middle], features[image, y0:y1, middle:x1]
            halves.append(torch.stack([crop.mean() for crop in crops]) / 200)
        return {"masks": torch.stack(halves)[:, None].expand(-1, 2, -1)}

    has_maps = True
    test_settings = RoiConfig()


def two_images() -> Batch:
    """A bright rectangle on each, its left half brighter than its right."""
    images = torch.zeros(2, 3, 80, 96, dtype=torch.uint8)
    images[0, :, 10:30, 8:28] = 100
    images[0, :, 10:30, 8:18] = 200
    images[1, :, 40:60, 40:60] = 100
    images[1, :, 40:60, 40:50] = 200
    batch = collate_images([images[0], images[1, :, :64, :64]], (1, 1))
    sizes = torch.tensor([[80, 96], [64, 64]])
    return replace(batch, images=images, image_sizes=sizes, original_sizes=sizes)


def test_a_mirrored_pair_of_views_says_what_one_says() -> None:
    # At twice the size: 80x96 and 64x64 become 128x153 and 128x128.
    detector = Bright().eval()
    batch = two_images()
    config = TtaConfig(flip=True, scales=[128], cap=256, vote_iou=0.9)
    found = AugmentedDetector(detector, config, [])(batch)
    assert detector.passes == 4  # two views for boxes, two for masks
    for one, expected in zip(found, ([8, 10, 28, 30], [40, 40, 60, 60]), strict=True):
        assert one.boxes.tolist() == [pytest.approx(expected, abs=0.7)]
        assert one.scores.tolist() == [0.75]
        assert one.labels.tolist() == [1]
        # 200 and 100 of 200, left before right in both views.
        torch.testing.assert_close(one.masks[0, 0], torch.tensor([1.0, 0.5]), atol=0.06, rtol=0)


class Pointing(Bright):
    """Points left and right of the middle of its box: hotter at the brighter side."""

    config = replace(CONFIG, detector="keypoint_rcnn")

    def maps(self, features: Tensor, found: FlatDetections) -> dict[str, Tensor]:
        left, right = super().maps(features, found)["masks"][:, 0].unbind(dim=1)
        maps = torch.zeros(len(left), 2, 4, 4)
        # The first keypoint is the left one of the object as it is seen, the second the right one.
        maps[:, 0, 1, 0], maps[:, 1, 1, 3] = left, right
        return {"keypoints": maps}


def test_keypoints_of_a_mirrored_view_change_places_and_names() -> None:
    person = Category(1, "person", keypoints=["left", "right"], flip_pairs=[[0, 1]])
    config = TtaConfig(flip=True, scales=[80], cap=256, vote_iou=None)
    detector = AugmentedDetector(Pointing().eval(), config, [person])
    (found, _) = detector(two_images())
    # The box is 20 wide from 8, 10: a cell of the 4x4 grid is 5 pixels. In the mirror the dim half
    # is left, and says of the right keypoint, in the right corner, 0.5, as the view itself does.
    points = found.keypoints[0]
    assert points[0, 0] < 13
    assert points[1, 0] > 23
    assert points[0, 2].item() == pytest.approx(2 * points[1, 2].item(), rel=0.02)


def test_boxes_of_a_view_come_back_where_they_were() -> None:
    batch = two_images()
    resized = mirror(collate_images([batch.images[0], batch.images[1, :, :64, :64]], (40, 60)))
    assert resized.image_sizes.tolist() == [[40, 48], [40, 40]]
    view = View(resized, batch.image_sizes, is_flipped=True)
    boxes = torch.tensor([[8.0, 10.0, 28.0, 30.0], [40.0, 16.0, 56.0, 32.0]])
    images = torch.tensor([0, 1])
    moved = view.from_image(boxes, images)
    # Half of 80x96, from its right border 48; 40 / 64 of 64x64, from its right border 40.
    assert moved.tolist() == [[34.0, 5.0, 44.0, 15.0], [5.0, 10.0, 15.0, 20.0]]
    assert torch.equal(view.to_image(moved, images), boxes)


def test_mirrored_images_stay_in_their_corner() -> None:
    batch = two_images()
    mirrored = mirror(batch)
    assert torch.equal(mirrored.images[0], batch.images[0].flip(2))
    assert torch.equal(mirrored.images[1, :, :64, :64], batch.images[1, :, :64, :64].flip(2))
    assert not mirrored.images[1, :, 64:].any()
    assert not mirrored.images[1, :, :, 64:].any()


def test_one_view_and_twice_the_same_view_are_the_detector_itself() -> None:
    torch.manual_seed(0)
    detector = build_detector(CONFIG, 3).eval()
    detector.test_size = (64, 128)
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 128, 96), dtype=torch.uint8, generator=generator)
    expected = detector.predict([image])[0]
    assert len(expected.boxes) == 20
    batch = replace(collate_images([image], (96, 128)))
    for config in (ONE, replace(ONE, scales=[64, 64])):
        (found,) = AugmentedDetector(detector, config, [])(batch)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.labels, expected.labels)
        torch.testing.assert_close(found.masks, expected.masks, rtol=1e-3, atol=1e-4)


def test_boxes_move_to_the_mean_of_those_that_agree() -> None:
    boxes = torch.tensor([
        [0.0, 0.0, 100.0, 100.0],
        [0.0, 0.0, 100.0, 96.0],  # IoU 0.96
        [0.0, 0.0, 100.0, 80.0],  # 0.8: does not agree
        [0.0, 0.0, 100.0, 90.0],  # 0.9, of another class
        [0.0, 0.0, 100.0, 90.0],  # on another image
    ])  # fmt: skip
    candidates = FlatDetections(
        images=torch.tensor([0, 0, 0, 0, 1]),
        boxes=boxes,
        scores=torch.tensor([0.9, 0.3, 0.5, 0.5, 0.5]),
        labels=torch.tensor([1, 1, 1, 0, 1]),
    )
    rows = [0, 4]
    found = FlatDetections(
        candidates.images[rows], boxes[rows], candidates.scores[rows], candidates.labels[rows]
    )
    # (0.9 x 100 + 0.3 x 96) / 1.2 = 99
    expected = torch.tensor([[0.0, 0.0, 100.0, 99.0], [0.0, 0.0, 100.0, 90.0]])
    torch.testing.assert_close(vote(found, candidates, 0.9), expected)


def test_a_split_is_seen_at_its_own_size(make_shards) -> None:
    torch.manual_seed(0)
    detector = build_detector(CONFIG, 2)
    shards = make_shards([[], [], []])
    wrapped = AugmentedDetector(detector, replace(ONE, flip=True), shards.categories)
    results = predict_split(wrapped, shards, None, 2, 0, torch.device("cpu"))
    assert detector.training  # as it was
    assert len({result["image_id"] for result in results}) == 3
    assert all("segmentation" in result for result in results)
