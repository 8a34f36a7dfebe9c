"""The configs and sweeps in ``configs/``, each loaded once for all tests that look at them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bigdet.config.load import load_config, read_unchecked
from bigdet.config.run import RunConfig
from bigdet.config.sweep import PlannedRun, SweepConfig, load_sweep

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG_NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SWEEP_NAMES = sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.yaml"))


@cache
def sweep_of(name: str) -> tuple[SweepConfig, dict[str, PlannedRun]]:
    """A sweep and its runs by name."""
    sweep, runs = load_sweep(CONFIGS / "sweeps" / f"{name}.yaml")
    return sweep, {run.name: run for run in runs}


@cache
def config_of(name: str) -> RunConfig:
    """The config of a file, or of one run of a sweep as ``SWEEP:RUN``."""
    sweep, _, run = name.partition(":")
    return sweep_of(sweep)[1][run].config if run else load_config(CONFIGS / f"{name}.yaml")


def unchecked(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A config that the rules need not allow, such as one shorter than its warm-up."""
    return read_unchecked(path, overrides)[0]
