"""Statistics of BN that are measured anew before an evaluation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from bigdet import distributed
from bigdet.config.load import load_config
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import TrainStream
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.norms import batch_norms, count_lane, set_norm_mode, update_running_statistics
from bigdet.training.precise_bn import measure_statistics
from tests.commands.runs import TINY
from tests.shipped import CONFIGS
from tests.spawn import run_ranks

STEPS = 2


def parts(shards: Path, mode: str, rank: int = 0, ranks: int = 1) -> tuple[Detector, TrainStream]:
    """A tiny detector, and its stream of 4 lanes of 2 images from step 3 on."""
    config = load_config(CONFIGS / "quickstart.yaml", TINY)
    phase = config.phases["pretrain"]
    train_set = ShardSet(shards / "train")
    stream = TrainStream(
        train_set,
        config.data,
        phase,
        name="pretrain",
        with_masks=True,
        seed=0,
        rank=rank,
        world_size=ranks,
        first_step=2,
    )
    torch.manual_seed(0)
    detector = build_detector(config.model, train_set.num_classes)
    set_norm_mode(detector, mode)
    return detector.train(), stream


def measure(shards: Path, mode: str, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    detector, stream = parts(shards, mode, rank, ranks)
    ahead = stream.from_step(4)
    cpu = torch.device("cpu")
    assert measure_statistics(detector, ahead, STEPS, cpu, "fp32", lambda: False)
    return {name: tensor for name, tensor in detector.state_dict().items() if "running" in name}


def test_statistics_are_the_means_over_all_lanes_of_the_steps(shapes_shards: Path) -> None:
    found = measure(shapes_shards, "live")
    detector, stream = parts(shapes_shards, "live")
    sums: dict[str, torch.Tensor] = {}
    for step in (5, 6):
        for lane in range(4):
            detector(stream.read_group(step, lane))
            for name, layer in detector.named_modules():
                if hasattr(layer, "batch_mean"):
                    for kind, value in (("mean", layer.batch_mean), ("var", layer.batch_var)):
                        key = f"{name}.running_{kind}"
                        sums[key] = sums.get(key, 0) + value.double()
    assert sums.keys() == found.keys()
    for name, total in sums.items():
        torch.testing.assert_close(found[name].double(), total / 8, rtol=1e-4, atol=1e-5)


def test_statistics_before_weights_and_the_training_stream_do_not_matter_or_change(
    shapes_shards: Path,
) -> None:
    expected = measure(shapes_shards, "live")
    detector, stream = parts(shapes_shards, "live")
    batches = iter(stream)
    before = [next(batches) for _ in range(4)]  # a step of training
    for batch in before:
        detector(batch)
    update_running_statistics(detector)
    weights = {name: p.clone() for name, p in detector.named_parameters()}
    detector(stream.read_group(9, 0))  # what a skipped step left behind
    measured = measure_statistics(
        detector, stream.from_step(4), STEPS, torch.device("cpu"), "fp32", lambda: False
    )
    assert measured
    for name, value in expected.items():
        torch.testing.assert_close(detector.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in detector.named_parameters())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert detector.training
    after = [batch.image_ids.tolist() for batch in islice(batches, 4)]  # continues where it was
    _, other = parts(shapes_shards, "live")
    assert after == [other.read_group(4, lane).image_ids.tolist() for lane in range(4)]


def test_statistics_stay_when_it_is_told_to_stop(shapes_shards: Path) -> None:
    detector, stream = parts(shapes_shards, "live")
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    cpu = torch.device("cpu")
    assert not measure_statistics(detector, stream.from_step(4), STEPS, cpu, "fp32", lambda: True)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    count_lane(detector)
    assert all(layer.num_filled.item() == 1 for layer in batch_norms(detector))  # none from before


def measured_by_rank(shards: Path, mode: str) -> dict[str, torch.Tensor]:
    return measure(shards, mode, distributed.rank(), distributed.world_size())


@pytest.mark.parametrize("mode", ["live", "sync"])
def test_all_ranks_have_the_same_statistics(tmp_path: Path, shapes_shards: Path, mode: str) -> None:
    one, two = run_ranks(measured_by_rank, 2, tmp_path, shapes_shards, mode)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    if mode == "live":  # of each lane's own batch: the ranks do not matter
        for name, value in measure(shapes_shards, mode).items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)
