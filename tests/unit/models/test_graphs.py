"""A detector whose dense parts are replayed: the losses and gradients of one that runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
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


@pytest.mark.parametrize("name", CASES)
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
