from pathlib import Path

import torch

from bigdet.config.load import load_config
from bigdet.training.phases import build_for_phase
from bigdet.training.sizes import ModelSizes, checkpoint_bytes, model_sizes, optimizer_tensors

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def test_sizes_are_those_of_the_detector_that_a_phase_trains(tmp_path: Path):
    small = ["model.width=16", "model.fc_width=16", "phases.finetune.freeze_stages=2"]
    config = load_config(CONFIG, small)
    sizes = model_sizes(config, "finetune", 3)
    # finetune: BN fixed and two stages frozen. As if resumed, so that no weights are looked for.
    detector = build_for_phase(config, "finetune", list("abc"), tmp_path, torch.device("cpu"), True)
    parameters = list(detector.parameters())
    assert sizes.parameters == sum(p.numel() for p in parameters)
    assert sizes.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert 0 < sizes.trained < sizes.parameters
    assert sizes.buffers == sum(buffer.numel() for buffer in detector.buffers())
    assert sizes.buffers > 0


def test_a_checkpoint_has_weights_and_optimizer_state_in_fp32():
    phase = load_config(CONFIG).phases["pretrain"]  # AdamW: two tensors per trained weight
    assert optimizer_tensors(phase) == 2
    assert checkpoint_bytes(ModelSizes(100, 60, 7), phase) == 4 * (100 + 7 + 2 * 60)
    sgd = load_config(CONFIG, ["phases.pretrain.optimizer=sgd"]).phases["pretrain"]
    assert checkpoint_bytes(ModelSizes(100, 60, 7), sgd) == 4 * (100 + 7 + 60)
    plain = load_config(CONFIG, ["phases.pretrain.optimizer=sgd", "phases.pretrain.momentum=0"])
    assert optimizer_tensors(plain.phases["pretrain"]) == 0
    averaged = load_config(CONFIG, ["phases.pretrain.ema.decay=0.99"]).phases["pretrain"]
    assert checkpoint_bytes(ModelSizes(100, 60, 7), averaged) == 4 * (100 + 7 + 3 * 60)
