"""A step on many GPUs, predicted from one GPU's step, the model's sizes and the links.

The model, for n GPUs, P weights of which P_t are trained, A micro-batches per GPU and step:

- **Computing.** A micro-batch takes the measured seconds whatever n is (each GPU has its own
  images): a third of them forward, two thirds backward (the backward pass has two matrix products
  for each one of the forward pass).
- **A collective** over n GPUs carries ``(n-1)/n`` of its bytes once (all-gather, reduce-scatter)
  or twice (all-reduce, which is one after the other) over every GPU's link, which is optimal for
  rings (Patarasuk and Yuan, *Bandwidth optimal all-reduce algorithms*, 2009; nccl-tests,
  PERFORMANCE.md). Rings through several hosts are limited by the slower of a GPU's link inside its
  host and all adapters of a host together, as every ring leaves a host through one of them. Each
  call adds ``2 ceil(log2 n)`` latencies, as trees need (NCCL 2.4, double binary trees); the bytes
  are divided into several calls.
- **Bytes** (Rajbhandari et al., *ZeRO*, 2020, sections 5 and 7, with bigdet's types: weights,
  gradients and all that is sent are fp32 in any precision).
  ZeRO-0: one all-reduce of gradients per step. ZeRO-1: a reduce-scatter of gradients and an
  all-gather of weights per step. ZeRO-2: the same, the reduce-scatter once per micro-batch. ZeRO-3
  and FSDP2: per micro-batch, weights gathered in the forward and again in the backward pass, and
  gradients scattered.
- **Overlap.** On GPUs, gradients are sent during the backward pass of their micro-batch, and
  weights are gathered during the pass that needs them. A GPU waits for the time by which sending
  exceeds the pass, and for one call at least: a bucket is sent when it is full. ZeRO-1 and 2 wait
  for their gathered weights. On CPUs nothing overlaps.
- **Memory.** fp32: weights 4P, gradients 4 P_t, optimizer state 4 P_t for each of its tensors (with
  AdamW 16 bytes per weight, as the 2+2+12 of ZeRO's section 3.1); at ZeRO-1 and 2 a rank updates a
  copy of its part of the trained weights. Sharded over n: optimizer state from stage 1 on,
  gradients from 2, weights from 3. A frozen backbone of F weights has 2F bytes, sharded from 3 on
  and gathered in the forward pass alone. Activations and what the allocator keeps: the measured
  peak of one GPU minus these.

Not included: the optimizer's time, which sharding shortens; waiting for the slowest host; data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigdet.engine.base import BUCKET_ELEMENTS
from bigdet.training.sizes import BF16_BYTES, FP32_BYTES, ModelSizes

KINDS = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
_FORWARD_PART = 1 / 3
_UNITS = 20
"""Calls in which stage 3 and FSDP2 gather a detector: stages of the backbone and heads."""
_ACHIEVED = 0.8
"""Part of a link's nominal speed that collectives reach (nccl-tests on H100: 360 of 450 GB/s)."""
LINKS = {"nvlink3": 300e9, "nvlink": 450e9, "nvlink5": 900e9, "pcie4": 32e9, "pcie5": 64e9}
"""Nominal bytes per second of a GPU's link, one direction; nvlink is that of H100 and H200."""


@dataclass(frozen=True)
class Cluster:
    """How the GPUs are connected.

    Attributes:
        inside: bytes per second that a GPU's link inside its host carries.
        between: bytes per second of the network adapter of each GPU.
        latency: seconds of one message.
        overlaps: whether communication overlaps with computation.
    """

    gpus_per_host: int
    inside: float
    between: float
    latency: float
    overlaps: bool = True

    def seconds(self, num_bytes: float, gpus: int, calls: int, passes: int = 1) -> float:
        """Return the time of collectives.

        Args:
            num_bytes: size of the whole tensor.
            gpus: number of GPUs that take part, n.
            calls: number of calls into which the bytes are divided.
            passes: 1 for an all-gather or reduce-scatter, 2 for an all-reduce.
        """
        if gpus == 1:
            return 0.0
        per_host = min(gpus, self.gpus_per_host)
        speed = self.inside if per_host > 1 else math.inf
        if gpus > self.gpus_per_host:
            speed = min(speed, self.between * per_host)
        hops = passes * math.ceil(math.log2(gpus))
        return passes * (gpus - 1) / gpus * num_bytes / speed + calls * hops * self.latency


@dataclass(frozen=True)
class Work:
    """What one GPU does in a step.

    Attributes:
        sizes: numbers of weights of the model.
        optimizer_tensors: fp32 numbers that the optimizer keeps per trained weight.
        micro_batch_seconds: forward and backward on one GPU.
        activation_bytes: peak memory of one GPU minus weights, gradients and optimizer state.
        micro_batches: number per GPU and step, A.
    """

    sizes: ModelSizes
    optimizer_tensors: int
    micro_batch_seconds: float
    activation_bytes: float
    micro_batches: int


@dataclass(frozen=True)
class Forecast:
    """One way of sharding on a number of GPUs.

    Attributes:
        kind: one of ``KINDS``.
        waiting_seconds: the part of a step spent waiting for communication.
        memory_bytes: peak of one GPU.
        efficiency: computing over step time, in (0, 1].
    """

    kind: str
    step_seconds: float
    waiting_seconds: float
    memory_bytes: float
    efficiency: float


def forecast(kind: str, gpus: int, cluster: Cluster, work: Work) -> Forecast:
    """Predict the step of one kind."""
    computing = work.micro_batches * work.micro_batch_seconds
    waiting = _waiting(kind, gpus, cluster, work) if gpus > 1 else 0.0
    step = computing + waiting
    memory = state_bytes(kind, gpus, work) + work.activation_bytes
    return Forecast(kind, step, waiting, memory, computing / step)


def _waiting(kind: str, gpus: int, cluster: Cluster, work: Work) -> float:
    """Return the seconds of a step in which a GPU waits for others."""
    forward = _FORWARD_PART * work.micro_batch_seconds
    backward = work.micro_batch_seconds - forward
    trained = work.sizes.trained
    gradients = FP32_BYTES * trained

    def exposed(seconds: float, computing: float, calls: int) -> float:
        return max(seconds - computing, seconds / calls) if cluster.overlaps else seconds

    if kind in ("ZeRO-3", "FSDP2"):
        weights = FP32_BYTES * work.sizes.parameters
        gather = cluster.seconds(weights, gpus, _UNITS)
        first = cluster.seconds(weights + BF16_BYTES * work.sizes.frozen, gpus, _UNITS)
        scatter = cluster.seconds(gradients, gpus, _UNITS)
        once = exposed(first, forward, _UNITS) + exposed(gather + scatter, backward, _UNITS)
        return work.micro_batches * once
    calls = math.ceil(trained / BUCKET_ELEMENTS)
    if kind == "ZeRO-0":
        return exposed(cluster.seconds(gradients, gpus, calls, passes=2), backward, calls)
    scatter = exposed(cluster.seconds(gradients, gpus, calls), backward, calls)
    gather = cluster.seconds(FP32_BYTES * trained, gpus, calls)
    return scatter * (work.micro_batches if kind == "ZeRO-2" else 1) + gather


def state_bytes(kind: str, gpus: int, work: Work) -> float:
    """Return the bytes of weights, gradients and optimizer state on each GPU."""
    stage = {"FSDP2": 3}.get(kind) or KINDS.index(kind)
    weights = FP32_BYTES * (work.sizes.parameters + work.sizes.buffers)
    gradients = FP32_BYTES * work.sizes.trained
    optimizer = work.optimizer_tensors * gradients
    if kind in ("ZeRO-1", "ZeRO-2") and gpus > 1:  # one rank runs ZeRO-0
        optimizer += FP32_BYTES * work.sizes.trained  # DeepSpeed updates a copy
    shares = [1 / gpus if stage >= first else 1.0 for first in (3, 2, 1)]
    sharded = weights * shares[0] + gradients * shares[1] + optimizer * shares[2]
    return sharded + BF16_BYTES * work.sizes.frozen * shares[0]


def best(forecasts: list[Forecast], room_bytes: float) -> Forecast | None:
    """Return the fastest that fits, the simplest of those within 2% of it; None if none fits."""
    fitting = [one for one in forecasts if one.memory_bytes <= room_bytes]
    if not fitting:
        return None
    fastest = min(one.step_seconds for one in fitting)
    return next(one for one in fitting if one.step_seconds <= 1.02 * fastest)


def link_speed(name: str) -> float:
    """Return the speed that collectives reach on a link, bytes per second.

    Args:
        name: one of ``LINKS``, or gigabits per second such as ``400gb``.

    Raises:
        ValueError: it is neither.
    """
    if name in LINKS:
        return _ACHIEVED * LINKS[name]
    try:
        gigabits = float(name.removesuffix("gb"))
    except ValueError:
        gigabits = 0.0
    if not name.endswith("gb") or not 0 < gigabits < math.inf:
        raise ValueError(
            f"--link: found {name}, expected one of {', '.join(LINKS)}, or gigabits per second "
            f"such as 400gb."
        )
    return _ACHIEVED * gigabits * 1e9 / 8
