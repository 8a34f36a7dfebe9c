"""The engine: how weights are updated, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigdet.config.rules import ConfigError, not_negative, positive, require

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "all"]
SentPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How weights are updated."""

    kind: Literal["deepspeed", "fsdp"] = "deepspeed"
    """``deepspeed`` (ZeRO), or ``fsdp``: torch's FSDP2, which shards as ZeRO-3 does."""
    zero_stage: int | None = 2
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3
    weights too. Must be null under fsdp. One rank has nobody to share with and runs stage 0, unless
    something is offloaded or sent in bf16. With accumulation, stage 1 sends gradients once a step,
    stages 2 and 3 once a micro-batch."""
    shard_over: Literal["all", "node"] = "all"
    """The ranks over which ZeRO-3 and fsdp shard: ``all``, or those of one ``node``, so that each
    node has a whole copy. Then weights are gathered inside a node, and nodes exchange only a rank's
    share of the gradients, once per step (fsdp with offload or ``reduce_precision: bf16``: once per
    micro-batch), but a rank holds as much as on one node alone. All nodes must have equally many
    ranks."""
    precision: Precision = "bf16"
    """Precision of convolutions and matrix products; weights, gradients and their sums are fp32.
    ``fp16`` uses automatic loss scaling."""
    gather_precision: SentPrecision | None = None
    """What ZeRO-3 and fsdp send of the weights of convolutions and linear layers; all others are
    sent in fp32. ``bf16`` is half the traffic. It needs ``precision: bf16``, which rounds the same
    weights to bf16 before it computes with them, so results are the same. None: bf16 under fsdp
    with ``precision: bf16`` (and torch 2.15), where fp32 would leave a bf16 copy of all these
    weights on each rank between the forward and the backward pass; else fp32."""
    reduce_precision: SentPrecision = "fp32"
    """What ZeRO-3 and fsdp send of gradients. ``bf16`` is half the traffic, and sums over ranks are
    rounded to 8 bits. It needs ``precision: bf16``. Weights and optimizer state are fp32 always."""
    offload: Offload = "none"
    """What is kept and updated in CPU memory: ``optimizer`` (its state; ZeRO 1 to 3), or ``all``
    (weights too; ZeRO 3 and fsdp)."""
    activation_checkpointing: bool = False
    """Blocks of the backbone, the FPN and convolutions of the heads keep only their inputs and run
    again in the backward pass: less memory, about a third more time, the same results."""
    shard_frozen: bool | None = None
    """The matrices of a frozen backbone (``freeze: backbone``) are divided over the ranks, and each
    layer is gathered when it runs (so that ``model.compile`` compiles layer by layer); false: every
    rank has all of them. None: divided where weights are (ZeRO-3 and fsdp)."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global L2 norm. None: no clipping."""
    max_bad_steps: int = 20
    """The run stops after more than this many steps with a loss or gradient that is not finite;
    such steps are skipped."""


def gathers_bf16(engine: EngineConfig) -> bool:
    """Return whether weights are sent in bf16."""
    if engine.gather_precision is None:
        return engine.kind == "fsdp" and engine.precision == "bf16"
    return engine.gather_precision == "bf16"


def shards_frozen(engine: EngineConfig) -> bool:
    """Return whether a frozen backbone is divided over the ranks."""
    if engine.shard_frozen is None:
        return engine.kind == "fsdp" or engine.zero_stage == 3
    return engine.shard_frozen


def check_engine(engine: EngineConfig) -> None:
    """Check that stage, sharding and offload fit the kind."""
    positive("engine", engine, "clip_norm")
    not_negative("engine", engine, "max_bad_steps")
    _check_kind(engine)
    _check_sharded(engine)


def _check_kind(engine: EngineConfig) -> None:
    """Check that stage and offload fit the kind."""
    stage, key = engine.zero_stage, "engine.offload"
    if engine.kind == "fsdp":
        if stage is not None:
            raise ConfigError(
                f"engine.zero_stage: found {stage}, but engine.kind is fsdp, which has no stages. "
                f"Write null, or engine.kind: deepspeed."
            )
        if engine.offload == "optimizer":
            raise ConfigError(
                f"{key}: found optimizer, but fsdp steps the optimizer where the weights are. "
                f"Write all or none, or engine.kind: deepspeed."
            )
        return
    require(stage in (0, 1, 2, 3), "engine.zero_stage", stage, "0, 1, 2 or 3 under deepspeed")
    assert stage is not None
    lowest = {"none": 0, "optimizer": 1, "all": 3}[engine.offload]
    if stage < lowest:
        raise ConfigError(
            f"{key}: found {engine.offload}, which needs engine.zero_stage of at least {lowest}, "
            f"found {stage}: only what is sharded can be in CPU memory. Write none, or raise it."
        )


def _check_sharded(engine: EngineConfig) -> None:
    """Check that what is said of sharded weights is said where weights are sharded."""
    chosen = {
        "shard_over": engine.shard_over != "all",
        "gather_precision": engine.gather_precision not in (None, "fp32"),
        "reduce_precision": engine.reduce_precision != "fp32",
    }
    for name in (name for name, is_chosen in chosen.items() if is_chosen):
        key, value = f"engine.{name}", getattr(engine, name)
        if engine.kind == "deepspeed" and engine.zero_stage != 3:
            raise ConfigError(
                f"{key}: found {value}, which needs sharded weights, but engine.zero_stage is "
                f"{engine.zero_stage}. Write engine.zero_stage: 3 or engine.kind: fsdp, or leave "
                f"the option out."
            )
        if value == "bf16" and engine.precision != "bf16":
            raise ConfigError(
                f"{key}: found bf16, which needs engine.precision: bf16, found {engine.precision}. "
                f"Write fp32."
            )
