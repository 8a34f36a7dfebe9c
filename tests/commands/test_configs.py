"""Every shipped config and sweep loads, passes the checks and builds; one of each kind trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet import train
from bigdet.config.load import dump_config
from bigdet.config.model import ModelConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.run import RunConfig, check_config
from bigdet.data.making.sources.coco import convert_coco
from bigdet.models.backbones.build import build_backbone
from bigdet.sweep import check_forks
from bigdet.training.sizes import model_sizes
from tests.shipped import CONFIG_NAMES, CONFIGS, SWEEP_NAMES, config_of, sweep_of
from tests.spawn import run_ranks

NUM_CLASSES = 3
_built: set[str] = set()


def build(config: RunConfig) -> None:
    """Build the detector of each phase on the meta device, frozen as the phase asks for, once."""
    for name, phase in config.phases.items():
        key = f"{config.model}{phase.model}{phase.norm_mode}{phase.freeze_stages}"
        if key not in _built:
            _built.add(key)
            assert model_sizes(config, name, NUM_CLASSES).trained > 1_000_000


def check_head(text: str, command: str) -> None:
    """Check that the comment at the top gives hardware, number, whether it was run, and how."""
    lines = text.splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    told = " ".join(line.removeprefix("# ") for line in head)
    for words in (
        r"Sized for \d+ GPUs|[Tt]wo CPU cores",
        r"\d\.\d.* AP|AP.* \d+\.\d|No number to expect",
        r"Not run yet|Seen: ",
    ):
        assert re.search(words, told), f"nothing at the top like {words}"
    assert any(re.fullmatch(f"#   {command}", line) for line in head)


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_config_builds_and_says_what_it_is(name: str):
    config = config_of(name)
    check_config(config)
    build(config)
    ranks = r"--(num_gpus \d|hostfile launch/hostfile)"
    command = rf"deepspeed {ranks} -m bigdet\.train configs/{name}\.yaml"
    if name == "quickstart":
        command = r"bash launch/quickstart\.sh"
    check_head((CONFIGS / f"{name}.yaml").read_text(), command)


@pytest.mark.parametrize("name", SWEEP_NAMES)
def test_every_run_of_every_sweep_builds(name: str):
    sweep, runs = sweep_of(name)
    check_forks(list(runs.values()))
    for run in runs.values():
        build(run.config)
    assert sweep.output == f"runs/{name}"
    text = (CONFIGS / "sweeps" / f"{name}.yaml").read_text()
    check_head(text, rf"bigdet sweep configs/sweeps/{name}\.yaml")
    # Nothing is trained twice.
    configs = [dump_config(run.config).replace(run.name, "") for run in runs.values()]
    assert len(set(configs)) == len(configs)


KINDS = [
    "r50_direct", "r50_gn_cascade", "r50_syncbn_scratch", "r50_imagenet", "r50_gn_imagenet",
    "r50_lsj_scratch", "retinanet_r50_direct", "swin_t_direct", "vgg16_scratch", "voc_r101_gn",
    "keypoint_r50_gn", "objects365_direct",
    "less_data:random_1k", "presets:paper", "presets:stitcher", "table1:size_224_batch_2",
    "table2:direct_affine", "table5:fpn", "table6:direct_p1x_2x", "table8:cascade_direct",
    "syncbn:r50_imagenet_6x",
]  # fmt: skip
"""Configs, and runs of sweeps that are like none of them."""


def tiny(name: str, folder: Path) -> list[str]:
    """The words of a command that trains a config for 2 steps a phase on 16 images, in seconds."""
    sweep, _, run = name.partition(":")
    words = sweep_of(sweep)[1][run].words if run else [str(CONFIGS / f"{name}.yaml")]
    words = [word for word in words if not word.startswith(("resume=", "checkpoint.at="))]
    config, shards = config_of(name), folder / "shapes"
    if config.model.detector == "keypoint_rcnn":
        shards = folder / "points"
        words += ["model.keypoint.num_keypoints=3", "model.keypoint.width=32"]
    words += [
        f"output={folder / name}",
        "data.workers=0",
        "engine.precision=fp32",
        f"data.train.shards={shards}/train",
        f"data.val.shards={shards}/val",
        "engine.zero_stage=0",
        "evaluation.resize=null",
        "evaluation.every=null",
        "evaluation.images_per_gpu=4",
        "evaluation.pictures=0",
        "log.tensorboard=false",
    ]
    words += [
        f"phases.{key}.data.{split}.shards={shards}/{split}"
        for key, phase in config.phases.items()
        for split in ("train", "val")
        if getattr(phase.data, split) is not None
    ]
    if config.data.train.more_shards:
        words.append(f"data.train.more_shards=[{shards}/val]")
    if config.data.train.subset is not None:
        words.append("data.train.subset.images=10")
    if config.model.backbone.startswith(("res", "swin_b")):  # one Swin is enough
        words += ["model.backbone=resnet10", "model.drop_path=0"]
    if config.model.backbone != "vgg16":  # its width is that of its features
        words.append("model.width=32")
    if config.model.detector != "retinanet":
        words += [
            "model.fc_width=32",
            "model.rpn.train_proposals=50",
            "model.rpn.test_proposals=20",
            "model.roi.rois_per_image=16",
        ]
    for key, phase in config.phases.items():
        words += [f"phases.{key}.{option}" for option in tiny_phase(phase, config.model, folder)]
    return words


def tiny_phase(phase: PhaseConfig, model: ModelConfig, folder: Path) -> list[str]:
    """Options of a phase of 2 steps of 4 images, in the unit that the phase has for its length."""
    resize, source = phase.resize, phase.start_from.source
    length = {"steps": "2", "passes": "0.5", "images": "8"}  # 16 images are 4 steps
    unit = next(unit for unit in length if getattr(phase, unit) is not None)
    drops = "null" if phase.drops is None else {"steps": "[-1]", "passes": "[0.25]"}[unit]
    words = [
        f"{unit}={length[unit]}",
        f"drops={drops}",
        f"warmup_steps={min(1, phase.warmup_steps)}",
        "images_per_gpu=2",
        "images_per_step=4",
        "resize.size=64",
    ]
    words += ["resize.cap=96"] if resize.cap is not None else []
    words += ["resize.size_range=[48,64]"] if resize.size_range is not None else []
    words += ["resize.sizes=[48,64]"] if resize.sizes is not None else []
    if source is not None and (source == "timm" or source.endswith(".pkl")):
        # Not downloaded: a file as torchvision's.
        words += [f"start_from.source={folder}/{model.norm}.pth", "start_from.pixels=null"]
    elif source is not None and source.startswith("runs/"):
        words.append(f"start_from.source={folder / Path(source).name}")
    return words


def write_points(folder: Path) -> None:
    """Write the sets train and val: 16 images with an object of 3 keypoints each."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(1, 17):
        pixels = np.full((64, 64, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg")
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 64}
            for number in range(1, 17)
        ],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "area": 900.0,
             "bbox": [9, 9, 30, 30], "keypoints": [10, 10, 2, 20, 20, 2, 30, 30, 1],
             "num_keypoints": 3}
            for number in range(1, 17)
        ],
        "categories": [
            {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"],
             "skeleton": [[1, 2]]},
        ],
    }  # fmt: skip
    file = folder / "points.json"
    file.write_text(json.dumps(content))
    for split in ("train", "val"):
        convert_coco(images, file, folder / split)


def train_all(commands: dict[str, list[str]]) -> dict[str, int]:
    """Run the training command again and again; return the exit codes."""
    codes = {}
    for name, words in commands.items():
        try:
            codes[name] = train.main(words)
        except Exception as error:
            raise RuntimeError(name) from error
    return codes


def test_one_of_each_kind_trains(tmp_path: Path, shapes_shards: Path):
    (tmp_path / "shapes").symlink_to(shapes_shards)
    write_points(tmp_path / "points")
    for norm in ("bn", "gn"):
        torch.save(build_backbone("resnet10", norm, 0.0).state_dict(), tmp_path / f"{norm}.pth")
    commands = {name: tiny(name, tmp_path) for name in KINDS}
    # In one process of its own: DeepSpeed keeps its group, so pytest's would not be the same after.
    (codes,) = run_ranks(train_all, 1, tmp_path, commands, timeout_seconds=500)
    assert codes == dict.fromkeys(KINDS, 0)
    for name in KINDS:
        last = list(config_of(name).phases)[-1]
        assert (tmp_path / name / "model.safetensors").is_file(), name
        assert (tmp_path / name / f"evaluation/{last}-2.json").is_file(), name
