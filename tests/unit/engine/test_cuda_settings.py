"""Settings of CUDA: what is set, what undoes it, and that the user's own go before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bigdet.config.device import DeviceConfig
from bigdet.config.resize import ResizeConfig
from bigdet.engine import cuda_settings

MEMORY = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (MEMORY, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # else what is set in the test would stay
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("is_on", [True, False])
def test_each_option_undoes_its_setting(is_on: bool) -> None:
    cuda_settings.apply(DeviceConfig(tf32=is_on, expandable_segments=is_on))
    assert torch.backends.cuda.matmul.allow_tf32 is is_on
    assert torch.backends.cudnn.allow_tf32 is is_on
    assert os.environ[MEMORY] == ("expandable_segments:True" if is_on else "")


def test_a_run_on_a_cpu_leaves_the_variable_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda_settings.apply(DeviceConfig(expandable_segments=True))
    assert os.environ[MEMORY] == ""


@pytest.mark.parametrize("name", [MEMORY, "PYTORCH_ALLOC_CONF"])
def test_the_users_variable_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    cuda_settings.apply(DeviceConfig())
    assert os.environ[name] == "max_split_size_mb:128"
    assert [os.environ[MEMORY], os.environ["PYTORCH_ALLOC_CONF"]].count("") == 1


@pytest.mark.parametrize(
    ("options", "has_few"),
    [
        ({"kind": "direct"}, True),
        ({"kind": "jitter"}, True),
        ({"kind": "short_side", "pad_to": "two_shapes"}, True),
        ({"kind": "stitcher", "pad_to": "two_shapes"}, True),
        ({"kind": "short_side"}, False),
        ({"kind": "short_side", "pad_to": "two_shapes", "sizes": [64, 96]}, False),
        ({"kind": "short_side", "pad_to": "two_shapes", "size_range": (64, 96)}, False),
    ],
)
@pytest.mark.parametrize("wanted", [None, True, False])
def test_convolutions_are_tried_where_shapes_are_few(
    options: dict[str, Any], has_few: bool, wanted: bool | None
) -> None:
    config = DeviceConfig(cudnn_benchmark=wanted)
    with cuda_settings.chosen_convolutions(config, ResizeConfig(size=64, **options)):
        assert torch.backends.cudnn.benchmark is (has_few if wanted is None else wanted)
    assert torch.backends.cudnn.benchmark is False  # in an evaluation
