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
  gradients and all that is sent are fp32 in any precision, unless ``engine.gather_precision`` or
  ``reduce_precision`` says otherwise).
  ZeRO-0: one all-reduce of gradients per step. ZeRO-1: a reduce-scatter of gradients and an
  all-gather of weights per step. ZeRO-2: the same, the reduce-scatter once per micro-batch. ZeRO-3
  and FSDP2: per micro-batch, weights gathered in the forward and again in the backward pass, and
  gradients scattered. With ``engine.shard_over: node`` both are done inside each host, and each GPU
  all-reduces its share of the gradients with its copies on other hosts, over its own adapter, in
  the last micro-batch (`engine/fsdp_engine.py`). A frozen backbone is gathered from all GPUs.
- **Overlap.** On GPUs, gradients are sent during the backward pass of their micro-batch, and
  weights are gathered during the pass that needs them. A GPU waits for the time by which sending
  exceeds the pass, and for one call at least: a bucket is sent when it is full. ZeRO-1 and 2 wait
  for their gathered weights. On CPUs no overlap is counted.
- **Memory.** fp32: weights 4P, gradients 4 P_t, optimizer state 4 P_t for each of its tensors (with
  AdamW 16 bytes per weight, as the 2+2+12 of ZeRO's section 3.1); at ZeRO-1 and 2 a rank updates a
  copy of its part of the trained weights. Sharded over n: optimizer state from stage 1 on,
  gradients from 2, weights from 3; with ``shard_over: node`` over the GPUs of a host. A frozen
  backbone of F weights has 2F bytes, by default sharded from 3 on (``engine.shard_frozen``), and
  gathered in the forward pass alone. Activations and what the allocator keeps: the measured
  peak of one GPU minus these.

Not included: the optimizer's time, which sharding shortens; waiting for the slowest host; data.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from bigdet.config.engine import EngineConfig, gathers_bf16
from bigdet.engine.averaging import SENT_ELEMENTS
from bigdet.engine.base import BUCKET_ELEMENTS
from bigdet.training.sizes import BF16_BYTES, FP32_BYTES, ModelSizes

KINDS = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
SHARDED = ("ZeRO-3", "FSDP2")
"""Kinds that divide weights; the others do as with the default of each option about that."""
_DEFAULT = EngineConfig()
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
        traffic: what is sent.
    """

    kind: str
    step_seconds: float
    waiting_seconds: float
    memory_bytes: float
    efficiency: float
    traffic: Traffic


@dataclass(frozen=True)
class Traffic:
    """Bytes that are sent in a step.

    Attributes:
        inside: by each GPU to others of its host.
        between: by each host to others.
    """

    inside: float
    between: float


def forecast(
    kind: str, gpus: int, cluster: Cluster, work: Work, engine: EngineConfig = _DEFAULT
) -> Forecast:
    """Predict the step of one kind, with the options of an engine about what is sharded."""
    computing = work.micro_batches * work.micro_batch_seconds
    waiting = _waiting(kind, gpus, cluster, work, engine) if gpus > 1 else 0.0
    step = computing + waiting
    memory = state_bytes(kind, gpus, work, cluster.gpus_per_host, engine) + work.activation_bytes
    sent = traffic(kind, gpus, cluster.gpus_per_host, work, engine)
    return Forecast(kind, step, waiting, memory, computing / step, sent)


def _shards(kind: str, gpus: int, gpus_per_host: int, engine: EngineConfig) -> int:
    """Return how many GPUs divide one copy of what a kind divides."""
    is_within = kind in SHARDED and engine.shard_over == "node"
    return min(gpus, gpus_per_host) if is_within else gpus


def _shares_frozen(kind: str, engine: EngineConfig) -> bool:
    """Return whether all GPUs share a frozen backbone."""
    return kind in SHARDED if engine.shard_frozen is None else engine.shard_frozen


def _gathered_bytes(kind: str, work: Work, engine: EngineConfig) -> float:
    """Return the bytes of the weights that one gather sends."""
    if kind not in SHARDED:
        return FP32_BYTES * work.sizes.trained
    own = dataclasses.replace(engine, kind="fsdp" if kind == "FSDP2" else "deepspeed")
    rounded = work.sizes.rounded if gathers_bf16(own) else 0
    return FP32_BYTES * (work.sizes.parameters - rounded) + BF16_BYTES * rounded


def _reduced_bytes(kind: str, work: Work, engine: EngineConfig) -> float:
    """Return the bytes of the gradients that one reduction sends."""
    is_half = kind in SHARDED and engine.reduce_precision == "bf16"
    return (BF16_BYTES if is_half else FP32_BYTES) * work.sizes.trained


def _exchanges(kind: str, work: Work, engine: EngineConfig) -> int:
    """Return how many times per step the copies of different hosts average gradients."""
    is_each = kind == "FSDP2" and (engine.reduce_precision == "bf16" or engine.offload != "none")
    return work.micro_batches if is_each else 1


def traffic(
    kind: str, gpus: int, gpus_per_host: int, work: Work, engine: EngineConfig = _DEFAULT
) -> Traffic:
    """Return what is sent in a step; over several hosts, what a ring sends on each of its ways."""
    over = _shards(kind, gpus, gpus_per_host, engine)
    gathered, reduced = (of(kind, work, engine) for of in (_gathered_bytes, _reduced_bytes))
    times = work.micro_batches
    numbers = {  # of gathers, and of scatters
        "ZeRO-0": (0, 2),  # an all-reduce is a scatter and a gather
        "ZeRO-1": (1, 1),
        "ZeRO-2": (1, times),
        "ZeRO-3": (2 * times, times),
        "FSDP2": (2 * times, times),
    }[kind]
    sharded = (over - 1) / over * (numbers[0] * gathered + numbers[1] * reduced)
    frozen: float = times * BF16_BYTES * work.sizes.frozen * _shares_frozen(kind, engine)
    frozen *= (gpus - 1) / gpus
    copies = math.ceil(gpus / over)
    between = 2 * _exchanges(kind, work, engine) * (copies - 1) / copies * reduced
    if gpus > gpus_per_host:
        between += frozen + (sharded if over > gpus_per_host else 0.0)
    return Traffic(sharded + frozen if gpus_per_host > 1 else 0.0, between)


def _waiting(kind: str, gpus: int, cluster: Cluster, work: Work, engine: EngineConfig) -> float:
    """Return the seconds of a step in which a GPU waits for others."""
    forward = _FORWARD_PART * work.micro_batch_seconds
    backward = work.micro_batch_seconds - forward
    gathered, reduced = (of(kind, work, engine) for of in (_gathered_bytes, _reduced_bytes))
    frozen = BF16_BYTES * work.sizes.frozen * _shares_frozen(kind, engine)

    def exposed(seconds: float, computing: float, calls: int) -> float:
        return max(seconds - computing, seconds / calls) if cluster.overlaps else seconds

    if kind in SHARDED:
        over = _shards(kind, gpus, cluster.gpus_per_host, engine)
        gather = cluster.seconds(gathered, over, _UNITS)
        first = gather + cluster.seconds(frozen, gpus, _UNITS if frozen else 0)
        scatter = cluster.seconds(reduced, over, _UNITS)
        alone = dataclasses.replace(cluster, gpus_per_host=1)  # a copy on each host
        copies = math.ceil(gpus / over)
        exchange = alone.seconds(reduced / over, copies, _UNITS, passes=2)
        exchanges = _exchanges(kind, work, engine)
        return (
            work.micro_batches * exposed(first, forward, _UNITS)
            + (work.micro_batches - exchanges) * exposed(gather + scatter, backward, _UNITS)
            + exchanges * exposed(gather + scatter + exchange, backward, _UNITS)
        )
    sent = SENT_ELEMENTS if kind == "ZeRO-0" else BUCKET_ELEMENTS
    calls = math.ceil(work.sizes.trained / sent)
    first = cluster.seconds(frozen, gpus, _UNITS if frozen else 0)
    waiting = work.micro_batches * exposed(first, forward, _UNITS)
    if kind == "ZeRO-0":
        once = cluster.seconds(reduced, gpus, calls, passes=2)
        return waiting + exposed(once, backward, calls)
    scatter = exposed(cluster.seconds(reduced, gpus, calls), backward, calls)
    gather = cluster.seconds(gathered, gpus, calls)
    return waiting + scatter * (work.micro_batches if kind == "ZeRO-2" else 1) + gather


def state_bytes(
    kind: str,
    gpus: int,
    work: Work,
    gpus_per_host: int | None = None,
    engine: EngineConfig = _DEFAULT,
) -> float:
    """Return the bytes of weights, gradients and optimizer state on each GPU.

    Args:
        kind: one of ``KINDS``.
        gpus: number of GPUs.
        work: of a GPU.
        gpus_per_host: None: all are in one.
        engine: its options about what is sharded.
    """
    stage = {"FSDP2": 3}.get(kind) or KINDS.index(kind)
    weights = FP32_BYTES * (work.sizes.parameters + work.sizes.buffers)
    gradients = FP32_BYTES * work.sizes.trained
    optimizer = work.optimizer_tensors * gradients
    if kind in ("ZeRO-1", "ZeRO-2") and gpus > 1:  # one rank runs ZeRO-0
        optimizer += FP32_BYTES * work.sizes.trained  # DeepSpeed updates a copy
    over = _shards(kind, gpus, gpus_per_host or gpus, engine)
    shares = [1 / over if stage >= first else 1.0 for first in (3, 2, 1)]
    sharded = weights * shares[0] + gradients * shares[1] + optimizer * shares[2]
    frozen = BF16_BYTES * work.sizes.frozen / (gpus if _shares_frozen(kind, engine) else 1)
    return sharded + frozen


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
