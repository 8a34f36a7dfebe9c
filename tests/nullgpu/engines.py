"""Steps of a small detector through every engine on the null GPU."""

from __future__ import annotations

import gc
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.engine.build import build_engine
from bigdet.models.detector import Detector
from bigdet.models.norms import update_running_statistics
from bigdet.training.optim import build_optimizer
from bigdet.training.prefetch import prefetch
from tests.nullgpu import null_gpu
from tests.nullgpu.run import pinned, seen
from tests.ranks.toy import ENGINES, OPTIMIZERS
from tests.unit.models.test_detector import detector_of, scene

MICRO_BATCHES = 2
LIMIT = timedelta(seconds=77)
GRAPHED = {f"{name}, graphs": ENGINES[name] for name in ("zero0", "zero1", "zero2")}


def num_copied(detector: Detector) -> int:
    """How many weights cuDNN has to copy in each pass, which computes in channels_last."""
    weights = [value for value in detector.parameters() if value.dim() == 4]
    return sum(not value.is_contiguous(memory_format=torch.channels_last) for value in weights)


def steps() -> dict[str, dict[str, Any]]:
    """What the second step of each engine does on this rank."""
    from deepspeed.runtime.zero import partitioned_param_coordinator  # in the ranks only

    null_gpu.install()
    # It compares numbers by way of the GPU, which moves none.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda numbers: None
    device = distributed.device()
    batches = [pinned(scene()) for _ in range(MICRO_BATCHES)]
    found = {}
    distributed._limits["cuda"] = LIMIT  # as `start` would set it
    for name, options in (ENGINES | GRAPHED).items():
        detector = detector_of()
        if name in GRAPHED:
            detector.graph_dense()
        make_optimizer = partial(build_optimizer, phase=OPTIMIZERS["adamw"])
        config = EngineConfig(**options)
        engine = build_engine(
            detector, make_optimizer, config, MICRO_BATCHES, device, detector.units
        )
        limits = {
            group._get_backend(device).options._timeout
            for group in torch.distributed.distributed_c10d._world.pg_map
        }
        assert limits == {LIMIT}, limits  # also of the groups that an engine makes
        launched = []
        for _ in range(2):
            null_gpu.reset()
            torch.cuda.reset_peak_memory_stats()
            engine.set_lr(0.01)
            launched.append(engine.launch_step(prefetch(batches, device)))
            update_running_statistics(detector, counts=launched[-1].counts)
            launched[0].read()
        peak = torch.cuda.max_memory_allocated()
        found[name] = {
            **seen(), "nccl": null_gpu.launches_of("nccl"), "peak": peak,
            "copied": num_copied(detector),
        }  # fmt: skip
        engine.close()
        del engine, detector
        gc.collect()
    return found
