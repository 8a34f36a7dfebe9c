"""What a model needs of its data is known before the first step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bigdet.config.data import DataConfig, TrainSplitConfig, ValSplitConfig
from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import open_sets
from bigdet.data.format.phase_sets import DataSets
from bigdet.data.format.shard_set import FLAG_KEYPOINTS, FLAG_MASKS, Category
from bigdet.training.data_checks import check_data
from tests.unit.data.small_shards import write_set

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


class Shards:
    """As much of a shard set as is asked."""

    address = "somewhere"
    manifest = SimpleNamespace(federated=False)

    def __init__(self, flags: int, num_keypoints: int | None = None) -> None:
        names = None if num_keypoints is None else [str(i) for i in range(num_keypoints)]
        self.categories = [Category(1, "car"), Category(2, "person", keypoints=names)]
        self.index = np.array([(flags,)], dtype=[("flags", "u2")])

    def __len__(self) -> int:
        return 1

    def check_random_reads(self, *others: "Shards") -> None:
        pass


def sets(train: Shards, val: Shards) -> Any:
    return dict.fromkeys(("pretrain", "finetune"), DataSets(train, val))  # type: ignore[arg-type]


def check(shards: Shards, *overrides: str) -> None:
    check_data(load_config(CONFIG, overrides), sets(shards, shards))


def test_masks_are_asked_for_by_any_phase_that_learns_them() -> None:
    check(Shards(FLAG_MASKS))
    check(Shards(0), "model.detector=faster_rcnn")
    late = ["model.detector=faster_rcnn", "phases.finetune.model.detector=cascade_mask_rcnn"]
    check(Shards(FLAG_MASKS), *late)
    with pytest.raises(ConfigError, match="cascade_mask_rcnn needs masks, but somewhere has none"):
        check(Shards(0), *late)


def test_a_keypoint_head_has_as_many_as_the_categories() -> None:
    keypoints = ["model.detector=keypoint_rcnn"]
    check(Shards(FLAG_KEYPOINTS, 17), *keypoints)
    check(Shards(FLAG_KEYPOINTS, 5), *keypoints, "model.keypoint.num_keypoints=5")
    with pytest.raises(ConfigError, match="found 17, but the categories of somewhere have 5"):
        check(Shards(FLAG_KEYPOINTS, 5), *keypoints)
    with pytest.raises(ConfigError, match="have 0"):
        check(Shards(0), *keypoints)


def test_a_keypoint_head_has_objects_with_keypoints() -> None:
    with pytest.raises(ConfigError, match="needs keypoints, but no object of somewhere has any"):
        check(Shards(FLAG_MASKS, 17), "model.detector=keypoint_rcnn")


def test_sets_that_are_mixed_have_their_keypoints_in_one_order(tmp_path: Path) -> None:
    names = ["left_ear", "right_ear"]
    for folder, own in (("plain", None), ("first", names), ("turned", names[::-1])):
        write_set(tmp_path / folder, num_shards=1, per_shard=1)
        file = tmp_path / folder / "manifest.json"
        values = json.loads(file.read_text())
        values["categories"] = [
            {"id": 1, "name": "cat", "keypoints": own},
            {"id": 2, "name": "dog"},
        ]
        del values["sha256"]
        file.write_text(json.dumps(values))
    plain, first, turned = (str(tmp_path / folder) for folder in ("plain", "first", "turned"))

    def check_mix(train: list[str], val: str, *overrides: str) -> list[Category]:
        split = TrainSplitConfig(shards=train[0], more_shards=train[1:])
        data = DataConfig(train=split, val=ValSplitConfig(shards=val))
        mixed, measured = open_sets(data)
        check_data(load_config(CONFIG, overrides), sets(mixed, measured))
        return mixed.categories

    boxes = "model.detector=faster_rcnn"
    categories = check_mix([plain, first], plain, boxes)
    assert categories == [Category(1, "cat", keypoints=names), Category(2, "dog")]
    check_mix([plain, first, turned], turned, boxes)  # which learn none of them
    points = ["model.detector=keypoint_rcnn", "model.keypoint.num_keypoints=2"]
    message = r"turned: the keypoints of cat are right_ear, left_ear, .*first, in their order: left"
    for train, val in (([first, turned], plain), ([plain, first], turned)):
        with pytest.raises(ShardError, match=message):
            check_mix(train, val, *points)
    with pytest.raises(ConfigError, match=r"no object of .*plain has any"):
        check_mix([plain, first], first, *points)


def test_classes_of_the_two_sets_go_together_by_name(caplog) -> None:
    config = load_config(CONFIG, ["model.detector=faster_rcnn"])
    train, val = Shards(0), Shards(0)
    val.categories = [Category(5, "Person"), Category(7, "car")]
    check_data(config, sets(train, val))
    assert not caplog.records
    val.categories = [Category(7, "car")]
    check_data(config, sets(train, val))
    (record,) = caplog.records
    assert record.getMessage().endswith("person")
    val.categories = [Category(7, "car"), Category(8, "elk")]
    with pytest.raises(ConfigError, match=r"data\.val\.shards: somewhere: 1 of its .*: 'elk'"):
        check_data(config, sets(train, val))


def test_each_phase_is_checked_with_its_own_data() -> None:
    # The first phase learns masks of a set without any; the second does not look at it.
    words = ["phases.pretrain.data.train.shards=a", "model.detector=faster_rcnn"]
    masks = [*words, "phases.pretrain.model.detector=mask_rcnn"]
    own: Any = {
        "pretrain": DataSets(Shards(0), Shards(0)),  # type: ignore[arg-type]
        "finetune": DataSets(Shards(FLAG_MASKS), Shards(0)),
    }  # type: ignore[arg-type]
    check_data(load_config(CONFIG, words), own)
    with pytest.raises(ConfigError, match="mask_rcnn needs masks, but somewhere has none"):
        check_data(load_config(CONFIG, masks), own)
    own["pretrain"].val.categories = [Category(7, "elk")]
    said = r"^data\.val\.shards: .*'elk'.* Or write phases\.pretrain\.data\.val\.shards too\.$"
    with pytest.raises(ConfigError, match=said):
        check_data(load_config(CONFIG, words), own)
    with pytest.raises(ConfigError, match=r"^phases\.pretrain\.data\.val\.shards: .*FILE`\.$"):
        check_data(load_config(CONFIG, [*words, "phases.pretrain.data.val.shards=b"]), own)


def test_keypoints_of_the_two_sets_are_the_same() -> None:
    train, val = Shards(FLAG_KEYPOINTS, 3), Shards(FLAG_KEYPOINTS, 2)
    with pytest.raises(ConfigError, match=r"keypoints of person are 0, 1, expected .*: 0, 1, 2"):
        check_data(load_config(CONFIG, ["model.detector=faster_rcnn"]), sets(train, val))
