"""tools/show_batch.py: any step of any phase, as any number of ranks gets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigdet.cli.show_batch import main
from bigdet.data.format.shard_set import ShardSet

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture
def show(shapes_shards, tmp_path, capsys):
    """A function: the printed ids, by rank, of a step of 3 lanes x 2 images of 16 images."""
    settings = [
        f"data.train.shards={shapes_shards / 'train'}",
        f"output={tmp_path}",
        "phases.pretrain.images_per_gpu=2",
        "phases.pretrain.images_per_step=6",
        "data.train.keep_empty=true",
    ]

    def run(step: int, world: int, *options: str) -> dict[str, list[int | None]]:
        words = [CONFIG, "--phase", "pretrain", "--step", str(step), "--world", str(world)]
        assert main([*words, "--ids", *settings, *options]) == 0
        return json.loads(capsys.readouterr().out)

    run.settings = settings
    return run


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_ids_of_a_pass_are_every_image_once_on_any_number_of_ranks(show, shapes_shards, order):
    option = f"data.train.order={order}"
    steps = [show(step, 1, option)["0"] for step in (1, 2, 3)]
    for step, ids in enumerate(steps, start=1):
        ranks = show(step, 3, option)
        assert list(ranks) == ["0", "1", "2"]
        assert [number for rank in ranks.values() for number in rank] == ids
    numbers = [number for ids in steps for number in ids]
    assert numbers.count(None) == 2  # masked slots
    found = sorted(number for number in numbers if number is not None)
    assert found == sorted(ShardSet(shapes_shards / "train").index["image_id"].tolist())
    assert None not in steps[0] + steps[1]


def test_ids_of_a_mix_and_of_a_subset(show, shapes_shards):
    mix = [f"data.train.more_shards=[{shapes_shards / 'val'}]", "data.train.weights=[0.5,1]"]
    steps = [show(step, 1, *mix)["0"] for step in (1, 2, 3)]  # 8 of 16 images, and 8
    assert sum(number is not None for ids in steps for number in ids) == 16
    subset = {
        number for step in (1, 2) for number in show(step, 1, "data.train.subset.images=7")["0"]
    }
    assert len(subset - {None}) == 7


def test_pictures_of_one_rank(show, tmp_path, capsys):
    words = [CONFIG, "--phase", "pretrain", "--step", "7", "--world", "3", "--rank", "1"]
    assert main([*words, "--out", str(tmp_path / "pictures"), *show.settings]) == 0
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["rank-1-lane-1.png"]
    told = capsys.readouterr().out
    assert f"image ids {show(7, 3)['1']}" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phase", "pretran", "--step", "1"], "--phase pretran"),
        (["--phase", "pretrain", "--step", "0"], "--step 0"),
        (["--phase", "pretrain", "--step", "351"], "has 350 steps"),
        (["--phase", "pretrain", "--step", "7", "phases.pretrain.steps=null",
          "phases.pretrain.passes=2"], "has 6 steps"),
        (["--phase", "pretrain", "--step", "4", "phases.pretrain.steps=null",
          "phases.pretrain.images=13"], "has 3 steps"),
        (["--phase", "pretrain", "--step", "1", "--world", "2", "--rank", "2"], "--rank 2"),
        (["--phase", "pretrain", "--step", "1", "--world", "2"], "2 ranks"),
        (["--phase", "pretrain", "--step", "1", "data.train.window=300"], "data.train.window"),
        (["--phase", "pretrain", "--step", "1", "data.train.subset.images=17"], "found 17"),
    ],
)  # fmt: skip
def test_mistakes_are_reported(show, words, message):
    with pytest.raises(ValueError, match=message):
        main([CONFIG, *words, "--ids", *show.settings])
