"""The engine: how weights are updated, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigdet.config.rules import ConfigError, not_negative, positive, require

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How weights are updated."""

    kind: Literal["deepspeed", "fsdp"] = "deepspeed"
    """``deepspeed`` (ZeRO), or ``fsdp``: torch's FSDP2, which shards as ZeRO-3 does."""
    zero_stage: int | None = 2
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3
    weights too. Must be null under fsdp."""
    precision: Precision = "bf16"
    """Precision of convolutions and matrix products; weights, gradients and their sums are always
    fp32. ``fp16`` uses automatic loss scaling."""
    offload: Offload = "none"
    """What is kept and updated in CPU memory: ``optimizer`` (its state; ZeRO 1 to 3), or ``all``
    (weights too; ZeRO 3 and fsdp)."""
    activation_checkpointing: bool = False
    """Blocks of the backbone, the FPN and convolutions of the heads keep only their inputs and run
    again in the backward pass: less memory, about a third more time, the same results."""
    shard_frozen: bool | None = None
    """The matrices of a frozen backbone (``freeze: backbone``) are divided over the ranks, and each
    layer is gathered when it runs; false: every rank has all of them. None: divided where weights
    are (ZeRO-3 and fsdp)."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global L2 norm. None: no clipping."""
    max_bad_steps: int = 20
    """The run stops after more than this many steps with a loss or gradient that is not finite;
    such steps are skipped."""


def shards_frozen(engine: EngineConfig) -> bool:
    """Return whether a frozen backbone is divided over the ranks."""
    if engine.shard_frozen is None:
        return engine.kind == "fsdp" or engine.zero_stage == 3
    return engine.shard_frozen


def check_engine(engine: EngineConfig) -> None:
    """Check that stage and offload fit the kind."""
    positive("engine", engine, "clip_norm")
    not_negative("engine", engine, "max_bad_steps")
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
