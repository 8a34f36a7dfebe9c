import json
import os
import pickle
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from bigdet.benchmarks.torchvision_twin import torchvision_twin
from bigdet.cli import convert_weights
from bigdet.models.backbones.build import build_backbone
from bigdet.models.weights import load_detector, save_detector_weights
from bigdet.weights.torchvision_layout import to_torchvision
from tests.commands.tiny_detector import ROOT, save_detector
from tests.unit.weights import published_layouts as published

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "box"}]


def call(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_weights.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_weights_go_to_torchvision_and_back_with_the_same_detections(tmp_path):
    run = save_detector(tmp_path / "run", CATEGORIES)
    ended = call("to-torchvision", run, tmp_path / "theirs.pth")
    assert ended.returncode == 0, ended.stderr

    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    detector = load_detector(run)
    twin = torchvision_twin(detector)
    twin.load_state_dict(state)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    detector.eval_size = (96, 128)
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
    assert [(one["id"], one["name"]) for one in back.categories] == [(3, "disc"), (7, "box")]
    assert back.eval_size == load_detector(run).eval_size
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
    assert line.startswith(f"error: {tmp_path / 'theirs.pth'}: torch cannot read it as weights")
    assert "weights_only" not in line  # torch's advice, which would run what is in the file


def test_a_full_disk_is_one_message(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = torch.nn.Linear(200, 200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file grows beyond it
    try:
        for name in ("a.pth", "a.safetensors"):
            with pytest.raises(OSError, match=rf"{name}: cannot be written: "):
                convert_weights.write_state(tmp_path / name, weights.state_dict())
            assert not (tmp_path / name).exists()
        with pytest.raises(OSError, match=r"b\.safetensors: cannot be written: "):
            save_detector_weights(tmp_path / "b.safetensors", weights, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to-torchvision", "run", "x.txt"], r"x\.txt: expected a name that ends in \.pth"),
        (["from-torchvision", "w.pth", "c.yaml", "--categories", "c.json", "--out", "out.pth"],
         r"out\.pth: expected a name that ends in \.safetensors"),
        (["from-torchvision", "w.pth", "c.yaml", "--categories", "c.json", "--out",
          "a.safetensors"], r"a\.safetensors is a folder\. Give the name of a file"),
    ],
)  # fmt: skip
def test_a_file_that_could_not_be_written_is_reported_at_once(
    tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(ValueError, match=message):
        convert_weights.main(words)


TINY = ["model.width=16", "model.fc_width=32", "model.roi.score_threshold=0.0"]
KEPT = ["--pixels", "rgb", "--categories"]


def tiny_backbone():
    """The tensors of a small ResNet by mmdetection's names, which are torchvision's."""
    names = build_backbone("resnet10", "bn", 0.0).state_dict()
    return {f"backbone.{name}": tuple(value.shape) for name, value in names.items()}


def as_detectron2(name):
    """The name that detectron2 has for a tensor of a ResNet of basic blocks."""
    name = name.removeprefix("backbone.")
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"^(conv|bn)1", r"stem.\g<1>1", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return "backbone.bottom_up." + re.sub(r"bn(\d)", r"conv\1.norm", name)


def random_float_state(shapes):
    return {name: value.float() for name, value in published.random_state(shapes).items()}


def predictions_of(path):
    detector = load_detector(path)
    detector.eval_size = (96, 128)
    image = torch.randint(
        0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return detector, detector.predict([image])[0]


def convert(words, monkeypatch):
    monkeypatch.setattr("bigdet.cli.convert_weights.setup_logging", lambda rank: None)
    assert convert_weights.main(list(map(str, words))) == 0


def test_mmdetections_weights_keep_its_classes_in_another_order(tmp_path, monkeypatch):
    """The same file, whose classes are named in it, for categories in two orders."""
    channels = (64, 128, 256, 512)
    shapes = published.mmdetection_rcnn(
        tiny_backbone(), classes=2, channels=channels, width=16, fc_width=32
    )
    content = {"meta": {"dataset_meta": {"classes": ("box", "disc")}}}
    torch.save({**content, "state_dict": random_float_state(shapes)}, tmp_path / "a.pth")
    outs = []
    for number, categories in enumerate((CATEGORIES, CATEGORIES[::-1])):
        listed, out = tmp_path / f"{number}.json", tmp_path / f"{number}.safetensors"
        listed.write_text(json.dumps(categories))
        config = ROOT / "configs" / "quickstart.yaml"
        words = ["from-mmdetection", tmp_path / "a.pth", config, *TINY, *KEPT, listed]
        convert([*words, "--out", out], monkeypatch)
        outs.append(out)
    (first, one), (second, other) = map(predictions_of, outs)
    # Theirs pool with as many points as a region needs; an override says otherwise.
    assert first.config.roi.sampling_ratio == 0
    chosen = [*words[:3], "model.roi.sampling_ratio=2", *words[3:]]
    convert([*chosen, "--out", tmp_path / "2.safetensors"], monkeypatch)
    assert load_detector(tmp_path / "2.safetensors").config.roi.sampling_ratio == 2
    assert [c["name"] for c in first.categories] == ["disc", "box"]
    assert [c["name"] for c in second.categories] == ["box", "disc"]
    assert len(one.boxes) > 10
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.labels, 1 - other.labels)
    assert torch.equal(one.masks, other.masks)
    # In the order of the file nothing moves.
    theirs = torch.load(tmp_path / "a.pth")["state_dict"]["roi_head.bbox_head.fc_cls.bias"]
    assert torch.equal(second.box_head.classifier.bias, theirs)

    (tmp_path / "0.json").write_text(json.dumps([{"id": 1, "name": "cat"}, CATEGORIES[0]]))
    words = ["from-mmdetection", tmp_path / "a.pth", config, *TINY, *KEPT, tmp_path / "0.json"]
    with pytest.raises(ValueError, match=r"its 2 classes \(box, disc, ...\) are not the 2 of"):
        convert([*words, "--out", tmp_path / "x.safetensors"], monkeypatch)


def test_detectron2s_pickle_becomes_a_detector_with_classes_by_rising_id(tmp_path, monkeypatch):
    shapes = published.detectron2_rcnn(classes=2, width=16, fc_width=32)
    rest = {n: s for n, s in shapes.items() if not n.startswith("backbone.")}
    rest |= published.detectron2_fpn((64, 128, 256, 512), 2, 16, "")
    body = {as_detectron2(name): shape for name, shape in tiny_backbone().items()}
    state = random_float_state(rest | body)
    content = {
        "model": {name: value.numpy() for name, value in state.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
    annotations = {"images": [], "annotations": [], "categories": CATEGORIES[::-1]}
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    words = ["from-detectron2", tmp_path / "model_final.pkl", ROOT / "configs/quickstart.yaml"]
    words += [
        *TINY,
        *KEPT,
        tmp_path / "instances.json",
        "--out",
        tmp_path / "new" / "x.safetensors",
    ]
    convert(words, monkeypatch)
    detector, found = predictions_of(tmp_path / "new" / "x.safetensors")
    assert [category["id"] for category in detector.categories] == [7, 3]
    bias = state["roi_heads.box_predictor.cls_score.bias"]  # of ids 3, 7, and the background
    assert torch.equal(detector.box_head.classifier.bias, bias[[1, 0, 2]])
    assert found.masks.shape[1:] == (28, 28)
    assert len(found.boxes) > 10


@pytest.mark.parametrize(("words", "factor"), [([], 1), (["--ema"], 2), (["--no-ema"], 1)])
def test_the_moving_average_is_converted_when_it_is_asked_for(tmp_path, words, factor):
    run = save_detector(tmp_path / "run", CATEGORIES)
    detector = load_detector(run)
    plain = to_torchvision(detector, detector.state_dict())
    average = {f"module.{name}": 2 * value for name, value in plain.items()}
    content = {"model": plain, "model_ema": {"n_averaged": torch.tensor(5), **average}}
    torch.save(content, tmp_path / "both.pth")
    (tmp_path / "manifest.json").write_text(json.dumps({"categories": CATEGORIES}))
    with safe_open(run / "model.safetensors", framework="pt") as opened:
        (tmp_path / "config.yaml").write_text(opened.metadata()["config"])
    out = tmp_path / "out.safetensors"
    files = [tmp_path / "both.pth", tmp_path / "config.yaml", "--out", out]
    files += ["--categories", tmp_path / "manifest.json"]
    assert convert_weights.main(["from-torchvision", *map(str, files), *words]) == 0
    back = load_detector(out).state_dict()
    for name, value in detector.state_dict().items():
        assert torch.equal(back[name], factor * value), name
