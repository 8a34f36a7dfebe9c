"""Whether a saved state fits a module and its optimizer."""

from __future__ import annotations

import torch
from torch import nn

from bigdet.engine.base import Shapes, misfits, state_keys, weight_shapes
from bigdet.pieces.index import Catalog
from bigdet.pieces.tensor_file import Spec


def make_module() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[0].bias.requires_grad_(False)
    return module


TRAINED = {"0.weight": (2, 3), "1.weight": (2,), "1.bias": (2,)}


def fits_to() -> tuple[Shapes, list[str]]:
    return weight_shapes(make_module()), list(TRAINED)


def make_catalog() -> Catalog:
    return {
        "model": {name: Spec("F32", shape) for name, shape in fits_to()[0].items()},
        "momentum_buffer": {name: Spec("F32", shape) for name, shape in TRAINED.items()},
    }


def test_state_of_the_same_module_fits_with_and_without_optimizer_state() -> None:
    catalog = make_catalog()
    assert misfits(catalog, *fits_to(), ["momentum_buffer"]) == ""
    del catalog["momentum_buffer"]
    assert misfits(catalog, *fits_to(), ["momentum_buffer"]) == ""


def test_missing_unexpected_and_reshaped_weights_are_named() -> None:
    model = make_catalog()["model"]
    model["0.weight"] = Spec("F32", (4, 3))
    model["2.weight"] = model.pop("1.running_mean")
    assert misfits({"model": model}, *fits_to(), []) == (
        "weights: 1 missing (1.running_mean), 1 unexpected (2.weight), "
        "1 reshaped (0.weight (4, 3) instead of (2, 3))"
    )


def test_state_of_another_optimizer_does_not_fit() -> None:
    assert misfits(make_catalog(), *fits_to(), ["exp_avg", "exp_avg_sq", "step"]).startswith(
        "optimizer state: 9 missing (0.weight/exp_avg, 0.weight/exp_avg_sq, 0.weight/step), 3 un"
    )


def test_state_keys_are_those_that_torch_optimizers_keep() -> None:
    for make in (torch.optim.SGD, torch.optim.AdamW):
        for settings in ({}, {"momentum": 0.9}) if make is torch.optim.SGD else ({},):
            weight = nn.Parameter(torch.ones(2))
            optimizer = make([weight], lr=0.1, foreach=True, **settings)
            weight.sum().backward()
            optimizer.step()
            kept = {key for key, value in optimizer.state[weight].items() if value is not None}
            assert kept == set(state_keys(optimizer))
