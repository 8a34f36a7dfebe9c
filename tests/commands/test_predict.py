import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet.cli.inputs import Input, find_files, list_inputs, stems
from bigdet.data.examples.samples import load_sample
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.predict import check_output, main, plan_batches
from tests.commands.tiny_detector import ROOT, save_detector
from tests.unit.data.turned import turned_file, write_coco

CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}]


def an_input(image_id, size, file_name=None):
    return Input(f"{image_id}", image_id, file_name, f"{image_id}", size, lambda: None)


def test_folders_and_globs_give_their_pictures_sorted_and_each_file_is_done_once(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", "below/c.gif", "._a.png", "below/._c.gif"):
        (tmp_path / name).write_bytes(b"x")
    found, num_bad = find_files([f"{tmp_path}/b.JPG", f"{tmp_path}", f"{tmp_path}/**/*"])
    assert [path.name for path in found] == ["b.JPG", "a.png", "c.gif"]
    assert num_bad == 0
    only_text, _ = find_files([f"{tmp_path}/notes.txt"])  # named: taken for what it may be
    assert [path.name for path in only_text] == ["notes.txt"]


def test_each_word_that_names_no_picture_is_reported_once(tmp_path, caplog):
    words = [f"{tmp_path}/nowhere", f"{tmp_path}", f"{tmp_path}/*.jpg"]
    assert find_files(words) == ([], 3)
    told = [record.getMessage() for record in caplog.records]
    assert "nowhere: does not exist" in told[0]
    assert "the folder contains no picture" in told[1]
    assert "*.jpg: no picture matches" in told[2]


def test_shard_set_stands_alone_and_gives_its_own_ids(shapes_shards, tmp_path):
    inputs, num_bad = list_inputs([f"{shapes_shards}/val"])
    shards = ShardSet(shapes_shards / "val")
    assert [one.image_id for one in inputs] == shards.index["image_id"].tolist()
    assert num_bad == 0
    pixels = inputs[1].read()
    assert pixels.shape == (*inputs[1].size, 3)
    np.testing.assert_array_equal(pixels, load_sample(shards, 1)[0].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="Give it alone"):
        list_inputs([f"{tmp_path}", f"{shapes_shards}/val"])


def test_output_must_not_be_the_folder_of_the_pictures(tmp_path):
    inputs = [an_input(1, (2, 2), str(tmp_path / "a.jpg"))]
    with pytest.raises(ValueError, match="could be overwritten"):
        check_output(tmp_path, inputs)
    check_output(tmp_path / "out", inputs)


def test_pictures_of_equal_name_get_numbers(tmp_path):
    paths = [tmp_path / "a" / "1.jpg", tmp_path / "b" / "1.png", tmp_path / "2.jpg"]
    assert list(stems(paths)) == ["1", "1-2", "2"]


def test_images_of_one_canvas_go_together():
    # Short side to 64, long side at most 107, in multiples of 32. 64x64: 64x64; 48x64 becomes
    # 64x85: 64x96; 50x70 becomes 64x89: 64x96 too; 64x48: 96x64.
    sizes = [(64, 64), (48, 64), (64, 48), (50, 70), (480, 640)]
    inputs = [an_input(number, size) for number, size in enumerate(sizes)]
    batches = plan_batches(inputs, (64, 107), 2)
    assert [[one.image_id for one in batch] for batch in batches] == [[0], [1, 3], [4], [2]]


def test_command_draws_what_it_can_read_and_counts_what_it_cannot(tmp_path):
    model, pictures = save_detector(tmp_path / "run", CATEGORIES), tmp_path / "in"
    pictures.mkdir()
    Image.new("RGB", (96, 64), (90, 150, 90)).save(pictures / "a.jpg")
    (pictures / "b.jpg").write_bytes(b"broken")
    Image.new("L", (50, 120), 99).save(pictures / "c.png")
    words = ["-m", "bigdet.predict", model, pictures, "--out", tmp_path / "out", "--score", "0.2"]
    ended = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count(f"{pictures / 'b.jpg'}: not a readable image") == 1
    assert ended.stderr.splitlines()[-1].startswith("error: 1 of 3 images could not be read")
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in results} == {
        (1, str(pictures / "a.jpg")),
        (3, str(pictures / "c.png")),
    }
    assert {r["category_id"] for r in results} <= {17, 3}
    assert results[0]["segmentation"]["size"] == [64, 96]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.jpg",
        "c.jpg",
        "detections.json",
    ]
    with Image.open(tmp_path / "out" / "c.jpg") as drawn:
        assert drawn.size == (333, 800)  # 50x120, enlarged


def test_batches_give_what_single_images_give_and_shards_score_as_they_are(
    shapes_shards, tmp_path, in_process
):
    model = save_detector(tmp_path / "run", CATEGORIES)
    found = []
    for words in (["--batch", "4"], ["--no-pictures"]):
        out = tmp_path / words[0]
        assert main([str(model), f"{shapes_shards}/val", "--out", str(out), *words]) == 0
        found.append(json.loads((out / "detections.json").read_text()))
    ids = ShardSet(shapes_shards / "val").index["image_id"].tolist()
    names = sorted(path.name for path in (tmp_path / "--batch").iterdir())
    assert names == [*(f"{image_id:012d}.jpg" for image_id in ids), "detections.json"]
    assert [path.name for path in (tmp_path / "--no-pictures").iterdir()] == ["detections.json"]
    together, alone = found
    assert [r["image_id"] for r in together] == [r["image_id"] for r in alone]
    assert {r["image_id"] for r in alone} == set(ids)
    assert "file_name" not in alone[0]
    np.testing.assert_allclose(
        [r["score"] for r in together], [r["score"] for r in alone], atol=1e-5
    )


def test_boxes_of_a_turned_picture_are_those_of_the_picture_as_shown(tmp_path, in_process):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    pictures = tmp_path / "in"
    pictures.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(pixels).save(pictures / "a.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1).copy()).save(pictures / "b.png")
    model = save_detector(tmp_path / "run", CATEGORIES)
    assert main([str(model), str(pictures), "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    of_file = [[r for r in results if r["image_id"] == number] for number in (1, 2)]
    boxes = [[r["bbox"] for r in found] for found in of_file]
    assert boxes[0] == boxes[1]
    assert of_file[0][0]["segmentation"]["size"] == [90, 40]


def test_turned_photos_are_seen_alike_as_files_and_in_a_shard_set(tmp_path, in_process):
    names = {f"{number}.png": number for number in (3, 5, 6, 8)}
    files = {name: turned_file(number, "PNG", (96, 64)) for name, number in names.items()}
    file = write_coco(tmp_path, files, size=(96, 64))
    convert_coco(tmp_path / "images", file, tmp_path / "shards")
    model = save_detector(tmp_path / "run", CATEGORIES)
    found = []
    for source in ("images", "shards"):
        out = tmp_path / f"out of {source}"
        assert main([str(model), str(tmp_path / source), "--out", str(out), "--no-pictures"]) == 0
        found.append(json.loads((out / "detections.json").read_text()))
    for result in found[0]:
        del result["file_name"]
    assert found[0] == found[1] != []
    out = str(tmp_path / "stored")
    with pytest.raises(ValueError, match="--exif: images of a shard set are used as annotated"):
        main([str(model), str(tmp_path / "shards"), "--out", out, "--exif", "stored"])
    assert main([str(model), str(tmp_path / "images"), "--out", out, "--exif", "stored"]) == 0
    results = json.loads((tmp_path / "stored/detections.json").read_text())
    sizes = {tuple(result["segmentation"]["size"]) for result in results}
    assert sizes == {(96, 64), (64, 96)}  # the first is turned by 180 degrees


def test_nothing_to_do_is_reported_before_the_model_is_loaded(tmp_path, in_process):
    with pytest.raises(ValueError, match="no image to detect objects on: 1 were left out"):
        main(["no-model", str(tmp_path), "--out", str(tmp_path / "out")])


class RunsCode:
    """What a pickle can ask for: a call while it is read."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.safetensors"])
def test_pickle_with_code_is_refused_and_never_run(tmp_path, monkeypatch, in_process, name):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("a.png")
    if name.endswith("pth"):
        torch.save(RunsCode(), name)
    else:
        Path(name).write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(ValueError, match=name):
        main([name, "a.png", "--out", "out"])
    assert not Path("ran").exists()
