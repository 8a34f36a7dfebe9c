"""Which image sizes and batches fit into a GPU: equation 1 of paper 2, without its accuracy.

The paper chooses the resolution and the batch of pre-training so that accuracy is highest while
memory stays below a target. Which of the settings on the boundary trains best is for the user to
try; this module finds the boundary. Few settings of the grid are measured; for the others, with n
images of size s in a micro-batch,

    memory  = m0 + m1 n s^2 + m2 n        seconds = t0 + t1 n s^2 + t2 n

with all six 0 or more: m0 is weights, gradients, optimizer state and libraries; activations grow
with the pixels; the heads process as many regions of an image at any size.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bigdet.config.phase import PhaseConfig
from bigdet.config.rules import ConfigError
from bigdet.planning.trials import Measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Setting:
    """A size and a batch.

    Attributes:
        size: ``resize.size``, pixels.
        images: ``images_per_gpu``.
    """

    size: int
    images: int

    def __str__(self) -> str:
        return f"{self.size}x{self.images}"


@dataclass(frozen=True)
class Line:
    """A function that is linear in the terms of a setting: 1, images x pixels, images."""

    factors: tuple[float, float, float]

    def at(self, setting: Setting) -> float:
        """Return the value of a setting."""
        return float(np.dot(_terms(setting), self.factors))


def _terms(setting: Setting) -> tuple[float, float, float]:
    return 1.0, float(setting.images * setting.size**2), float(setting.images)


def fit_line(values: dict[Setting, float]) -> Line:
    """Return the line with the least sum of squared relative errors, no factor below 0."""
    target = np.ones(len(values))
    table = np.array([_terms(one) for one in values]) / np.array(list(values.values()))[:, None]
    best: tuple[float, NDArray[np.float64]] | None = None
    for number in (1, 2, 3):
        for used in map(list, itertools.combinations(range(3), number)):
            scale = table[:, used].max(axis=0)  # pixels are a million times images
            found = np.linalg.lstsq(table[:, used] / scale, target, rcond=None)[0] / scale
            error = float(((table[:, used] @ found - target) ** 2).sum())
            # Of those that explain it equally well, the one with the fewest terms.
            if found.min() >= 0 and (best is None or error < best[0] - 1e-12):
                factors = np.zeros(3)
                factors[used] = found
                best = error, factors
    assert best is not None  # 1 term of positive numbers has a positive factor
    first, second, third = best[1].tolist()
    return Line((first, second, third))


@dataclass
class Search:
    """Looks for the largest settings of a grid of sizes and batches that fit into a memory.

    Attributes:
        sizes: of the grid, ascending.
        batches: images per GPU of the grid, ascending.
        room_gib: memory that a setting may take.
        take: measures a setting; None when it ran out of memory.
        shift_gib: memory of a GPU of the run minus that of the one that measures; may be negative.
        measured: results so far; None where the memory was full.
    """

    sizes: Sequence[int]
    batches: Sequence[int]
    room_gib: float
    take: Callable[[Setting], Measured | None]
    shift_gib: float = 0.0
    measured: dict[Setting, Measured | None] = field(default_factory=dict)

    def run(self, num_trials: int) -> None:
        """Measure three small settings, then those on the boundary, the largest first."""
        size, batch = self.sizes[0], self.batches[0]
        first = [(size, batch), (size, self.batches[:2][-1]), (self.sizes[:2][-1], batch)]
        for setting in dict.fromkeys(Setting(*one) for one in first):
            if not self._cannot_fit(setting):
                self._measure(setting)
            if self.measured == {setting: None}:
                return  # not even the smallest
        while len(self.measured) < num_trials:
            unknown = [one for one in self.boundary() if one not in self.measured]
            if not unknown:
                break
            self._measure(max(unknown, key=self.memory_gib))

    def _measure(self, setting: Setting) -> None:
        found = self.take(setting)
        self.measured[setting] = found
        if found is None:
            logger.info("%s: out of memory", setting)
        else:
            logger.info("%s: %.2f GiB, %.3f s", setting, found.gib, found.seconds)

    def known(self) -> dict[Setting, Measured]:
        """Return the results of the settings that did not run out of memory."""
        return {one: found for one, found in self.measured.items() if found is not None}

    def memory_gib(self, setting: Setting) -> float:
        """Return the memory of a setting, as measured or predicted."""
        found = self.measured.get(setting)
        return self.predicted_gib(setting) if found is None else found.gib + self.shift_gib

    def predicted_gib(self, setting: Setting) -> float:
        """Return the memory that the fit gives a setting, measured or not."""
        values = {one: found.gib for one, found in self.known().items()}
        return fit_line(values).at(setting) + self.shift_gib

    def predicted_seconds(self, setting: Setting) -> float:
        """Return the seconds of a step that the fit gives."""
        return fit_line({one: found.seconds for one, found in self.known().items()}).at(setting)

    def _cannot_fit(self, setting: Setting) -> bool:
        """Return whether a setting with no larger size and batch ran out of memory."""
        failed = [one for one, found in self.measured.items() if found is None]
        return any(o.size <= setting.size and o.images <= setting.images for o in failed)

    def fits(self, setting: Setting) -> bool:
        """Return whether a setting is known or predicted to fit."""
        return not self._cannot_fit(setting) and self.memory_gib(setting) <= self.room_gib

    def boundary(self) -> list[Setting]:
        """Return the settings that fit while no larger size or batch of the grid does, by size."""
        if not self.known():
            return []
        grid = [Setting(*one) for one in itertools.product(self.sizes, self.batches)]
        fitting = [one for one in grid if self.fits(one)]
        return [
            one
            for one in fitting
            if not any(o != one and o.size >= one.size and o.images >= one.images for o in fitting)
        ]

    def most_images(self, size: int) -> int:
        """Return how many images of a size are predicted to fit, also between those of the grid."""
        rate = self.predicted_gib(Setting(size, 1)) - self.predicted_gib(Setting(size, 0))
        left = self.room_gib - self.predicted_gib(Setting(size, 0))
        return max(0, math.floor(left / rate)) if rate > 0 else 0


def overrides(name: str, phase: PhaseConfig, setting: Setting) -> list[str]:
    """Return the options that give a phase a setting.

    Ranks and micro-batches per step stay, so images per step change with the batch; the learning
    rate follows by the linear rule, as in the paper.
    """
    key, resize = f"phases.{name}", phase.resize
    words = [f"{key}.resize.size={setting.size}", f"{key}.images_per_gpu={setting.images}"]
    if resize.cap is not None:
        words.append(f"{key}.resize.cap={round(resize.cap * setting.size / resize.size)}")
    if phase.images_per_step is not None and setting.images != phase.images_per_gpu:
        lanes = phase.images_per_step // phase.images_per_gpu
        words.append(f"{key}.images_per_step={lanes * setting.images}")
        if phase.reference_images_per_step is None:
            words.append(f"{key}.reference_images_per_step={phase.images_per_step}")
    return words


def check_one_size(name: str, phase: PhaseConfig) -> None:
    """Refuse a phase that trains at several sizes."""
    for option in ("sizes", "size_range"):
        if (found := getattr(phase.resize, option)) is not None:
            raise ConfigError(
                f"phases.{name}.resize.{option}: found {found}, expected null: memory is planned "
                f"for one size. Plan with {option}=null, and use the result as the largest size."
            )


def read_setting(text: str) -> Setting:
    """Read ``384x6``: size and images per GPU."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--check: found {text}, expected a size and images per GPU, such as 384x6."
        )
    return Setting(int(parts[0]), int(parts[1]))


def read_numbers(option: str, text: str) -> list[int]:
    """Read ``224,320,448``: numbers above 0, as a sorted list without repetition."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: found {text}, expected numbers above 0, with commas.")
    return sorted({int(part) for part in parts})
