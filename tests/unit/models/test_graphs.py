"""A detector whose dense parts are replayed: the losses and gradients of one that runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.models.graphs import WARM_UPS, Graphs
from bigdet.models.norms import update_running_statistics
from bigdet.ops.devices import as_on_gpu
from bigdet.structures import Batch
from tests.gpu.test_detectors import MODELS
from tests.unit.models import replaying
from tests.unit.models.scenes import make_scene
from tests.unit.models.test_detector import CONFIG, OBJECTS, detector_of

CPU = torch.device("cpu")
FASTER = replace(CONFIG, detector="faster_rcnn", norm="none")
CASES = {
    "mask_rcnn, fp32": CONFIG,
    "mask_rcnn, bf16": CONFIG,
    "faster_rcnn gn, bf16": replace(FASTER, norm="gn", box_head="4conv1fc", width=32),
    "faster_rcnn vgg16, fp32": replace(FASTER, backbone="vgg16"),
    "faster_rcnn swin_t, bf16": replace(FASTER, backbone="swin_t", drop_path=0.5),
    "faster_rcnn convnext_t, fp32": replace(FASTER, backbone="convnext_t", drop_path=0.5),
    "faster_rcnn vit_s, bf16": replace(FASTER, backbone="vit_s", drop_path=0.5),
    "retinanet, fp32": MODELS["retinanet"],
}


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.put_in_place(monkeypatch)


def batches(number: int) -> list[Batch]:
    """Two micro-batches of a step, landscape and portrait; each has images of other sizes."""
    made = []
    for index, canvas in enumerate([(64, 96), (96, 64)]):
        seed = 2 * number + index
        sizes = [canvas, (60 - 5 * seed, 62 - 7 * seed)]
        batch = make_scene(OBJECTS, sizes, canvas, num_keypoints=3)
        pixels = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        made.append(replace(batch, images=pixels, seed=seed))
    return made


def graphed(config=CONFIG) -> Detector:
    detector = detector_of(config)
    detector.graph_dense()
    return detector


# On a CPU some would take long; they are for `tests/gpu/test_graphs.py`.
SLOW = {"faster_rcnn vgg16, fp32", "faster_rcnn convnext_t, fp32"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - SLOW))
def test_losses_gradients_and_weights_are_the_same(name: str) -> None:
    precision = name.split(", ")[1]
    pair = [detector_of(CASES[name]), graphed(CASES[name])]
    totals = [TotalLoss(detector, precision, CPU) for detector in pair]
    optimizers = [torch.optim.SGD(detector.parameters(), lr=0.01) for detector in pair]
    torch.manual_seed(5)
    for number in range(2):
        for batch in [*batches(number), *batches(number)[:1]]:  # one shape twice in a step
            seen = []
            for total in totals:
                with as_on_gpu():
                    loss, losses = total(batch)
                (loss / 3).backward()
                seen.append(losses)
            for key, loss in seen[0].items():
                torch.testing.assert_close(seen[1][key], loss, rtol=0, atol=0, msg=f"{name} {key}")
        own = dict(pair[1].named_parameters())
        for key, parameter in pair[0].named_parameters():
            assert (own[key].grad is None) == (parameter.grad is None), key
            if parameter.grad is not None:
                torch.testing.assert_close(own[key].grad, parameter.grad, rtol=0, atol=0, msg=key)
        for detector, optimizer in zip(pair, optimizers, strict=True):
            update_running_statistics(detector)
            optimizer.step()
            optimizer.zero_grad()
    state = pair[1].state_dict()
    for key, value in pair[0].state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, msg=key)


def doubled(layer: torch.nn.Linear, seen: list[tuple[int, ...]]):
    """A function that notes the shapes that it is run with."""

    def function(x: torch.Tensor) -> dict[str, object]:
        seen.append(tuple(x.shape))
        return {"y": layer(2 * x), "rows": len(x), "mean": x.mean()}

    return function


def test_a_shape_and_a_precision_are_recorded_once() -> None:
    layer, seen = torch.nn.Linear(3, 2), []
    graphs, function = Graphs([layer]), doubled(layer, seen)
    for rows in (4, 5, 4, 5):
        x = torch.randn(rows, 3)
        found = graphs(function, x)
        torch.testing.assert_close(found["y"], layer(2 * x))
        torch.testing.assert_close(found["mean"], x.mean())
        assert found["rows"] == rows
        assert found["y"].requires_grad
        assert not found["mean"].requires_grad
    assert seen == [(4, 3)] * (WARM_UPS + 1) + [(5, 3)] * (WARM_UPS + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs(function, torch.randn(4, 3))["y"].dtype == torch.bfloat16
    assert graphs(function, torch.randn(4, 3))["y"].dtype == torch.float32


def test_gradients_are_given_out_as_copies() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    graphs, function = Graphs([layer]), doubled(layer, [])
    for value in (1.0, 10.0, 100.0):  # added up: 2 + 20 + 200
        graphs(function, torch.full((1, 1), value))["y"].sum().backward()
    assert layer.weight.grad.item() == 222


def test_what_a_replay_would_spoil_is_an_error() -> None:
    layer = torch.nn.Linear(3, 2)
    graphs, function = Graphs([layer]), doubled(layer, [])
    first = graphs(function, torch.randn(4, 3))["y"]
    graphs(function, torch.randn(5, 3))
    with pytest.raises(AssertionError, match="call 1 of 2"):
        first.sum().backward()
    layer.weight.data = layer.weight.data.clone()
    with pytest.raises(AssertionError, match="weights were moved"):
        graphs(function, torch.randn(4, 3))


def test_only_training_is_recorded() -> None:
    detector, batch = graphed(), batches(0)[0]
    with as_on_gpu():
        with torch.no_grad():
            detector(batch)
        detector.eval()
        detector(batch)
        assert not detector._graphs._recordings
        detector.train()
        detector(batch)
    assert len(detector._graphs._recordings) == 1
