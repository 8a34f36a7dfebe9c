import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigdet.cli.convert_weights import write_state
from bigdet.config.load import parse_config
from bigdet.models.build import build_detector
from bigdet.models.norms import batch_norms
from bigdet.models.weights import (
    find_weights,
    load_detector,
    load_parts,
    read_safetensors,
    save_detector_weights,
    weights_metadata,
)
from bigdet.run_dir import RunDir

PARTS = ["backbone", "fpn", "rpn", "box_head", "mask_head"]
CATEGORIES = [{"id": 7, "name": "disk"}, {"id": 9, "name": "bar"}]
CONFIG = """
output: runs/x
data: {train: {shards: a}, val: {shards: b}}
model: {detector: mask_rcnn, backbone: resnet10, width: 32, fc_width: 16}
phases:
  pretrain: {steps: 2, images_per_gpu: 1, lr: 0.1, resize: {kind: direct, size: 96}}
  finetune: {steps: 2, images_per_gpu: 1, lr: 0.1, resize: {kind: short_side, size: 80}}
"""


def make_config(**replaced):
    text = CONFIG
    for old, new in replaced.items():
        text = text.replace(old, new)
    return parse_config(text, "test")


def make_detector(seed=0, num_classes=2, **replaced):
    torch.manual_seed(seed)
    return build_detector(make_config(**replaced).model, num_classes)


def save(path, detector, config=None, phase="finetune"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_detector_weights(
        path, detector, weights_metadata(config or make_config(), CATEGORIES, phase)
    )


def test_a_saved_detector_comes_back_with_weights_categories_and_size(tmp_path):
    detector = make_detector()
    for norm in batch_norms(detector):
        norm.running_mean.normal_()
    save(tmp_path / "model.safetensors", detector)
    loaded = load_detector(tmp_path / "model.safetensors")
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.categories == CATEGORIES
    assert loaded.eval_size == (80, 133)  # the phase's short side, and 1333 / 800 of it
    assert not loaded.training
    assert {norm.mode for norm in batch_norms(loaded)} == {"fixed"}


def test_a_weights_file_is_for_all_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        save_detector_weights(tmp_path / "a.safetensors", torch.nn.Linear(2, 3), {"a": "b"})
        write_state(tmp_path / "b.safetensors", torch.nn.Linear(2, 3).state_dict())
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()] == [0o640, 0o640]


@pytest.mark.parametrize(
    ("phase", "evaluation", "size"),
    [
        ("pretrain", "", (96, 96)),
        ("pretrain", "evaluation: {resize: {kind: short_side, size: 60, cap: 70}}", (60, 70)),
    ],
)
def test_size_is_that_of_the_evaluation_else_of_the_phase(tmp_path, phase, evaluation, size):
    config = parse_config(CONFIG + evaluation, "test")
    save(tmp_path / "model.safetensors", make_detector(), config, phase)
    assert load_detector(tmp_path / "model.safetensors").eval_size == size


def test_a_run_folder_means_its_final_weights_else_its_newest_checkpoint(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    checkpoint = run_dir.checkpoint("pretrain", 2)
    save(RunDir(checkpoint).weights, make_detector())
    assert find_weights(checkpoint) == checkpoint / "model.safetensors"
    with pytest.raises(ValueError, match="nor a finished checkpoint"):
        find_weights(run_dir.root)
    run_dir.latest.write_text("pretrain-2\n")
    assert find_weights(run_dir.root) == checkpoint / "model.safetensors"
    save(run_dir.weights, make_detector())
    assert find_weights(run_dir.root) == run_dir.weights


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: does not exist. Give a model.safetensors"):
        load_detector(tmp_path / "nowhere")


def test_a_file_that_is_not_safetensors_is_one_clear_error(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"PK\x03\x04 a pickle, perhaps"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as safetensors"):
            load_detector(path)


def test_a_cut_file_is_one_clear_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, make_detector())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_safetensors(path)


def test_weights_without_our_metadata_are_one_clear_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"found format None in its metadata, expected 'bigdet-1'"):
        load_detector(path)


def test_load_parts_loads_the_named_parts_alone_and_reports_them():
    detector, other = make_detector(0), make_detector(1)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    rows = load_parts(detector, other.state_dict(), ["backbone", "fpn"], "elsewhere")
    for name, tensor in detector.state_dict().items():
        is_loaded = name.startswith(("backbone.", "fpn."))
        source = other.state_dict() if is_loaded else before
        assert torch.equal(tensor, source[name]), name
    # resnet10 has 12 convolutions and as many norms of 4 tensors each; the FPN 8 convolutions with
    # bias: (64 + 128 + 256 + 512) x 32 + 4 x 32 x 32 x 9 + 8 x 32 numbers.
    assert [(row.part, row.source, row.tensors, row.parameters) for row in rows] == [
        ("backbone", "elsewhere", 12 * 5, 4_905_792),
        ("fpn", "elsewhere", 16, 67_840),
    ]


def test_weights_of_other_classes_are_an_error_that_names_them_and_changes_nothing():
    detector, other = make_detector(0), make_detector(1, num_classes=5)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit.*of another shape \(box_head.*start_from"):
        load_parts(detector, other.state_dict(), PARTS, "elsewhere")
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


def test_missing_and_unexpected_names_are_listed():
    detector = make_detector()
    tensors = dict(detector.state_dict())
    tensors["fpn.extra"] = tensors.pop("fpn.laterals.0.conv.bias")
    expected = r"1 missing \(fpn.laterals.0.conv.bias\), 1 unexpected \(fpn.extra\)"
    with pytest.raises(ValueError, match=expected):
        load_parts(detector, tensors, ["fpn"], "elsewhere")
    with pytest.raises(ValueError, match=r"60 missing \(.*; .*; .*; \.\.\.\)"):
        load_parts(detector, {}, ["backbone"], "elsewhere")


def test_a_part_that_the_model_has_not_is_an_error():
    detector = make_detector(mask_rcnn="faster_rcnn")
    with pytest.raises(ValueError, match=r"1 no part of the model \(mask_head\)"):
        load_parts(detector, detector.state_dict(), ["backbone", "mask_head"], "elsewhere")


def test_saved_tensors_are_those_of_the_state(tmp_path):
    detector = make_detector()
    save(tmp_path / "model.safetensors", detector)
    assert set(load_file(tmp_path / "model.safetensors")) == set(detector.state_dict())


@pytest.mark.parametrize("name", ["backbone.conv1.weight", "backbone.bn1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    detector = make_detector()
    tensor = detector.state_dict()[name]
    tensor[(0,) * tensor.ndim] = value
    path = tmp_path / "model.safetensors"
    save(path, detector)
    with pytest.raises(ValueError, match=rf"{path}: 1 of \d+ tensors is not finite: {name} \(1 of"):
        load_detector(path)
    other = make_detector(seed=1)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        load_parts(other, read_safetensors(path)[0], PARTS, "a file")
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    load_parts(other, read_safetensors(path)[0], ["fpn", "rpn"], "a file")  # which are finite


def test_numbers_too_large_for_the_model_are_refused():
    detector = make_detector()
    tensors = {key: tensor.double() for key, tensor in detector.state_dict().items()}
    name = next(key for key in tensors if key.startswith("fpn."))
    tensors[name][(0,) * tensors[name].ndim] = 1e300  # infinite in fp32
    with pytest.raises(ValueError, match=r"not finite: fpn\."):
        load_parts(detector, tensors, PARTS, "a file")
