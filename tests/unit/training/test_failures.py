from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigdet.training.failures import StepError, explained
from bigdet.training.watchdog import Watchdog


@pytest.fixture
def trainer(tmp_path: Path) -> SimpleNamespace:
    watchdog = Watchdog(None, tmp_path / "log")
    watchdog.at("train step 7: forward, backward, update")
    batches = [SimpleNamespace(images=torch.empty(2, 3, 800, width)) for width in (1216, 1344)]
    return SimpleNamespace(
        run=SimpleNamespace(watchdog=watchdog),
        name="train",
        device=torch.device("cpu"),
        micro_batches=batches,
    )


def test_memory_that_is_full_is_reported_with_shapes_and_what_to_lower(trainer: SimpleNamespace):
    with pytest.raises(StepError) as caught, explained(trainer):
        torch.empty(1 << 60)  # more than any host has: fails for real
    message = str(caught.value)
    assert message.startswith("train step 7: forward, backward, update: out of memory on rank 0")
    assert "images (2, 3, 800, 1216), (2, 3, 800, 1344), peak " in message
    assert "Lower phases.train.images_per_gpu" in message
    assert "losses are normalized over the images of one forward pass" in message
    assert "lower evaluation.images_per_gpu (another padding changes AP a little)" in message
    with pytest.raises(StepError, match="out of memory"), explained(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_rank_that_is_gone_is_reported_and_a_bug_stays_a_bug(trainer: SimpleNamespace):
    lost = "[/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"
    with pytest.raises(StepError, match=r"step 7: .*lost the connection"), explained(trainer):
        raise RuntimeError(lost)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), explained(trainer):
        torch.ones(2, 3) @ torch.ones(2, 3)
