from pathlib import Path

import pytest

from bigdet.config.load import load_config
from bigdet.planning.memory import (
    Search,
    Setting,
    check_one_size,
    fit_line,
    overrides,
    read_numbers,
    read_setting,
)
from bigdet.planning.trials import Measured

CONFIGS = Path(__file__).parents[3] / "configs"


def gib_of(setting: Setting) -> float:
    """2 GiB, and for each image 0.25 GiB, and 1 GiB for 448x448 pixels."""
    return 2 + setting.images * (setting.size / 448) ** 2 + 0.25 * setting.images


class Device:
    """A device of so much memory that follows the model exactly, and counts what is asked of it."""

    def __init__(self, room_gib: float):
        self.room_gib = room_gib
        self.asked: list[str] = []

    def take(self, setting: Setting) -> Measured | None:
        self.asked.append(str(setting))
        gib = gib_of(setting)
        return None if gib > self.room_gib else Measured(gib / 100, gib, self.room_gib, 1000)


def search(room_gib: float, device: Device, shift_gib: float = 0.0) -> Search:
    return Search([224, 320, 448, 640], [2, 4, 8, 16], room_gib, device.take, shift_gib)


def test_a_line_of_three_measurements_gives_all_others():
    measured = {Setting(*one): gib_of(Setting(*one)) for one in [(224, 2), (224, 4), (320, 2)]}
    line = fit_line(measured)
    assert line.factors == pytest.approx((2.0, 1 / 448**2, 0.25))
    assert line.at(Setting(448, 8)) == pytest.approx(2 + 8 + 2)


def test_no_factor_of_a_line_is_below_zero():
    # Memory that falls with the size, as noise may have it: the best without a term of pixels.
    line = fit_line({Setting(224, 2): 1.0, Setting(320, 2): 0.9, Setting(448, 4): 0.8})
    assert min(line.factors) == 0
    assert line.at(Setting(640, 16)) == pytest.approx(line.at(Setting(224, 2)))
    # A single one says nothing of any term: it is all constant.
    assert fit_line({Setting(224, 2): 1.5}).factors == pytest.approx((1.5, 0, 0))


def test_search_finds_the_boundary_with_few_measurements():
    device = Device(room_gib=100)
    found = search(11, device)
    found.run(num_trials=6)
    # 2 + b (r + 1/4) <= 11 with r = 1/4, 0.51, 1, 2.04: 18, 11, 7 and 3 images at most.
    assert [str(one) for one in found.boundary()] == ["224x16", "320x8", "448x4", "640x2"]
    assert [found.most_images(size) for size in (224, 320, 448, 640)] == [18, 11, 7, 3]
    assert device.asked == ["224x2", "224x4", "320x2", "224x16", "320x8", "448x4"]
    assert found.memory_gib(Setting(640, 2)) == pytest.approx(gib_of(Setting(640, 2)))
    assert found.predicted_seconds(Setting(640, 2)) == pytest.approx(gib_of(Setting(640, 2)) / 100)


def test_only_what_nothing_larger_outdoes_is_on_the_boundary():
    found = search(100, Device(room_gib=100))
    found.run(num_trials=3)
    assert [str(one) for one in found.boundary()] == ["640x16"]


def test_what_runs_out_of_memory_is_below_the_boundary_from_then_on():
    device = Device(room_gib=8)  # less than was said
    found = search(11, device)
    found.run(num_trials=20)
    assert all(gib_of(one) <= 8 for one in found.boundary())
    assert [str(one) for one in found.boundary()] == ["224x8", "448x4", "640x2"]
    assert len(device.asked) == len(set(device.asked)) <= 10


def test_nothing_fits_where_the_smallest_does_not():
    device = Device(room_gib=2)
    found = search(11, device)
    found.run(num_trials=6)
    assert (found.boundary(), device.asked) == ([], ["224x2"])
    found = search(2.5, Device(room_gib=100))
    found.run(num_trials=6)
    assert found.boundary() == []


def test_states_that_are_sharded_leave_room():
    # 1 GiB less on each GPU: 2 + b (r + 1/4) <= 12, 8 images at 448.
    found = search(11, Device(room_gib=100), shift_gib=-1.0)
    found.run(num_trials=6)
    assert Setting(448, 8) in found.boundary()
    assert found.predicted_gib(Setting(448, 8)) == pytest.approx(11.0)


def test_options_keep_ranks_and_the_linear_rule():
    phases = load_config(CONFIGS / "r50_direct.yaml", ["data.train.shards=x"]).phases
    # 64 images per step in micro-batches of 8: 8 lanes. A reference of 16 is set.
    assert overrides("pretrain", phases["pretrain"], Setting(320, 16)) == [
        "phases.pretrain.resize.size=320",
        "phases.pretrain.images_per_gpu=16",
        "phases.pretrain.images_per_step=128",
    ]
    # A cap of 1333 goes with 800.
    assert "phases.finetune.resize.cap=1000" in overrides(
        "finetune", phases["finetune"], Setting(600, 2)
    )
    quick = load_config(CONFIGS / "quickstart.yaml", []).phases["pretrain"]
    assert "phases.pretrain.reference_images_per_step=16" in overrides(
        "pretrain", quick, Setting(96, 4)
    )
    assert len(overrides("pretrain", quick, Setting(64, 8))) == 2  # the same batch, the same rate


def test_words_are_read():
    assert read_setting("384x6") == Setting(384, 6)
    assert read_numbers("--sizes", "448,224,448") == [224, 448]
    for text in ("384", "384x", "0x6", "axb", "1x2x3"):
        with pytest.raises(ValueError, match=f"--check: found {text}, expected"):
            read_setting(text)
    with pytest.raises(ValueError, match="--sizes: found 224,,448"):
        read_numbers("--sizes", "224,,448")


def test_a_phase_with_several_sizes_is_refused():
    more = ["data.train.shards=x", "phases.finetune.resize.sizes=[640, 800]"]
    phase = load_config(CONFIGS / "r50_direct.yaml", more).phases["finetune"]
    with pytest.raises(ValueError, match=r"phases\.finetune\.resize\.sizes: found \[640, 800\]"):
        check_one_size("finetune", phase)
