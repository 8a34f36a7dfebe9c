"""The engines on a GPU against plain PyTorch on a CPU, and a run that is killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.commands.runs import Command
from tests.commands.runs import weights as weights_of_run
from tests.ranks.toy import (
    ENGINES,
    OFFLOADS,
    STEPS,
    make_engine,
    run_steps,
    train_plainly,
    weights,
)
from tests.spawn import run_ranks

pytestmark = pytest.mark.gpu
CASES = [(name, "none") for name in ENGINES] + [
    (name, offload) for name, offloads in OFFLOADS.items() for offload in offloads
]


def trained(name: str, offload: str) -> tuple[list[float], list[float], dict[str, Tensor] | None]:
    """Train on this rank's GPU."""
    torch.backends.cudnn.allow_tf32 = False
    engine = make_engine(name, "adamw", clip_norm=0.5, offload=offload)
    losses, norms = run_steps(engine, "adamw", range(1, STEPS + 1))
    return losses, norms, weights(name, engine)


@pytest.mark.parametrize(("name", "offload"), CASES)
def test_an_engine_trains_as_plain_pytorch_does_on_a_cpu(
    name: str, offload: str, tmp_path: Path
) -> None:
    [(losses, norms, found)] = run_ranks(trained, 1, tmp_path, name, offload, gpus="0")
    expected_losses, expected_norms, expected = train_plainly("adamw", clip_norm=0.5)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    "engine", [["engine.zero_stage=2"], ["engine.kind=fsdp", "engine.zero_stage=null"]]
)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    engine: list[str], tmp_path: Path, shapes_shards: Path
) -> None:
    code, printed = Command(tmp_path / "whole", shapes_shards, *engine).finish()
    assert code == 0, printed
    killed = Command(tmp_path / "killed", shapes_shards, *engine)
    killed.wait_for("pretrain", 5)
    killed.kill()
    code, printed = Command(tmp_path / "killed", shapes_shards, *engine).finish()
    assert code == 0, printed
    expected = weights_of_run(tmp_path / "whole")
    for name, value in weights_of_run(tmp_path / "killed").items():
        # Sums on a GPU are in no fixed order.
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3, msg=name)
