"""Every shipped config and sweep loads, passes the checks and builds; one of each kind trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdet import train
from bigdet.config.check import check_config
from bigdet.config.load import dump_config, load_config
from bigdet.config.schema import RunConfig
from bigdet.config.sweep import load_sweep
from bigdet.sweep import check_forks
from bigdet.training.sizes import model_sizes
from tests.commands.runs import ROOT
from tests.spawn import run_ranks

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
NUM_CLASSES = 3
_built: set[str] = set()


def build(config: RunConfig) -> None:
    """Build the detector of each phase on the meta device, frozen as the phase asks for, once."""
    for name, phase in config.phases.items():
        key = f"{config.model}{phase.model}{phase.norm_mode}{phase.freeze_stages}"
        if key not in _built:
            _built.add(key)
            assert model_sizes(config, name, NUM_CLASSES).trained > 1_000_000


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_says_what_it_is(path: Path):
    config = load_config(path)
    check_config(config)
    build(config)
    head = path.read_text().split("\ninclude:")[0]
    assert head.startswith("# ")
    assert f"configs/{path.name}" in head or "launch/quickstart.sh" in head


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_every_sweep_builds(path: Path):
    sweep, runs = load_sweep(path)
    check_forks(runs)
    for run in runs:
        build(run.config)
    assert sweep.output == f"runs/{path.stem}"
    assert f"#   python -m bigdet.sweep configs/sweeps/{path.name}\n" in path.read_text()
    # Nothing is trained twice.
    configs = [dump_config(run.config).replace(run.name, "") for run in runs]
    assert len(set(configs)) == len(configs)


def tiny(path: Path, shards: Path, output: Path) -> list[str]:
    """Words that make any config small enough for a second or two."""
    config = load_config(path)
    words = [
        f"output={output}", f"data.train.shards={shards}/train", f"data.val.shards={shards}/val",
        "data.train.more_shards=[]", "data.workers=0", "engine.precision=fp32",
        "engine.zero_stage=0", "evaluation.resize=null", "evaluation.every=null",
        "evaluation.images_per_gpu=4", "evaluation.pictures=0", "log.tensorboard=false",
    ]  # fmt: skip
    if config.model.backbone.startswith("res"):
        words.append("model.backbone=resnet10")
    if config.model.backbone != "vgg16":  # its width is that of its features
        words.append("model.width=32")
    if config.model.detector != "retinanet":
        words += ["model.fc_width=32", "model.rpn.train_proposals=50",
                  "model.rpn.test_proposals=20", "model.roi.rois_per_image=16"]  # fmt: skip
    for name, phase in config.phases.items():
        resize = phase.resize
        options = {
            "steps": 2, "passes": "null", "images": "null", "drops": "null", "warmup_steps": 1,
            "images_per_gpu": 2, "images_per_step": 4, "resize.size": 64,
            "resize.cap": "null" if resize.cap is None else 96,
            "resize.size_range": "null" if resize.size_range is None else "[48,64]",
        }  # fmt: skip
        if phase.start_from.source == "timm":  # nothing is downloaded here
            options |= {"start_from.source": "random", "start_from.cost": "null",
                        "freeze_stages": 0}  # fmt: skip
            if phase.norm_mode is not None:
                options["norm_mode"] = "live"
        words += [f"phases.{name}.{key}={value}" for key, value in options.items()]
    return words


KINDS = [
    "r50_direct", "r50_gn_cascade", "r50_syncbn_scratch", "r50_imagenet", "r50_lsj_scratch",
    "retinanet_r50_direct", "swin_t_direct", "vgg16_scratch", "voc_r50_direct",
]  # fmt: skip


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
    paths = {name: ROOT / "configs" / f"{name}.yaml" for name in KINDS}
    commands = {
        name: [str(path), *tiny(path, shapes_shards, tmp_path / name)]
        for name, path in paths.items()
    }
    # In one process of its own: DeepSpeed keeps its group, so pytest's would not be the same after.
    (codes,) = run_ranks(train_all, 1, tmp_path, commands, timeout_seconds=500)
    assert codes == dict.fromkeys(KINDS, 0)
    for name, path in paths.items():
        last = list(load_config(path).phases)[-1]
        assert (tmp_path / name / "model.safetensors").is_file(), name
        assert (tmp_path / name / f"evaluation/{last}-2.json").is_file(), name
