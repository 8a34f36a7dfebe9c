import json
import os
import subprocess
import sys

import torch
from safetensors import safe_open

from bigdet.models.torchvision_model import torchvision_twin
from bigdet.models.weights import load_detector
from tests.commands.tiny_detector import ROOT, save_detector

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "box"}]


def call(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_weights.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_weights_go_to_torchvision_and_back_with_the_same_detections(tmp_path):
    run = save_detector(tmp_path / "run", CATEGORIES)
    ended = call("to-torchvision", run, tmp_path / "theirs.pth")
    assert ended.returncode == 0, ended.stderr

    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    detector = load_detector(run)
    twin = torchvision_twin(detector)
    twin.load_state_dict(state)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    detector.test_size = (96, 128)
    twin.transform.min_size, twin.transform.max_size = (96,), 128
    (ours,) = detector.predict([image])
    with torch.no_grad():
        (theirs,) = twin([image / 255])
    assert len(ours.boxes) == 100
    # In fp32 near ties may change places: the sums over all are what is compared.
    torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        ours.boxes.mean(dim=0), theirs["boxes"].mean(dim=0), rtol=0.02, atol=1.0
    )

    with safe_open(run / "model.safetensors", framework="pt") as opened:
        (tmp_path / "config.yaml").write_text(opened.metadata()["config"])
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    (tmp_path / "manifest.json").write_text(json.dumps({"categories": CATEGORIES}))
    out = tmp_path / "back.safetensors"
    words = ["from-torchvision", tmp_path / "theirs.pth", tmp_path / "config.yaml"]
    ended = call(*words, "--categories", tmp_path / "manifest.json", "--out", out)
    assert ended.returncode == 0, ended.stderr
    back = load_detector(out)
    assert back.categories == CATEGORIES
    assert back.test_size == load_detector(run).test_size
    for name, value in back.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_what_is_no_weights_file_is_one_message(tmp_path):
    (tmp_path / "theirs.pth").write_bytes(b"no weights")
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    ended = call(
        "from-torchvision", tmp_path / "theirs.pth", ROOT / "configs" / "quickstart.yaml",
        "--categories", tmp_path / "categories.json", "--out", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'theirs.pth'}: cannot be read as a state_dict")
