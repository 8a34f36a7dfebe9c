"""A user's own backbone, detector, board and source of shards, without a change in bigdet."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from bigdet import train
from bigdet.cli import make_shards
from bigdet.config.model import ModelConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.models import backbone_base
from bigdet.models.build import build_detector
from bigdet.models.weights import load_detector
from tests.unit.models.scenes import make_scene

NETS = Path(__file__).parents[1] / "own_nets.py"
CONFIG = """
output: {folder}/run
data: {{train: {{shards: {folder}/shards}}, val: {{shards: {folder}/shards}}, workers: 0}}
model: {{backbone: "their_nets:Plain", detector: "their_nets:points", norm: bn}}
engine: {{kind: fsdp, zero_stage: null, precision: fp32, activation_checkpointing: true}}
phases:
  train:
    steps: 2
    images_per_gpu: 2
    images_per_step: 4
    resize: {{kind: short_side, size: 64, cap: 64}}
    norm_mode: live
    lr: 0.01
    warmup_steps: 0
log: {{every: 1, tensorboard: false, boards: ["their_nets:File"]}}
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module of theirs and four pictures; it is importable."""
    shutil.copy(NETS, tmp_path / "their_nets.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "their_nets", None)  # as before afterwards
    del sys.modules["their_nets"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for x, y in ((4, 8), (30, 20), (40, 40), (10, 30)):
        picture = Image.new("RGB", (64, 64), (90, 90, 90))
        ImageDraw.Draw(picture).rectangle((x, y, x + 19, y + 19), (200, 0, 0))
        picture.save(pictures / f"{x}-{y}.png")
    return tmp_path


def test_each_kind_is_added_from_outside(theirs: Path, in_process: None) -> None:
    words = ["--root", str(theirs / "pictures"), "--out", str(theirs / "shards")]
    assert make_shards.main(["their_nets:squares", *words, "--processes", "1"]) == 0
    shards = ShardSet(theirs / "shards")
    assert [category.name for category in shards.categories] == ["square"]
    assert [shards.record(row)["annotations"][0]["bbox"] for row in range(4)] == [
        [10, 30, 20, 20],
        [30, 20, 20, 20],
        [4, 8, 20, 20],
        [40, 40, 20, 20],
    ]

    config = theirs / "config.yaml"
    config.write_text(CONFIG.format(folder=theirs))
    assert train.main([str(config)]) == 0
    run = theirs / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss/point_class" in line]
    assert [line["step"] for line in losses] == [1, 2]
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line] == [0.0]  # after 2 steps
    assert {"loss/point_box", "loss/total"} <= set(losses[0])
    shown = (run / "boards/their_nets.File/lines.txt").read_text().splitlines()
    assert shown[0] == "from 1 their_nets:Plain"
    assert shown[-1] == "closed"
    own = {line.split()[0]: json.loads(line.partition(" ")[2]) for line in shown if "loss/" in line}
    assert own["2"]["loss/point_box"] == losses[1]["loss/point_box"]

    sys.modules.pop("their_nets")  # as in another process
    detector = load_detector(run)
    assert type(detector.backbone).__name__ == "Plain"
    assert [name for name, _ in detector.named_children()] == ["backbone", "points"]
    statistics = detector.get_buffer("backbone.blocks.0.1.norm.running_mean")
    assert bool((statistics != 0).all())  # the norms of theirs follow norm_mode
    (found,) = detector.predict([theirs / "pictures/4-8.png"])
    assert len(found.boxes) <= 5


def test_steps_bring_their_losses_down(theirs: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(backbone="their_nets:Plain", detector="their_nets:points", norm="gn")
    detector = build_detector(config, 3)
    batch = make_scene([[(4, 4, 30, 28)], [(0, 0, 64, 64)]], [(64, 64), (64, 64)], (64, 64))
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    totals = []
    for _ in range(5):
        loss = sum(detector(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < totals[0]
    assert len(detector.units) == 6  # five stages, and the head


def test_the_ten_lines_of_the_documentation_are_those_that_were_tried() -> None:
    text = textwrap.dedent(str(backbone_base.__doc__).partition("lines:\n")[2])
    lines = text[text.index("class Plain") :].split("\n\n")[0].rstrip().splitlines()
    assert len(lines) == 10
    assert "\n".join(line.removeprefix("  ") for line in lines) in NETS.read_text()
