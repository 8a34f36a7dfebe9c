"""A detector of quickstart's shape with random weights, in a file as a run leaves it."""

from pathlib import Path

import torch

from bigdet.config.load import load_config
from bigdet.models.build import build_detector
from bigdet.models.weights import save_detector_weights, weights_metadata

ROOT = Path(__file__).parents[2]
SMALL = ["model.width=32", "model.fc_width=32", "model.roi.score_threshold=0.0"]


def save_detector(folder, categories):
    """Write ``folder/model.safetensors``; categories are dicts with id and name."""
    folder.mkdir()
    config = load_config(ROOT / "configs" / "quickstart.yaml", SMALL)
    torch.manual_seed(0)
    detector = build_detector(config.model, len(categories))
    metadata = weights_metadata(config, categories, "finetune")
    save_detector_weights(folder / "model.safetensors", detector, metadata)
    return folder
