import json

import numpy as np
import orjson
import pytest
from pycocotools import mask as coco_mask

from bigdet.data.format.shard_set import Category
from bigdet.data.making.annotations import decode_counts
from bigdet.evaluation.detections import ResultsError, load_results, read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.run_lengths import mask_areas

KINDS = ("bbox", "segm", "keypoints")
PERSON = Category(17, "person", keypoints=["nose", "tail"])


def rle(height=100, width=100, area=50):
    bitmap = np.zeros((height, width), dtype=np.uint8, order="F")
    bitmap.reshape(-1, order="A")[:area] = 1
    return {"size": [height, width], "counts": coco_mask.encode(bitmap)["counts"].decode()}


def written(counts):
    """Return counts as COCO writes them, of any sign and sum."""
    text = b""
    for n, count in enumerate(counts):
        rest = count - counts[n - 2] if n > 2 else count
        while not -16 <= rest < 16:
            text, rest = text + bytes([(rest & 31 | 32) + 48]), rest >> 5
        text += bytes([(rest & 31) + 48])
    return text


BELOW_ZERO = written([10, -5, 50, 10, 9935]).decode()


def result(**changes):
    values = {"image_id": 7, "category_id": 17, "score": 0.5, "bbox": [1, 2, 3.5, 4]}
    return values | {"segmentation": rle(), "keypoints": [1, 2, 0.5, 3, 4, 0.5]} | changes


@pytest.fixture
def truth(make_shards):
    box = {"id": 1, "label": 0, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    return read_ground_truth(make_shards([[box], [box]], [PERSON]), True, True)


def test_results_become_arrays_in_their_order(truth):
    results = [result(), result(image_id=8, score=1, segmentation=rle(area=30)), result(score=0.1)]
    found = read_detections(iter(results), truth, KINDS)
    assert found.images.tolist() == [0, 1, 0]
    assert found.labels.tolist() == [0, 0, 0]
    assert found.scores.tolist() == [0.5, 1.0, 0.1]
    assert found.boxes.tolist() == [[1, 2, 3.5, 4]] * 3
    assert found.mask_areas.tolist() == [50, 30, 50]
    assert found.keypoints[1].tolist() == [[1, 2, 0.5], [3, 4, 0.5]]


def test_only_what_is_measured_need_be_there(truth):
    boxed = {key: result()[key] for key in ("image_id", "category_id", "score", "bbox")}
    assert len(read_detections([boxed], truth, ("bbox",))) == 1
    assert len(read_detections([], truth, KINDS)) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (result(image_id=99), "image_id is 99, which none of the 2 images of"),
        (result(image_id="7"), 'image_id is "7", which none'),
        (result(image_id=7.5), "image_id is 7.5, which none"),
        (result(category_id=1), "category_id is 1, which none of the 1 categories"),
        (result(category_id="person"), 'category_id is "person"'),
        (result(score="0.9"), 'score is "0.9", expected a number'),
        (result(score=None), "score is null"),
        (result(score=float("nan")), "score is NaN"),
        (result(bbox=["1", "2", "3", "4"]), r'bbox is \["1", "2", "3", "4"\], expected four'),
        (result(bbox=[1, 2, 3]), "expected four numbers"),
        (result(bbox=[1, 2, -3, 4]), "expected four numbers"),
        (result(bbox=None), "bbox is null"),
        (result(keypoints=[1, 2, 3]), "expected 6 numbers: x, y and a score of each of 2 points"),
        (result(segmentation=rle(50, 100)), r"size \[50, 100\], but its image .* \[100, 100\]"),
        (result(segmentation=[[1, 2, 3, 4]]), "expected polygons: .* three points"),
        (result(segmentation=[[1, 2, 3, 4, 5, 1000]]), "expected polygons"),
        (result(segmentation=[1, 2, 3, 4, 5, 6]), "expected polygons"),
        (result(segmentation="x"), "expected compressed RLE"),
        (result(segmentation=rle() | {"counts": [50, 49]}), "do not make an image"),
        (result(segmentation=rle() | {"counts": [9950.5, 49.5]}), "do not make an image"),
        (result(segmentation=rle() | {"counts": [10050, -50]}), "do not make an image"),
        (result(segmentation=rle() | {"counts": BELOW_ZERO}), "do not make an image"),
        (result(segmentation=rle() | {"counts": {}}), "expected compressed RLE"),
        (result(segmentation=None, bbox=None), "bbox is null"),
        (result(image_id=True), "image_id is true, which none"),
        (result(image_id=[7]), r"image_id is \[7\], which none"),
        (result(category_id=[17]), r"category_id is \[17\], which none"),
        (result(category_id=17.5), "category_id is 17.5, which none"),
        (result(category_id={"id": 17}), "category_id is .*, which none"),
        (result(score=True), "score is true, expected a number"),
        (result(score=[0.5]), r"score is \[0.5\], expected a number"),
        (result(bbox=[1, 2, True, 4]), r"bbox is \[1, 2, true, 4\], expected four"),
        (result(bbox=[25, 20, 40, 30, 0]), "expected four numbers"),
        (result(bbox=[[1, 2, 3, 4]]), "expected four numbers"),
        (result(image_id=2**70), "which none of the 2 images"),
        (result(segmentation=rle() | {"counts": rle()["counts"][:-1]}), "do not make an image"),
        ({k: v for k, v in result().items() if k != "score"}, "has no score.*not a results file"),
        ({k: v for k, v in result().items() if k != "bbox"}, "has no bbox"),
        ([1, 2], r"found \[1, 2\], expected an object"),
    ],
)
def test_what_is_wrong_is_reported_with_its_number(truth, wrong, message):
    with pytest.raises(ResultsError, match=f"^some.json: detection 3: .*{message}"):
        read_detections([result(), result(), wrong, result()], truth, KINDS, "some.json")


def test_numbers_in_lists_of_their_own_are_no_numbers(truth):
    for wrong in (result(score=[0.5]), result(bbox=[[25], [20], [40], [30]])):
        with pytest.raises(ResultsError, match=r"detection 1: (score|bbox) is"):
            read_detections([wrong], truth, KINDS, "some.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "not a readable JSON file: .* at 'its end'"),
        ('[{"score": NaN}]', "not a readable JSON file: .* at 'NaN}]'. Leave detections with NaN"),
        ('{"images": [{"id": 1}, {"id": 2}]}', "found a dict, expected a list of detections"),
        ("", "not a readable JSON file"),
    ],
)
def test_files_that_are_no_results_are_reported(tmp_path, text, message):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(ResultsError, match=f"some.json: {message}"):
        list(load_results(tmp_path / "some.json"))


@pytest.mark.parametrize("indent", [None, 1])
def test_files_read_in_parts_give_what_they_hold(tmp_path, monkeypatch, indent):
    results = [  # strings and inner lists contain what looks like the end of a detection
        {"image_id": n, "note": '}, {"\\', "extra": [{"a": 1}, {"b": [{}, {}]}], "score": n / 7}
        for n in range(50)
    ]
    (tmp_path / "some.json").write_text(json.dumps(results, indent=indent))
    read = []
    loads = orjson.loads
    monkeypatch.setattr("orjson.loads", lambda text: read.append(len(text)) or loads(text))
    for num_bytes in (1, 100, 1000, 1 << 20):
        monkeypatch.setattr("bigdet.evaluation.detections.PART_BYTES", num_bytes)
        assert list(load_results(tmp_path / "some.json")) == results
    assert max(read) == (tmp_path / "some.json").stat().st_size
    read.clear()
    monkeypatch.setattr("bigdet.evaluation.detections.PART_BYTES", 1000)
    plain = [{"image_id": n, "score": n / 7} for n in range(500)]
    (tmp_path / "some.json").write_text(json.dumps(plain, indent=indent))
    assert list(load_results(tmp_path / "some.json")) == plain
    assert max(read) < 1200  # a part and what was left of the one before


def test_masks_are_told_from_what_only_looks_like_one():
    random = np.random.default_rng(0)
    bitmaps = [random.random((40, 30)) < density for density in (0.0, 0.01, 0.5, 0.99, 1.0)]
    masks = [coco_mask.encode(np.asfortranarray(b.astype(np.uint8)))["counts"] for b in bitmaps]
    areas, is_mask = mask_areas(masks, np.full(5, 1200))
    assert areas.tolist() == [bitmap.sum() for bitmap in bitmaps]
    assert is_mask.all()
    assert not mask_areas(masks, np.full(5, 1201))[1].any()
    good = masks[2]
    broken = [b"", good[:-1], good + b"1", good[1:], good + good, b"\x00" + good, good + b"P"]
    areas, is_mask = mask_areas([*broken, good], np.full(8, 1200))
    assert is_mask.tolist() == [False] * len(broken) + [True]
    assert areas.tolist() == [0] * len(broken) + [bitmaps[2].sum()]
    assert mask_areas([], np.zeros(0, dtype=np.int64))[1].tolist() == []


def test_masks_with_counts_below_zero_are_none():
    # The counts add up, but pycocotools takes -5 as 2^32 - 5 and runs forever on the first pair.
    masks = [written(counts) for counts in ([4, 2, 50, 30, 14], [10, -5, 50, 10, 35], [-1, 101])]
    areas, is_mask = mask_areas(masks, np.full(3, 100))
    assert is_mask.tolist() == [True, False, False]
    assert areas.tolist() == [32, 0, 0]


def test_any_text_is_judged_as_by_reading_its_counts_one_by_one():
    random = np.random.default_rng(0)
    texts, sizes = [], []
    for _ in range(3000):  # of them some are broken
        counts = random.geometric(1 / random.choice([2, 20, 3000]), random.integers(1, 12))
        counts[random.random(len(counts)) < 0.1] *= random.choice([0, 1, 1, -1])
        text, size = bytearray(written(counts.tolist())), int(counts.sum())
        if random.random() < 0.2:
            text[random.integers(len(text))] = random.integers(48, 114)
        texts.append(bytes(text))
        sizes.append(max(size, 1))
    counts_of = [decode_counts(text.decode()) for text in texts]
    expected = [
        counts is not None and min(counts) >= 0 and sum(counts) == size
        for counts, size in zip(counts_of, sizes, strict=True)
    ]
    areas, is_mask = mask_areas(texts, np.array(sizes))
    assert is_mask.tolist() == expected
    assert 300 < sum(expected) < 2700
    pixels = [sum(c[1::2]) if ok else 0 for c, ok in zip(counts_of, expected, strict=True)]
    assert areas.tolist() == pixels


def test_whole_numbers_may_be_written_with_a_point(truth):
    mask = rle(area=30) | {"size": [100.0, 100.0]}
    found = read_detections(
        [result(image_id=8.0, category_id=17.0, segmentation=mask)], truth, KINDS
    )
    assert found.images.tolist() == [1]
    assert found.labels.tolist() == [0]
    assert found.mask_areas.tolist() == [30]


def test_true_is_not_the_category_1(make_shards):
    box = {"id": 1, "label": 0, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    truth = read_ground_truth(make_shards([[box]], [Category(1, "cat")]), False, False)
    assert len(read_detections([result(category_id=1)], truth, ("bbox",))) == 1
    for others in ([], [result(category_id=1)]):
        with pytest.raises(ResultsError, match="category_id is true, which none of the 1 "):
            read_detections([*others, result(category_id=True)], truth, ("bbox",))


def test_masks_come_in_every_form_of_pycocotools(truth):
    # A triangle-like polygon; counts of 30 pixels at the start of the image, as a list.
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    listed = {"size": [100, 100], "counts": [0, 30, 9970]}
    boxed = {key: value for key, value in result().items() if key != "segmentation"}
    boxed["bbox"] = [10, 10, 20, 20]
    results = [result(segmentation=polygon), result(segmentation=listed), boxed]
    results.append(result(segmentation={"size": [100, 100], "counts": [10000]}))  # empty
    found = read_detections(results, truth, KINDS)
    assert found.mask_areas.tolist() == [400, 30, 400, 0]  # 20 x 20 pixels
    assert found.masks[1] == rle(area=30)["counts"].encode()
    assert found.masks[0] == found.masks[2]


def test_where_the_first_has_no_box_boxes_are_those_of_the_masks(truth):
    polygon = [[10, 10, 30, 10, 30, 25, 10, 25]]
    masked = {key: value for key, value in result(segmentation=polygon).items() if key != "bbox"}
    own = result(bbox=[1, 2, 3, 4], segmentation=polygon)
    found = read_detections([masked, masked | {"bbox": []}, own], truth, KINDS)
    assert found.boxes.tolist() == [[10, 10, 20, 15], [10, 10, 20, 15], [1, 2, 3, 4]]
    with pytest.raises(ResultsError, match="detection 2: has no bbox"):
        read_detections(
            [masked, {k: v for k, v in masked.items() if k != "segmentation"}], truth, KINDS
        )
    with pytest.raises(ResultsError, match="detection 2: the counts of the mask do not make"):
        read_detections([masked, masked | {"segmentation": rle() | {"counts": "1"}}], truth, KINDS)
