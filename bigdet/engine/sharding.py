"""Which ranks divide the weights between them: all, or those of each node, which has a copy then.

Ranks are numbered node by node, so that a node's are consecutive.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigdet import distributed
from bigdet.config.engine import EngineConfig, gathers_bf16
from bigdet.host import launchers


@dataclass(frozen=True)
class Sharding:
    """How this rank shares what is sharded with others.

    Attributes:
        ranks: how many ranks divide one copy between them.
        shard_group: these ranks, of which this is one; None: all ranks.
        copy_group: the ranks that hold the same as this one; None: no other does.
    """

    ranks: int
    shard_group: dist.ProcessGroup | None = None
    copy_group: dist.ProcessGroup | None = None

    @property
    def copies(self) -> int:
        """How many copies of the weights all ranks together hold."""
        return distributed.world_size() // self.ranks

    @property
    def position(self) -> int:
        """Number of this rank among those that divide a copy."""
        return distributed.rank() % self.ranks

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the ranks as FSDP2 wants them: in one row, or a row for each copy."""
        if self.shard_group is None or self.copy_group is None:
            return init_device_mesh(device.type, (self.ranks,))
        rows = torch.arange(distributed.world_size()).view(self.copies, self.ranks)
        groups = [self.copy_group, self.shard_group]
        return DeviceMesh.from_group(groups, device.type, rows, mesh_dim_names=("copy", "shard"))


def find_sharding(config: EngineConfig, device: torch.device) -> Sharding:
    """Find out which ranks shard together, by `engine.shard_over` (collective).

    Raises:
        SharedError: the ranks of the nodes do not allow it.
    """
    world_size = distributed.world_size()
    if config.shard_over == "all":
        return Sharding(world_size)
    found = distributed.all_gather_objects((socket.gethostname(), launchers.ranks_on_host()))
    ranks = ranks_per_node([host for host, _ in found], [number for _, number in found])
    if ranks == world_size:
        return Sharding(ranks)
    return Sharding(ranks, *_groups(ranks, device.type))


def ranks_per_node(hosts: Sequence[str], numbers: Sequence[int]) -> int:
    """Return how many ranks each node has.

    Args:
        hosts: name of each rank's host.
        numbers: of ranks on it by each rank's launcher; 0 where that does not say.

    Raises:
        SharedError: nodes have different numbers of ranks, or one each, or their ranks are not
            consecutive.
    """
    counts = [number or hosts.count(host) for host, number in zip(hosts, numbers, strict=True)]
    ranks, problem = counts[0], ""
    nodes = [set(hosts[first : first + ranks]) for first in range(0, len(hosts), ranks)]
    if len(set(counts)) > 1 or len(hosts) % ranks:
        listed = sorted(set(zip(hosts, counts, strict=True)))[:8]
        problem = f"nodes have different numbers of ranks: {dict(listed)} of {len(hosts)}"
    elif any(len(names) > 1 for names in nodes):
        problem = f"ranks 0 to {ranks - 1} and so on are not those of a node: {list(hosts[:16])}"
    elif ranks == 1 < len(hosts):
        problem = "each node has one rank, so that nothing would be sharded"
    if problem:
        raise distributed.SharedError(
            f"engine.shard_over: found node, but {problem}. Start equally many ranks on each node, "
            f"at least 2, and number them node by node; or write engine.shard_over: all. How many "
            f"a node has is what the launcher says in LOCAL_WORLD_SIZE, else ranks of a host count."
        )
    return ranks


def stage_of_run(config: EngineConfig) -> int:
    """Return the stage that trains as the config says with the least memory and waiting.

    One rank has nobody to share with: stages 1 to 3 would keep copies of weights and gradients
    there, and wait for the device in each backward pass and step.
    """
    assert config.zero_stage is not None
    is_alone = distributed.world_size() == 1 and config.offload == "none"
    is_exact = config.reduce_precision == "fp32" and not gathers_bf16(config)
    return 0 if is_alone and is_exact else config.zero_stage


@functools.cache
def _groups(ranks: int, device: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make, once per process, the groups of this rank: of its node, and of its copies."""
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(torch.device(device)).options._timeout
    rows = torch.arange(distributed.world_size()).view(-1, ranks)
    node, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)
    copies, _ = dist.new_subgroups_by_enumeration(rows.T.tolist(), timeout=timeout)
    assert isinstance(node, dist.ProcessGroup)
    assert isinstance(copies, dist.ProcessGroup)
    return node, copies
