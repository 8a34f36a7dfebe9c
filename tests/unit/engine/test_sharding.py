"""Which ranks shard together, and which parameters may be sent in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bigdet.config.engine import EngineConfig
from bigdet.distributed import SharedError
from bigdet.engine.precision import autocast, rounded_parameters
from bigdet.engine.sharding import ranks_per_node, stage_of_run
from bigdet.host import launchers

AB = ["a", "a", "b", "b"]


def test_ranks_of_a_node_are_what_the_launcher_says_or_those_of_a_host() -> None:
    assert ranks_per_node(AB, [0, 0, 0, 0]) == 2
    assert ranks_per_node(AB, [2, 2, 2, 2]) == 2
    assert ranks_per_node(["a"] * 4, [2] * 4) == 2  # nodes that a test makes of one machine
    assert ranks_per_node(["a"] * 4, [0] * 4) == 4
    assert ranks_per_node(["a"], [0]) == 1


@pytest.mark.parametrize(
    ("hosts", "numbers", "words"),
    [
        (["a", "a", "b"], [0, 0, 0], "different numbers of ranks: {'a': 2, 'b': 1} of 3"),
        (["a"] * 5, [2] * 5, "different numbers of ranks: {'a': 2} of 5"),
        (["a", "b", "a", "b"], [2] * 4, "not those of a node: ['a', 'b', 'a', 'b']"),
        (["a", "b"], [1, 1], "each node has one rank"),
    ],
)
def test_nodes_that_cannot_shard_alike_are_refused(
    hosts: list[str], numbers: list[int], words: str
) -> None:
    with pytest.raises(SharedError) as caught:
        ranks_per_node(hosts, numbers)
    assert words in str(caught.value)
    assert "engine.shard_over: all" in str(caught.value)


def test_launchers_say_how_many_ranks_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert launchers.ranks_on_host() == 0
    monkeypatch.setenv("LOCAL_SIZE", "4")  # deepspeed
    assert launchers.ranks_on_host() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # torchrun
    assert launchers.ranks_on_host() == 8


class Scaled(nn.Conv2d):
    """A convolution that does something else with its weight before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.sum()


def test_only_what_autocast_casts_may_be_sent_rounded() -> None:
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "convolution": nn.Conv2d(3, 4, 1, bias=False),
            "deconvolution": nn.ConvTranspose2d(4, 3, 2),
            "norm": nn.LayerNorm(4),
            "scaled": Scaled(3, 4, 1),
            "embedding": nn.Embedding(4, 4),
            "tied": nn.Linear(4, 4, bias=False),
        }
    )
    module["tied"].weight = module["embedding"].weight
    rounded = {id(parameter) for parameter in rounded_parameters(module)}
    names = {name for name, each in module.named_parameters() if id(each) in rounded}
    assert names == {
        "linear.weight", "linear.bias", "convolution.weight", "deconvolution.weight",
        "deconvolution.bias",
    }  # fmt: skip
    # Under autocast their layers compute the same with weights that were rounded before.
    images, rows = torch.randn(2, 3, 4, 4), torch.randn(2, 4)
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        exact = [module["linear"](rows), module["deconvolution"](module["convolution"](images))]
        for parameter in rounded_parameters(module):
            parameter.copy_(parameter.bfloat16())
        after = [module["linear"](rows), module["deconvolution"](module["convolution"](images))]
    torch.testing.assert_close(after, exact, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ranks", "options", "expected"),
    [
        (1, {"zero_stage": 2}, 0),
        (1, {"zero_stage": 3, "precision": "bf16"}, 0),
        (2, {"zero_stage": 2}, 2),
        (1, {"zero_stage": 1, "offload": "optimizer"}, 1),
        (1, {"zero_stage": 3, "gather_precision": "bf16"}, 3),
        (1, {"zero_stage": 3, "reduce_precision": "bf16"}, 3),
    ],
)
def test_one_rank_shares_nothing_unless_it_offloads_or_rounds(
    ranks: int, options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert stage_of_run(EngineConfig(**options)) == expected
