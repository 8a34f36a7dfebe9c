from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.models.assign import pad_objects
from bigdet.models.conventions import Conventions
from bigdet.models.heads.box import BoxHead, Regions
from bigdet.models.heads.rpn import Proposals
from bigdet.structures import Targets

K = 2
A, B, C = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 40.0, 30.0]


def box_head(kind: str, width: int, num_classes: int, **config) -> BoxHead:
    model = ModelConfig(detector="faster_rcnn", backbone="resnet18", box_head=kind, **config)
    return BoxHead(model, "none", width, num_classes, Conventions())


def head_of(kind: str = "2fc", **config) -> BoxHead:
    torch.manual_seed(0)
    roi = RoiConfig(**{"rois_per_image": 8, **config})
    return box_head(kind, 16, K, fc_width=32, roi=roi)


def proposals_of(boxes: list[list[list[float]]]) -> Proposals:
    tensor = torch.tensor(boxes)
    return Proposals(tensor, torch.ones(tensor.shape[:2], dtype=torch.bool))


def objects_of(boxes: list[list[float]], crowd: list[bool] | None = None):
    targets = Targets(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.ones(len(boxes), dtype=torch.int64),
        is_crowd=torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
        offsets=torch.tensor([0, len(boxes)]),
    )
    return pad_objects(targets, torch.float32)


ONE = torch.ones(1)


def test_the_objects_own_boxes_are_sampled_too() -> None:
    far = [50.0, 50.0, 60.0, 60.0]
    regions = head_of().sample(proposals_of([[far]]), objects_of([A]), ONE)
    assert regions.is_positive[0].tolist() == [True, False]
    assert regions.boxes[0].tolist() == [A, far]
    assert regions.labels[0].tolist() == [1, K]
    assert regions.object_rows[0, 0] == 0


def test_a_region_is_positive_from_half_overlap_on() -> None:
    half, less = [0.0, 0.0, 5.0, 10.0], [0.0, 0.0, 4.9, 10.0]
    head = head_of(positive_fraction=1.0)
    regions = head.sample(proposals_of([[half, less]]), objects_of([A]), ONE)
    pairs = zip(regions.boxes[0].tolist(), regions.labels[0], strict=True)
    labels = {tuple(box): label for box, label in pairs}
    assert labels[tuple(half)] == 1
    assert labels[tuple(torch.tensor(less).tolist())] == K


def test_background_inside_a_crowd_is_not_sampled() -> None:
    # In the crowd A: 8 of 10 columns (ignored) and 6 of 10 (a negative as any other).
    deep, shallow = [2.0, 0.0, 12.0, 10.0], [4.0, 0.0, 14.0, 10.0]
    objects = objects_of([A, C], [True, False])
    head = head_of(crowd_coverage=0.7)
    regions = head.sample(proposals_of([[deep, shallow]]), objects, ONE)
    taken = regions.boxes[0, regions.is_valid[0]].tolist()
    assert taken == [C, shallow]
    # By default crowds have no effect, as in end-to-end training with Detectron.
    regions = head_of().sample(proposals_of([[deep, shallow]]), objects, ONE)
    assert regions.is_valid.sum() == 3


def test_empty_proposal_slots_and_images_of_weight_zero_are_not_valid() -> None:
    proposals = Proposals(torch.tensor([[A, C]]), torch.tensor([[True, False]]))
    regions = head_of().sample(proposals, objects_of([]), ONE)
    assert regions.boxes[0, regions.is_valid[0]].tolist() == [A]
    regions = head_of().sample(proposals, objects_of([A]), torch.zeros(1))
    assert not regions.is_valid.any()
    assert not regions.is_positive.any()


def test_without_any_proposal_or_object_nothing_is_valid_and_losses_are_zero() -> None:
    head = head_of()
    proposals = Proposals(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool))
    regions = head.sample(proposals, objects_of([]), ONE)
    assert not regions.is_valid.any()
    num_slots = regions.is_valid.numel()
    losses = head.losses(*head(torch.randn(num_slots, 16, 7, 7)), regions)
    sum(losses.values()).backward()
    assert losses == {"box_class": 0, "box_delta": 0}
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def regions_of(labels: list[int], boxes: list[list[float]], targets: list[list[float]]) -> Regions:
    tensor = torch.tensor([labels])
    return Regions(
        boxes=torch.tensor([boxes]),
        labels=tensor,
        is_valid=torch.ones_like(tensor, dtype=torch.bool),
        is_positive=tensor < K,
        object_boxes=torch.tensor([targets]),
        object_rows=torch.zeros_like(tensor),
    )


def test_losses_of_silent_predictions_are_worked_out_by_hand() -> None:
    # Boxes of detectron2's test: the two deltas' absolute values add up to 2.018324 and 6.054133,
    # and half of their sum is 4.0362: here over 4 regions, half of them background.
    boxes = [[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7.0, 8.0], A, B]
    targets = [[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0], A, A]
    regions = regions_of([0, 1, K, K], boxes, targets)
    losses = head_of().losses(torch.zeros(4, K + 1), torch.zeros(4, K, 4), regions)
    torch.testing.assert_close(losses["box_class"], torch.tensor(math.log(3)))
    assert abs(losses["box_delta"].item() - 4.0362 / 2) < 1e-4


def test_the_box_loss_reads_the_deltas_of_the_objects_class() -> None:
    deltas = torch.zeros(1, K, 4)
    deltas[0, 0] = 100.0  # of the other class
    losses = head_of().losses(torch.zeros(1, K + 1), deltas, regions_of([1], [A], [A]))
    assert losses["box_delta"] == 0


@pytest.mark.parametrize(
    ("box_loss", "expected"), [("l1", 15.0), ("smooth_l1", 14.0), ("giou", 2 / 3)]
)
def test_the_box_loss_is_an_option_worked_out_by_hand(box_loss: str, expected: float) -> None:
    if box_loss == "giou":
        # 50 square pixels shared, 150 together, which fill their hull: 1 - 1 / 3.
        target = [5.0, 0.0, 15.0, 10.0]
    else:
        # The center moves by half of the sides, the width grows e-fold: dx = 0.5 x 10, dy = 0.5 x
        # 10 and dw = 1 x 5 make 15. With smooth L1 each is beta / 2 = 1 / 3 less.
        e = math.e
        target = [10 - 5 * e, 5.0, 10 + 5 * e, 15.0]
    options = {"box_beta": 2 / 3} if box_loss == "smooth_l1" else {}
    head = head_of(box_loss=box_loss, box_loss_weight=3.0, **options)
    regions = regions_of([1, K], [A, C], [target, A])
    losses = head.losses(torch.zeros(2, K + 1), torch.zeros(2, K, 4), regions)
    torch.testing.assert_close(losses["box_delta"], torch.tensor(3.0 * expected / 2))


def test_giou_has_finite_gradients_where_no_object_is() -> None:
    deltas = torch.full((2, 1, 4), 1e6, requires_grad=True)
    empty = [0.0, 0.0, 0.0, 0.0]
    regions = regions_of([K, K], [A, empty], [C, empty])
    loss = head_of(box_loss="giou").losses(torch.zeros(2, K + 1), deltas, regions)["box_delta"]
    loss.backward()
    assert loss == 0
    assert not deltas.grad.any()


def test_class_agnostic_deltas_are_one_set_for_all_classes() -> None:
    torch.manual_seed(0)
    head = box_head("2fc", 16, K, fc_width=32, roi=RoiConfig(class_agnostic=True))
    assert head(torch.zeros(3, 16, 7, 7))[1].shape == (3, 1, 4)
    shift = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])  # a tenth of the width
    found = head.detect(
        torch.tensor([[0.5, 0.3, 0.2]]), shift, proposals_of([[A]]), torch.tensor([[64, 64]])
    )
    torch.testing.assert_close(found.boxes, torch.tensor([B, B]))
    losses = head.losses(torch.zeros(1, K + 1), shift, regions_of([1], [A], [B]))
    assert losses["box_delta"] == 0


@pytest.mark.parametrize("kind", ["2fc", "4conv1fc"])
def test_weights_begin_as_the_recipes_say(kind: str) -> None:
    torch.manual_seed(0)
    head = box_head(kind, 64, 80, fc_width=512)
    expected = {
        "classifier.weight": 0.01,
        "regressor.weight": 0.001,
        # XavierFill: uniform with variance 1 / fan-in. MSRA: variance 2 / fan-out.
        "fcs.0.weight": (1 / (64 * 49)) ** 0.5,
        **{f"convs.{i}.conv.weight": (2 / (64 * 9)) ** 0.5 for i in range(4 * (kind != "2fc"))},
    }
    found = dict(head.named_parameters())
    for name, deviation in expected.items():
        assert found[name].mean().abs() < 0.05 * deviation, name
        torch.testing.assert_close(found[name].std().item(), deviation, rtol=0.03, atol=0)
    assert not any(value.any() for name, value in found.items() if name.endswith("bias"))


def probabilities_of(probabilities: list[list[float]]) -> Tensor:
    rest = [[*row, 1 - sum(row)] for row in probabilities]
    return torch.tensor(rest)


def test_detections_are_suppressed_within_a_class_and_sorted() -> None:
    # A and B overlap by 0.818. B loses to A in class 0, and has class 1 for itself.
    proposals = proposals_of([[A, B, C]])
    probabilities = probabilities_of([[0.9, 0.01], [0.6, 0.3], [0.01, 0.7]])
    found = head_of().detect(
        probabilities, torch.zeros(3, K, 4), proposals, torch.tensor([[64, 64]])
    )
    assert found.boxes.tolist() == [A, C, B]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.3]))
    assert found.labels.tolist() == [0, 1, 1]


def test_detections_of_several_images_are_limited_and_cut_at_each_image() -> None:
    proposals = proposals_of([[A, C], [A, C]])
    probabilities = probabilities_of([[0.5, 0.01], [0.8, 0.01], [0.9, 0.01], [0.6, 0.01]])
    head = head_of(detections_per_image=1)
    found = head.detect(
        probabilities, torch.zeros(4, K, 4), proposals, torch.tensor([[64, 30], [8, 64]])
    )
    assert found.images.tolist() == [0, 1]
    assert found.boxes.tolist() == [[20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 10.0, 8.0]]


def test_low_scores_empty_slots_and_bad_numbers_are_no_detections() -> None:
    proposals = Proposals(
        torch.tensor([[A, C, B, [40.0, 40.0, 50.0, 50.0]]]),
        torch.tensor([[True, True, False, True]]),
    )
    probabilities = probabilities_of([[0.04, 0.05], [0.5, 0.01], [0.9, 0.01], [0.9, 0.05]])
    probabilities[1] = math.nan
    deltas = torch.zeros(4, K, 4)
    deltas[3, 0, 0] = math.inf
    deltas[3, 1] = math.nan
    found = head_of().detect(probabilities, deltas, proposals, torch.tensor([[64, 64]]))
    assert len(found.boxes) == 0


@pytest.mark.parametrize("kind", ["2fc", "4conv1fc"])
def test_both_kinds_take_no_regions_at_all(kind: str) -> None:
    logits, deltas = head_of(kind)(torch.zeros(0, 16, 7, 7))
    assert logits.shape == (0, K + 1)
    assert deltas.shape == (0, K, 4)


def test_the_first_layer_reads_features_as_they_lie_in_memory() -> None:
    head = head_of()
    pooled = torch.randn(3, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    weight = head.fcs[0].weight.view(32, 7, 7, 16).permute(0, 3, 1, 2).flatten(1)
    hidden = torch.relu(pooled.flatten(1) @ weight.T)
    hidden = torch.relu(head.fcs[1](hidden))
    torch.testing.assert_close(head(pooled)[0], head.classifier(hidden))
