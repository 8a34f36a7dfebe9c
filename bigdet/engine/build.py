"""From the config to an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.engine.base import Engine, MakeOptimizer


def build_engine(
    module: nn.Module,
    make_optimizer: MakeOptimizer,
    config: EngineConfig,
    num_micro_batches: int,
    device: torch.device,
    units: Sequence[Sequence[nn.Module]],
    *,
    with_ema: bool = False,
) -> Engine:
    """Build the engine that the config names around a module.

    Args:
        module: the same on every rank, with ``requires_grad`` set; with its weights, or with
            parameters on the meta device, whose weights the engine's ``begin`` brings.
        make_optimizer: gives SGD or AdamW over what is trained in the module.
        config: the engine section.
        num_micro_batches: of this rank per step, the same on every rank.
        device: of this rank.
        units: modules that FSDP2 shards and gathers together, each called in a forward pass.
        with_ema: keep a moving average of what is trained.
    """
    # Here, because deepspeed takes seconds to import.
    engine: Engine
    if config.kind == "fsdp":
        from bigdet.engine.fsdp_engine import FsdpEngine

        engine = FsdpEngine(
            module, make_optimizer, config, num_micro_batches, device, units, with_ema=with_ema
        )
    else:
        from bigdet.engine.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(
            module, make_optimizer, config, num_micro_batches, device, with_ema=with_ema
        )
    distributed.limit_waiting()
    return engine
