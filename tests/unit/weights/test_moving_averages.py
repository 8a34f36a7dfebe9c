"""Files with plain weights and their moving average: which are taken, and that it is said."""

from __future__ import annotations

import argparse
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.weights.tensor_files import read_tensors

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
NAMES = ("conv1.weight", "layer1.0.bn1.running_mean")


def weights(value: float, prefix: str = "") -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, torch.full((2,), value)) for name in NAMES)


def averaged_model() -> dict[str, Tensor]:
    """The state of torch's AveragedModel around DistributedDataParallel."""
    return {"n_averaged": torch.tensor(7), **weights(2.0, "module.")}


PLAIN = weights(1.0)
FILES: dict[str, dict[str, Any]] = {
    "timm": {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": PLAIN,
             "state_dict_ema": weights(2.0)},
    "torchvision": {"model": PLAIN, "model_ema": averaged_model()},
    "convnext": {"model": PLAIN, "model_ema": weights(2.0)},
    "detr": {"model": PLAIN, "ema": {"module": weights(2.0), "updates": 9}},
    "state": {"state_dict": PLAIN, "ema_state_dict": averaged_model()},
    "camel": {"model": PLAIN, "modelEMA": weights(2.0)},
    "torch": {"model": PLAIN, "averaged_model": averaged_model(), "exp_avg": weights(3.0)},
    "swa": {"state_dict": PLAIN, "swa_state_dict": averaged_model()},
    "inner": {"model": {"state_dict": PLAIN, "ema": weights(2.0)}},
    "mmcv": {"state_dict": PLAIN | {
        "ema_conv1_weight": torch.full((2,), 2.0),
        "ema_layer1_0_bn1_running_mean": torch.full((2,), 2.0)}},
    "prefix": {"state_dict": PLAIN | weights(2.0, "model_ema.")},
    "wrapped prefix": {**PLAIN, **weights(2.0, "ema.module.")},
}  # fmt: skip
"""1 is plain, 2 the average."""


def values(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_plain_weights_are_taken_unless_the_average_is_asked_for(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(FILES[name], file)
    with caplog.at_level(logging.INFO, "bigdet"):
        assert values(read_tensors(file)[0]) == dict.fromkeys(NAMES, 1.0)
        assert "moving average" in caplog.messages[-1]
        assert "taken are the plain ones" in caplog.messages[-1]
        assert values(read_tensors(file, ema=True)[0]) == dict.fromkeys(NAMES, 2.0)
        assert "taken are the moving average" in caplog.messages[-1]
        assert values(read_tensors(file, ema=False)[0]) == dict.fromkeys(NAMES, 1.0)


def test_mmengine_has_the_average_in_the_usual_place(tmp_path: Path) -> None:
    # Its EMAHook exchanges the two before it saves: "the original model parameters are actually
    # saved in ema field".
    content = {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": weights(2.0),
        "ema_state_dict": {"steps": torch.tensor(5), **weights(1.0, "module.")},
    }
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    assert values(read_tensors(file)[0]) == dict.fromkeys(NAMES, 2.0)
    assert values(read_tensors(file, ema=True)[0]) == dict.fromkeys(NAMES, 2.0)
    assert values(read_tensors(file, ema=False)[0]) == dict.fromkeys(NAMES, 1.0)


def test_safetensors_with_both(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({**PLAIN, **weights(2.0, "ema_model.")}, file)
    assert values(read_tensors(file)[0]) == dict.fromkeys(NAMES, 1.0)
    assert values(read_tensors(file, ema=True)[0]) == dict.fromkeys(NAMES, 2.0)


def test_an_average_of_parameters_alone_has_the_statistics_of_the_plain_weights(
    tmp_path: Path,
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": PLAIN, "ema": {"shadow": {NAMES[0]: torch.full((2,), 2.0)}}}, file)
    assert values(read_tensors(file, ema=True)[0]) == {NAMES[0]: 2.0, NAMES[1]: 1.0}


def test_a_file_with_one_set_has_no_choice(tmp_path: Path) -> None:
    plain, average = tmp_path / "plain.pth", tmp_path / "average.pth"
    torch.save({"state_dict": PLAIN, "ema": {"decay": 0.99}, "model_ema": None}, plain)
    torch.save({"model": None, "ema": weights(2.0)}, average)
    assert values(read_tensors(plain)[0]) == dict.fromkeys(NAMES, 1.0)
    assert values(read_tensors(average)[0]) == dict.fromkeys(NAMES, 2.0)
    with pytest.raises(ValueError, match=r"plain\.pth: found no moving average \(EMA\)"):
        read_tensors(plain, ema=True)
    with pytest.raises(ValueError, match=r"average\.pth: found no plain weights"):
        read_tensors(average, ema=False)


@pytest.mark.parametrize("source", ["random", "timm"])
def test_the_option_is_for_files(source: str) -> None:
    key = "phases.pretrain.start_from"
    with pytest.raises(ConfigError, match=rf"{key}\.ema: is for files"):
        load_config(CONFIG, [f"{key}.source={source}", f"{key}.ema=true"])
