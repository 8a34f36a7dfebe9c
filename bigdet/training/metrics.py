"""What a run measures: losses, speed, memory, and the images it has seen."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigdet import distributed
from bigdet.data.examples.samples import Damage
from bigdet.structures import Batch
from bigdet.training.energy import EnergyCounter
from bigdet.training.pace import find_straggler
from bigdet.training.state import Cost, RunState

_GIB = 1 << 30
SHOWN_WAITING = 0.05
"""From this part of the time on, the line of the console has the rank that others wait for."""


class StepMeter:
    """Counts this rank's images and seconds until ``sync`` or ``rates`` adds up all ranks."""

    def __init__(self, device: torch.device) -> None:
        """Start from zero, and from the present value of the device's energy counter."""
        self._interval_steps = 0
        self._interval = torch.zeros(3, dtype=torch.float64)  # images, step and data seconds
        # Not yet in the state: images, instances, pixels; step, data and evaluation seconds; CPU
        # seconds of steps and of evaluations.
        self._unsynced = torch.zeros(8, dtype=torch.float64)
        self._unsynced_steps = 0
        self._dropped_boxes = 0  # of this rank, at the last sync
        self._is_cpu = device.type == "cpu"
        self._energy = EnergyCounter(device)
        self._joules = self._energy.joules()  # at the last sync

    def add(
        self,
        micro_batches: Sequence[Batch],
        step_seconds: float,
        data_seconds: float,
        cpu_seconds: float = 0.0,
    ) -> None:
        """Count one step of this rank; the batches are on the host, so this never waits for a GPU.

        Args:
            micro_batches: all of the step.
            step_seconds: time of the whole step, including the wait for data.
            data_seconds: time of the wait for data.
            cpu_seconds: CPU time of all threads of this process.
        """
        counts = sum((_count(batch) for batch in micro_batches), torch.zeros(3))
        seconds = torch.tensor([step_seconds, data_seconds], dtype=torch.float64)
        self._interval += torch.cat([counts[:1], seconds])
        self._unsynced[:5] += torch.cat([counts, seconds])
        self._unsynced[6] += cpu_seconds
        self._interval_steps += 1
        self._unsynced_steps += 1

    def add_hidden_wait(self, seconds: float) -> None:
        """Note a part of the waits for data in which the device still computed: none of them."""
        self._interval[2] -= seconds
        self._unsynced[4] -= seconds

    def add_evaluation(self, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Count an evaluation: elapsed time and CPU time of this rank."""
        self._unsynced[5] += seconds
        self._unsynced[7] += cpu_seconds

    def sync(self, state: RunState, damages: Mapping[int, Damage], dropped_boxes: int) -> None:
        """Add the counts of all ranks since the last call to the state (a collective).

        Args:
            state: changed in place.
            damages: samples that this rank's stream has replaced so far, by row.
            dropped_boxes: boxes that a crop has removed entirely so far, in this rank's stream.
        """
        joules = self._energy.joules()
        own = [dropped_boxes - self._dropped_boxes, joules - self._joules]
        self._dropped_boxes, self._joules = dropped_boxes, joules
        images, instances, pixels, seconds, waited, evaluated, cpu, cpu_evaluated, dropped, used = (
            distributed.sum_over_ranks(
                torch.cat([self._unsynced, self._unsynced.new_tensor(own)])
            ).tolist()
        )
        cost = Cost(
            steps=self._unsynced_steps,
            images=round(images),
            instances=round(instances),
            pixels=round(pixels),
            compute_gpu_seconds=seconds - waited,
            data_gpu_seconds=waited,
            evaluation_gpu_seconds=evaluated,
            energy_joules=None if math.isnan(used) else used,
            cpu_seconds=cpu if self._is_cpu else None,
            evaluation_cpu_seconds=cpu_evaluated if self._is_cpu else None,
        )
        state.costs.setdefault(state.phase, Cost()).add(cost)
        state.dropped_boxes += round(dropped)
        state.seen.images += cost.images
        state.seen.instances += cost.instances
        state.seen.pixels += cost.pixels
        state.seen.gpu_seconds += seconds
        self._unsynced.zero_()
        self._unsynced_steps = 0
        kinds = {row: damage.kind for row, damage in damages.items()}
        for found in distributed.all_gather_objects(kinds):
            for row in sorted(found.keys() - set(state.damaged_rows)):
                state.damaged[found[row]] = state.damaged.get(found[row], 0) + 1
                state.damaged_rows.append(row)

    def rates(self, forward_seconds: float = 0.0, ideal_seconds: float = 0.0) -> dict[str, float]:
        """Return speed and memory of the interval since the last call (a collective).

        Args:
            forward_seconds: of this rank's forward passes in it, 0 if not known.
            ideal_seconds: of its micro-batches' FLOPs at its device's peak, 0 if not known.

        Returns:
            Numbers by their names in ``metrics.jsonl``. ``straggler/rank`` and
            ``straggler/waiting`` (see ``pace.find_straggler``) only of more than one rank, ``mfu``
            (model FLOPs utilization) only where every rank knows its ideal.
        """
        more = self._interval.new_tensor([forward_seconds, ideal_seconds, peak_memory_gib()])
        rows = distributed.stack_over_ranks(torch.cat([self._interval, more])).numpy()
        images, step_seconds, data_seconds, _, ideal, _ = rows.sum(axis=0).tolist()
        rank_steps = self._interval_steps * distributed.world_size()
        self._interval.zero_()
        self._interval_steps = 0
        rates = {
            "time/step_seconds": step_seconds / rank_steps,
            "time/data_seconds": data_seconds / rank_steps,
            "images_per_second": images * distributed.world_size() / step_seconds,
            "memory_gib": rows[:, 5].max().item(),
        }
        if len(rows) > 1:
            slowest, waiting = find_straggler(step_seconds / len(rows), rows[:, 2], rows[:, 3])
            rates |= {"straggler/rank": slowest, "straggler/waiting": waiting}
        if rows[:, 4].all():
            rates["mfu"] = ideal / step_seconds
        return rates


def _count(batch: Batch) -> Tensor:
    """Return images, instances that are not crowd, and pixels, without masked slots: ``(3,)``."""
    counts = batch.weights > 0
    image_of_object = torch.repeat_interleave(batch.targets.offsets.diff())
    instances = (counts[image_of_object] & ~batch.targets.is_crowd).sum()
    pixels = (batch.image_sizes.prod(dim=1) * counts).sum()
    return torch.stack([counts.sum(), instances, pixels]).double()


def peak_memory_gib() -> float:
    """Return this rank's peak memory so far, GiB: of its GPU, or resident memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _GIB if sys.platform == "darwin" else peak * 1024 / _GIB


def mean_losses(losses: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of losses over all ranks (a collective), by logged name."""
    names = list(losses)
    values = torch.stack([losses[name].detach().double() for name in names])
    means = distributed.mean_over_ranks(values).tolist()
    return {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)}


def progress_line(values: dict[str, Any], steps: int) -> str:
    """Return the line of the console during training.

    Args:
        values: the line of ``metrics.jsonl``.
        steps: length of the phase, from which the time left follows at the speed of this line.
    """
    seconds_left = values["time/step_seconds"] * (steps - values["step"])
    parts = " ".join(
        f"{key.removeprefix('loss/')} {_shown(value)}"
        for key, value in values.items()
        if key.startswith("loss/") and key != "loss/total"
    )
    wait = values["time/data_seconds"] / values["time/step_seconds"]
    speed = f"{values['images_per_second']:.1f} images/s"
    if "mfu" in values:
        speed += f"  MFU {values['mfu']:.0%}"
    waits = f"data wait {wait:.0%}"
    if (waiting := values.get("straggler/waiting", 0.0)) >= SHOWN_WAITING:
        waits += f"  wait for rank {values['straggler/rank']} {waiting:.0%}"
    if "goodput" in values:
        waits += f"  goodput {values['goodput']:.0%}"
    total = _shown(values["loss/total"])
    return (
        f"{values['phase']} {values['step']}/{steps}  loss {total} ({parts})  "
        f"lr {values['lr']:.2e}  {speed}  {waits}  {values['memory_gib']:.1f} GiB  "
        f"{clock(seconds_left)} left"
    )


def _shown(loss: float | None) -> str:
    """Format a loss; a dash if no step was finite."""
    return "-" if loss is None else f"{loss:.3f}"


def clock(seconds: float) -> str:
    """Return a time span as ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
