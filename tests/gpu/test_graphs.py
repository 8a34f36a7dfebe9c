"""Recorded and replayed steps on a GPU against steps that are launched."""

from __future__ import annotations

import pytest
import torch

from bigdet.engine.precision import TotalLoss
from bigdet.models.norms import update_running_statistics
from tests.unit.models.test_detector import detector_of
from tests.unit.models.test_graphs import CASES, batches, graphed

pytestmark = pytest.mark.gpu
STEPS = 3


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_launched_steps(name: str, exact: torch.device) -> None:
    # In fp32, where sums in another order differ little; drop path draws the same numbers.
    pair = [detector_of(CASES[name]), graphed(CASES[name])]
    totals = [TotalLoss(detector.to(exact), "fp32", exact) for detector in pair]
    optimizers = [torch.optim.SGD(detector.parameters(), lr=1e-4) for detector in pair]
    for number in range(STEPS):
        for batch in [*batches(number), *batches(number)[:1]]:  # two shapes, one of them twice
            on_gpu, seen = batch.to(exact), []
            for total in totals:
                loss, losses = total(on_gpu)
                loss.backward()
                seen.append(losses)
            for key, loss in seen[0].items():
                torch.testing.assert_close(seen[1][key], loss, rtol=1e-3, atol=1e-5, msg=key)
        own = dict(pair[1].named_parameters())
        for key, parameter in pair[0].named_parameters():
            assert (own[key].grad is None) == (parameter.grad is None), key
            if parameter.grad is not None:
                error = (own[key].grad - parameter.grad).norm()
                assert error < 1e-2 * parameter.grad.norm().clamp(min=1e-9), (key, float(error))
        for detector, optimizer in zip(pair, optimizers, strict=True):
            update_running_statistics(detector)
            optimizer.step()
            optimizer.zero_grad()


def test_replays_take_no_more_memory_and_do_not_wait(exact: torch.device) -> None:
    total = TotalLoss(graphed(CASES["retinanet, fp32"]).to(exact), "bf16", exact)
    moved = [batch.to(exact) for batch in batches(0)]
    reserved = []
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        for batch in moved:
            total(batch)[0].backward()
        torch.cuda.set_sync_debug_mode("default")
        total.zero_grad()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1:] == reserved[1:2] * 3
