from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from bigdet.config.evaluation import TtaConfig
from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.data.format.manifest import Category
from bigdet.evaluation import tta
from bigdet.evaluation.split import Passes, predict_split
from bigdet.evaluation.tta import AugmentedDetector, View, mirror, vote
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector, collate_images, evaluating
from bigdet.models.heads.detections import FlatDetections, best_detections
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
    eval_settings = RoiConfig()


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
    detector.eval_size = (64, 128)
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


def test_views_of_many_sizes_compile_nothing() -> None:
    detector = build_detector(CONFIG, 3)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    detector.compile_dense(backend=backend)
    augmented = AugmentedDetector(detector, replace(ONE, scales=[32, 64]), [])
    with evaluating(augmented):
        augmented(two_images())
    assert graphs == []
    torch.compiler.reset()


def test_boxes_move_to_the_mean_of_those_that_agree() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0.0, 100.0, 100.0],
            [0.0, 0.0, 100.0, 96.0],  # IoU 0.96
            [0.0, 0.0, 100.0, 80.0],  # 0.8: does not agree
            [0.0, 0.0, 100.0, 90.0],  # 0.9, of another class
            [0.0, 0.0, 100.0, 90.0],  # on another image
        ]
    )
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
    results = predict_split(wrapped, shards, Passes(None, 2), torch.device("cpu"))
    assert detector.training  # as it was
    assert len({result["image_id"] for result in results}) == 3
    assert all("segmentation" in result for result in results)


class Doubtful(Bright):
    """Says of each bright rectangle three boxes: well, nearly as well with less score, and badly.

    NMS of one view drops the second. Mirrored views see the first with less score.
    """

    eval_settings = RoiConfig(detections_per_image=2)

    def candidates(self, features: Tensor, batch: Batch) -> FlatDetections:
        found = super().find(features, batch)
        is_mirrored = features[0, :, : features.shape[2] // 2].sum() < features[0].sum() / 2
        boxes = found.boxes.repeat_interleave(3, dim=0)
        boxes[1::3, 3] -= 1  # of 20 pixels: IoU 0.95
        boxes[2::3, 2] += 30
        scores = torch.tensor([0.6 if is_mirrored else 0.9, 0.5, 0.2]).repeat(len(features))
        boxes[2::3, 0] = torch.nan if is_mirrored else boxes[2::3, 0]
        images, labels = (x.repeat_interleave(3) for x in (found.images, found.labels))
        return FlatDetections(images, boxes, scores, labels)

    def find(self, features: Tensor, batch: Batch) -> FlatDetections:
        found = self.candidates(features, batch)
        return best_detections(found, batch.image_sizes, self.num_classes, self.eval_settings)


def test_candidates_of_all_views_vote_before_any_is_dropped() -> None:
    # One view at the images' own size, one mirrored. By brute force: all boxes of both views, back
    # in the image; the best stays; what overlaps it by 0.9 moves its lower edge, those of the same
    # view too: (0.9 x 30 + 0.5 x 29 + 0.6 x 30 + 0.5 x 29) / 2.5 = 29.6. With NMS in each view
    # first, only the two whole boxes agree: 30.
    image = two_images()
    one = replace(
        image,
        images=image.images[:1],
        image_sizes=image.image_sizes[:1],
        original_sizes=image.original_sizes[:1],
        image_ids=image.image_ids[:1],
        weights=image.weights[:1],
    )
    config = TtaConfig(flip=True, scales=[80], cap=256, vote_iou=0.9)
    for pool, lower_edge in (("candidates", 29.6), ("detections", 30.0)):
        wrapped = AugmentedDetector(Doubtful().eval(), replace(config, pool=pool), [])
        (found,) = wrapped(one)
        assert found.scores[0].item() == pytest.approx(0.9)
        assert found.boxes[0].tolist() == pytest.approx([8, 10, 28, lower_edge], abs=1e-3)
        assert len(found.boxes) <= 2
        assert found.boxes.isfinite().all()


def test_the_best_of_all_views_are_kept_at_the_end() -> None:
    # A real detector, untrained: brute force over the candidates of two sizes.
    torch.manual_seed(0)
    detector = build_detector(CONFIG, 3).eval()
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=generator)
    batch = collate_images([image], (96, 96))
    config = TtaConfig(flip=False, scales=[64, 96], cap=128, vote_iou=None)
    (found,) = AugmentedDetector(detector, config, [])(batch)
    boxes, scores, labels = [], [], []
    with torch.no_grad():
        for size in (64, 96):
            view = collate_images([image], (size, 128))
            seen = detector.candidates(detector.features(view), view)
            boxes.append(seen.boxes.clamp(0, size) * (96 / size))
            scores.append(seen.scores)
            labels.append(seen.labels)
    boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    assert len(boxes) > 100
    is_real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[is_real], scores[is_real], labels[is_real]
    kept = torchvision.ops.batched_nms(boxes, scores, labels, 0.5)[:20]
    torch.testing.assert_close(found.scores, scores[kept])
    torch.testing.assert_close(found.boxes, boxes[kept], rtol=1e-4, atol=1e-3)
    assert torch.equal(found.labels, labels[kept])


def test_the_view_of_the_plain_size_has_its_own_cap() -> None:
    # An image of 40 x 160. Plain: short side 80, long side at most 133: 33 x 133. The other view,
    # of 60, has the augmentation's cap, 200: 50 x 200. With pool: detections both have it.
    images = torch.zeros(1, 3, 64, 160, dtype=torch.uint8)
    images[0, :, 10:30, 8:28] = 200
    batch = collate_images([images[0, :, :40]], (1, 1))
    sizes = torch.tensor([[40, 160]])
    batch = replace(batch, images=images, image_sizes=sizes, original_sizes=sizes)
    config = TtaConfig(flip=False, scales=[80, 60], cap=200, vote_iou=None)
    for pool, expected in (
        ("candidates", [[33, 133], [50, 200]]),
        ("detections", [[50, 200], [50, 200]]),
    ):
        wrapped = AugmentedDetector(Bright().eval(), replace(config, pool=pool), [], (80, 133))
        seen = [view.batch.image_sizes[0].tolist() for view in wrapped._views(batch)]
        assert seen == expected, pool


def test_votes_are_the_same_however_many_pairs_are_compared_at_once(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 60 + 5 * torch.rand(60, 2, generator=generator)], dim=1)
    candidates = FlatDetections(
        torch.randint(0, 2, (60,), generator=generator),
        boxes,
        torch.rand(60, generator=generator),
        torch.randint(0, 2, (60,), generator=generator),
    )
    rows = torch.arange(0, 60, 7)
    found = FlatDetections(
        candidates.images[rows], boxes[rows], candidates.scores[rows], candidates.labels[rows]
    )
    whole = vote(found, candidates, 0.6)
    assert (whole - found.boxes).abs().max() > 0.1
    monkeypatch.setattr(tta, "CHUNK", 130)  # two detections at once
    torch.testing.assert_close(vote(found, candidates, 0.6), whole)
    none = FlatDetections(*(part[:0] for part in (rows, boxes, candidates.scores, rows)))
    assert vote(none, none, 0.6).shape == (0, 4)
