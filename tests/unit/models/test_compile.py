"""The compiled detector: the same losses and gradients, and no recompilation after warm-up."""

from __future__ import annotations

import pytest
import torch

from bigdet.models.norms import discard_statistics, set_norm_mode
from bigdet.structures import Batch
from tests.unit.models.scenes import make_scene
from tests.unit.models.test_detector import OBJECTS, detector_of

LANDSCAPE, PORTRAIT = (96, 128), (128, 96)


def scene(canvas: tuple[int, int], objects: list) -> Batch:
    return make_scene(objects, [canvas, (90, 80)], canvas)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
@pytest.mark.parametrize("mode", ["live", "fixed"])
def test_a_compiled_detector_computes_the_same_and_compiles_once_for_each_canvas(mode: str) -> None:
    eager, compiled = detector_of(), detector_of()
    for detector in (eager, compiled):
        set_norm_mode(detector, mode)
    compiled.compile_dense(backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())

    def step(canvas: tuple[int, int], objects: list) -> None:
        """Compare one training step; two lanes, as with accumulation."""
        for detector in (eager, compiled):
            detector.zero_grad()
        for _ in range(2):
            losses = [detector(scene(canvas, objects)) for detector in (eager, compiled)]
            for ours in losses:
                torch.stack(list(ours.values())).sum().backward()
            for name, loss in losses[0].items():
                torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6)
        for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(
            compiled.get_buffer("backbone.bn1.mean_sum"), eager.get_buffer("backbone.bn1.mean_sum")
        )
        for detector in (eager, compiled):
            discard_statistics(detector)

    step(LANDSCAPE, OBJECTS)
    step(PORTRAIT, OBJECTS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for canvas in (LANDSCAPE, PORTRAIT):
            step(canvas, OBJECTS)
            step(canvas, [[], []])
        shapes = [(60, 70), (120, 50), (33, 90)]
        images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
        for detector in (eager, compiled):
            detector.eval_size = (64, 96)
        for image in images:  # not compiled: test images have many sizes
            one, other = (detector.predict([image])[0] for detector in (eager, compiled))
            torch.testing.assert_close(other.boxes, one.boxes)
        step(LANDSCAPE, OBJECTS)
