"""Compares the speed of each engine and ZeRO stage with torch's DistributedDataParallel.

``bigdet benchmark step CONFIG --engines all`` (or ``zero1,fsdp``) starts the ranks of one engine
after the other on this host. In each group the engine and plain DDP train the same detector with
the same optimizer on the same random scene, one step each in turn. The numbers of each (medians
over the rounds) are:

- ``images_per_second`` of all ranks, and ``ratio``, the median over the rounds of its speed over
  that of DDP in the same round;
- ``peak_memory_gib`` of a rank minus what it had before the engine was built, such as the scene and
  torch (the largest of the ranks);
- ``communication_seconds`` inside collectives in one step, including the wait for other ranks and
  what overlaps with computation (from torch's profiler);
- ``state_mib``, the memory of weights and optimizer state of a rank, and ``formula_mib``, what it
  should be: 4 bytes x (P + K x T) with P weights, T of them trained and K tensors of optimizer
  state; at ZeRO-1 and 2 P + (K + 1) x T / N on N ranks, as each rank updates a copy of its part; at
  ZeRO-3 and FSDP2 (P + K x T) / N.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from bigdet import distributed
from bigdet.benchmarks.memory import peak_memory, start_memory
from bigdet.benchmarks.ranks import run_ranks
from bigdet.config.engine import EngineConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.run import RunConfig
from bigdet.engine.base import state_keys
from bigdet.engine.build import build_engine
from bigdet.engine.precision import TotalLoss
from bigdet.models.build import build_detector
from bigdet.models.norms import set_norm_mode
from bigdet.structures import Batch
from bigdet.training import optim

ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "fsdp": {"kind": "fsdp", "zero_stage": None},
}
COLLECTIVES = ("gloo:", "nccl:")
# The detector's weights are channels_last, and DDP warns that some of its buckets are not.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def run(
    config: RunConfig,
    phase: PhaseConfig,
    make_batch: Callable[[int], Batch],
    num_classes: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Measure all engines, one after the other.

    Args:
        config: its model, precision and ``clip_norm`` are used.
        phase: its optimizer and norm mode are used.
        make_batch: returns a scene for a seed; can be pickled.
        num_classes: K.
        arguments: ``engines``, ``ranks`` and ``rounds`` of the command line.
    """
    names = list(ENGINES) if arguments.engines == "all" else arguments.engines.split(",")
    unknown = sorted(set(names) - set(ENGINES))
    if unknown:
        raise ValueError(
            f"--engines: found {', '.join(unknown)}, expected all or some of {','.join(ENGINES)}."
        )
    report: dict[str, Any] = {}
    for name in names:
        measure = partial(_measure, config, phase, make_batch, num_classes, name, arguments.rounds)
        ranks = run_ranks(measure, arguments.ranks, name)
        report[name] = ranks[0] | {
            key: max(rank[key] for rank in ranks) for key in ("peak_memory_gib", "state_mib")
        }
    return {
        "what": "engines",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": arguments.ranks,
        "precision": config.engine.precision,
        "images_per_gpu": phase.images_per_gpu,
        **report,
    }


def _measure(
    config: RunConfig,
    phase: PhaseConfig,
    make_batch: Callable[[int], Batch],
    num_classes: int,
    name: str,
    rounds: int,
) -> dict[str, Any]:
    """Measure one engine and DDP on this rank."""
    device = distributed.device()
    batch = make_batch(config.seed + distributed.rank()).to(device)
    make_optimizer = partial(optim.build_optimizer, phase=phase)

    def make_detector() -> Any:
        torch.manual_seed(config.seed)
        detector = build_detector(config.model, num_classes).train()
        if phase.norm_mode is not None:
            set_norm_mode(detector, phase.norm_mode)
        return detector

    rival = _Ddp(make_detector().to(device), make_optimizer, config.engine, device)
    rival.step(batch)
    start_memory(device)
    before = peak_memory(device)
    detector = make_detector()
    settings = EngineConfig(
        **ENGINES[name], precision=config.engine.precision, clip_norm=config.engine.clip_norm
    )
    sizes = [(p.numel(), p.requires_grad) for p in detector.parameters()]
    engine: Any = build_engine(detector, make_optimizer, settings, 1, device, detector.units)
    engine.set_lr(phase.lr)

    def step() -> None:
        engine.train_step([batch])

    times, rival_times = [], []
    for _ in range(rounds + 1):
        rival_times.append(_seconds(partial(rival.step, batch), device))
        times.append(_seconds(step, device))
    start_memory(device)  # not before a step that is timed: all memory would have to come anew
    step()
    peak = peak_memory(device) - before
    num_images = phase.images_per_gpu * distributed.world_size()
    pairs = list(zip(times, rival_times, strict=True))[1:]
    state = _bytes_of(_state_tensors(detector, engine._optimizer))
    formula = 4 * _formula(name, sizes, len(set(state_keys(engine._optimizer)) - {"step"}))
    return {
        "images_per_second": round(num_images / statistics.median(times[1:]), 3),
        "ddp_images_per_second": round(num_images / statistics.median(rival_times[1:]), 3),
        "ratio": round(statistics.median(theirs / ours for ours, theirs in pairs), 3),
        "peak_memory_gib": round(peak / 2**30, 3),
        "communication_seconds": round(_communication(step), 4),
        "ddp_communication_seconds": round(_communication(partial(rival.step, batch)), 4),
        "state_mib": round(state / 2**20, 2),
        "formula_mib": round(formula / 2**20, 2),
    }


class _Ddp:
    """Plain DistributedDataParallel around the same detector."""

    def __init__(
        self,
        detector: nn.Module,
        make_optimizer: Callable[[nn.Module], Optimizer],
        config: EngineConfig,
        device: torch.device,
    ) -> None:
        self._optimizer = make_optimizer(detector)
        self._clip_norm = config.clip_norm
        self._parameters = list(detector.parameters())
        total = TotalLoss(detector, config.precision, device)
        self._model = DistributedDataParallel(
            total, device_ids=[device.index] if device.type == "cuda" else None
        )

    def step(self, batch: Batch) -> None:
        """Take one step."""
        total, _ = self._model(batch)
        total.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Time a step that all ranks begin together."""
    distributed.barrier()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    distributed.barrier()
    return time.perf_counter() - started


def _communication(step: Callable[[], None]) -> float:
    """Return the seconds that collectives took in a step."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    distributed.barrier()
    with profile(activities=activities) as profiler:
        step()
    micro_seconds = sum(
        max(event.cpu_time_total, event.device_time_total)
        for event in profiler.key_averages()
        if event.key.startswith(COLLECTIVES)
    )
    return float(micro_seconds / 1e6)


def _state_tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield all tensors that hold weights or optimizer state on this rank."""
    for parameter in module.parameters():
        yield getattr(parameter, "_local_tensor", parameter.data)
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor
    for owner, values in optimizer.state.items():
        yield getattr(owner, "_local_tensor", owner)
        for value in values.values():
            yield getattr(value, "_local_tensor", value)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of memory behind tensors, counting shared memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _formula(name: str, sizes: list[tuple[int, bool]], num_states: int) -> float:
    """Return how many numbers a rank should hold; see the module's docstring."""
    weights = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    ranks = distributed.world_size()
    if name == "zero0":
        return weights + num_states * trained
    if name in ("zero1", "zero2"):
        return weights + (num_states + 1) * trained / ranks
    return (weights + num_states * trained) / ranks
