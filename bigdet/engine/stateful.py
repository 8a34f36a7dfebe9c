"""What all engines have in common: rates of groups, averages of weights, saving and loading."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bigdet.engine.base import Launched, Shapes, StepResult, check_fits, has_optimizer_state
from bigdet.engine.ema import MovingAverage
from bigdet.engine.parts import Part, Share, Source, copy_share, fill
from bigdet.engine.precision import LossScale
from bigdet.engine.sharding import Sharding
from bigdet.pieces.index import MODEL, NEWEST


class StatefulEngine(ABC):
    """The part of an ``Engine`` that is the same for all ways to shard.

    An engine sets the attributes, and says what of each tensor its rank holds.
    """

    module: nn.Module
    _optimizer: Optimizer
    _keys: list[str]  # what it keeps of each parameter
    _shapes: Shapes
    _trained: dict[str, Any]  # by name
    _scale: LossScale
    _sharding: Sharding
    _ema: MovingAverage | None
    _last: Launched | None = None
    _owed: float | None = None  # decay of the update of the average that the last step is due

    @abstractmethod
    def launch_step(self, micro_batches: Iterable[Any]) -> Launched:
        """Take one optimizer step; its result can be read later."""

    def train_step(self, micro_batches: Iterable[Any]) -> StepResult:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks."""
        return self.launch_step(micro_batches).read()

    @abstractmethod
    def _weights(self, kind: str, names: Iterable[str]) -> list[Part]:
        """Give what this rank holds of parameters and buffers, as they are now."""

    @abstractmethod
    def _optimizer_parts(self) -> list[Part]:
        """Give what this rank holds of the optimizer state, nothing before there is any."""

    @abstractmethod
    def _make_optimizer_state(self) -> None:
        """Make room for the optimizer state, as a first step would."""

    def _setting(self) -> contextlib.AbstractContextManager[None]:
        """Let weights be set inside a block, and take them over at its end."""
        return contextlib.nullcontext()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps, times each group's own factor."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    def update_ema(self, decay: float) -> None:
        """Move the average of the weights towards the newest ones, before they change again.

        By then the device is usually done with the step, so that nothing waits for its verdict.
        """
        self._owed = decay

    def _settle_ema(self) -> None:
        """Do what `update_ema` has put off: before weights change, and the average is used."""
        owed, self._owed = self._owed, None
        if self._ema is not None and owed is not None:
            assert self._last is not None
            if self._last.read().is_finite:
                self._ema.update(owed)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Give the module the average of the weights inside a block. Collective."""
        self._settle_ema()
        return contextlib.nullcontext() if self._ema is None else self._ema.in_place()

    def _newest(self) -> list[Part]:
        """Give what this rank holds of the weights that training continues from."""
        if self._ema is None:
            return self._weights(MODEL, self._shapes)
        return self._weights(NEWEST, self._ema.names)

    def share(self, position: int, size: int) -> Share:
        """Copy what this rank saves; see ``parts.copy_share``. Collective."""
        self._settle_ema()
        shards = self._sharding.ranks
        share = copy_share(self._newest() + self._optimizer_parts(), position, size, shards)
        if self._ema is not None:
            with self._ema.in_place():
                weights = self._weights(MODEL, self._shapes)
                averages = copy_share(weights, position, size, shards)
            share = share.with_more(averages)
        return dataclasses.replace(share, loss_scale=self._scale.state())

    def begin(self, source: Source) -> None:
        """Take the weights to start from, reading this rank's part of them. Collective."""
        check_fits(source.catalog, self._shapes, self._trained, self._keys)
        with self._setting():
            fill(self._weights(MODEL, self._shapes), source)
        if self._ema is not None:
            self._ema.restart()

    def load_state(self, source: Source) -> None:
        """Continue from what was saved, reading this rank's part of it. Collective.

        Raises:
            SharedError: on every rank, when the state is that of another model or optimizer.
        """
        self._owed = None
        averaged = () if self._ema is None else self._ema.names
        check_fits(source.catalog, self._shapes, self._trained, self._keys, averaged)
        self._optimizer.state.clear()
        if has_optimizer_state(source.catalog):
            self._make_optimizer_state()
        if self._ema is not None:
            with self._ema.in_place(), self._setting():
                fill(self._weights(MODEL, self._shapes), source)
        with self._setting():
            fill(self._newest() + self._optimizer_parts(), source)
        self._scale.load_state(source.loss_scale)
