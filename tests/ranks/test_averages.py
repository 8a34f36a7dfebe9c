"""The means of a line of the log do not depend on the number of ranks, nor does going on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bigdet import distributed
from bigdet.engine.base import StepResult
from bigdet.training.averages import LossMeter
from bigdet.training.state import Interval
from tests.spawn import run_ranks

STEPS = [([1.0, 3.0], [2, 2], 5.0), ([4.0, 0.0], [1, 0], 1.0)]  # losses, images, norm of two lanes


def mean_of_two_steps() -> tuple[dict[str, float | None], Interval]:
    """Take the steps, with a checkpoint after the first; return the means and what it held."""
    share = 2 // distributed.world_size()
    lanes = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    meter, middle = LossMeter(torch.device("cpu"), Interval()), Interval()
    for losses, images, norm in STEPS:
        own = {"total": torch.tensor(losses[lanes.start : lanes.stop])}
        meter.add(StepResult(own, True, norm), np.array(images), lanes)
        if not middle.images:
            middle = meter.interval()
            meter = LossMeter(torch.device("cpu"), middle)
    return meter.means(), middle


def test_two_ranks_log_what_one_logs(tmp_path: Path) -> None:
    found = run_ranks(mean_of_two_steps, 2, tmp_path)
    assert found[0] == found[1]
    means, middle = found[0]
    # Two images of loss 1, two of 3 and one of 4; the norm of the short step counts twice.
    assert means == {"loss/total": pytest.approx(12 / 5), "grad_norm": pytest.approx(22 / 5)}
    assert middle == Interval(4.0, [{"total": 2.0}, {"total": 6.0}], 4.0, 20.0)
    assert mean_of_two_steps()[0] == means
