import contextlib
import copy
import dataclasses
import math
from pathlib import Path

import pytest
import timm

from bigdet.config.load import dump_config, load_config, parse_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.data.format.phase_sets import DataSets
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import TrainStream
from bigdet.engine.checkpoint import Checkpoint
from bigdet.run_dir import RunDir
from bigdet.training.resume import begin, check_phases, note_changes, settle_config
from bigdet.training.state import RunState
from tests.shipped import unchecked

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
OPEN = ["phases.pretrain.images_per_step=null"]


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.fixture(scope="module")
def shards(shapes_shards: Path) -> ShardSet:
    return ShardSet(shapes_shards / "train")


def sets(shards: ShardSet) -> dict[str, DataSets]:
    return dict.fromkeys(("pretrain", "finetune"), DataSets(shards, shards))


def saved_by(*overrides: str) -> Checkpoint:
    """A checkpoint of the first phase."""
    config = dump_config(load_config(CONFIG, overrides))
    return Checkpoint(run={"config": config, "run": {"phase": "pretrain"}})


def test_an_open_batch_size_becomes_one_micro_batch_per_rank(shards: ShardSet):
    config = load_config(CONFIG, [*OPEN, "phases.finetune.images_per_step=32"])
    settled = settle_config(config, None, None, sets(shards))
    assert settled.phases["pretrain"].images_per_step == 4 * 8
    assert settled.phases["finetune"].images_per_step == 32


def test_a_resumed_run_keeps_its_batch_size_on_other_ranks(shards: ShardSet):
    sizes = ["phases.pretrain.images_per_step=64", "phases.finetune.images_per_step=64"]
    config = load_config(CONFIG, ["phases.finetune.images_per_step=64", *OPEN])
    settled = settle_config(config, saved_by(*sizes), Path("x"), sets(shards))
    assert settled.phases["pretrain"].images_per_step == 64


def test_ranks_that_cannot_share_a_step_equally_are_refused(shards: ShardSet):
    config = load_config(CONFIG, ["phases.pretrain.images_per_step=48"])
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.images_per_step: .*4 ranks"):
        settle_config(config, None, None, sets(shards))


SIZES = ["phases.pretrain.images_per_step=32", "phases.finetune.images_per_step=32"]


@pytest.mark.parametrize(
    "override",
    ["data.workers=9", "data.train.shards=moved", "log.every=7", "output=other",
     "engine.zero_stage=0", "evaluation.every=10", "checkpoint.keep=9",
     "engine.offload=optimizer", "phases.finetune.lr=0.1"],
)  # fmt: skip
def test_what_does_not_change_the_training_may_change(shards: ShardSet, override: str):
    config = load_config(CONFIG, [*SIZES, override])
    assert settle_config(config, saved_by(*SIZES), Path("x"), sets(shards)) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=4", r"seed \(was 0, now 4\)"),
        ("phases.pretrain.lr=0.5", r"phases\.pretrain\.lr \(was .*, now 0\.5\)"),
        ("model.width=32", r"model\.width \(was 64, now 32\)"),
        ("engine.precision=bf16", r"engine\.precision \(was fp32, now bf16\)"),
        ("data.train.keep_empty=true", r"data\.train\.keep_empty"),
    ],
)
def test_what_changes_the_training_is_named_with_both_values(
    shards: ShardSet, override: str, said: str
):
    config = load_config(CONFIG, [*SIZES, override])
    with pytest.raises(ConfigError, match=said):
        settle_config(config, saved_by(*SIZES), Path("x"), sets(shards))


def test_where_the_own_data_of_a_begun_phase_are_may_change_and_nothing_else(shards: ShardSet):
    own = [*SIZES, "phases.pretrain.data.train.shards=a", "phases.pretrain.data.val.shards=b"]
    moved = [*SIZES, "phases.pretrain.data.train.shards=c", "phases.pretrain.data.val.shards=d"]
    config = load_config(CONFIG, moved)
    assert settle_config(config, saved_by(*own), Path("x"), sets(shards)) == config
    for words, said in (
        (
            [*moved, "phases.pretrain.data.train.keep_empty=true"],
            r"data\.train\.keep_empty \(was F",
        ),
        (SIZES, r"phases\.pretrain\.data\.train \(was None, now None\)|data\.train\.order"),
    ):
        with pytest.raises(ConfigError, match=said):
            settle_config(load_config(CONFIG, words), saved_by(*own), Path("x"), sets(shards))


def test_damaged_samples_of_another_training_set_are_counted_anew():
    state = RunState("pretrain", damaged={"image": 2}, damaged_rows=[3, 5])
    state.begin("finetune")
    assert (state.damaged, state.damaged_rows) == ({"image": 2}, [3, 5])
    state.begin("finetune", has_other_images=True)
    assert (state.damaged, state.damaged_rows) == ({}, [])


def test_a_run_from_before_some_options_continues_as_it_began(shards: ShardSet):
    # Its checkpoint has a config without them, which meant an overlap of 0 and 70 % of a crowd.
    saved = saved_by(*SIZES)
    lines = saved.run["config"].splitlines()
    new = ("low_quality_iou:", "border:", "crowd_coverage:", "sampling_ratio:")
    saved.run["config"] = "\n".join(line for line in lines if not line.strip().startswith(new))
    settled = settle_config(load_config(CONFIG, SIZES), saved, Path("x"), sets(shards))
    assert (settled.model.rpn.low_quality_iou, settled.model.roi.crowd_coverage) == (0.0, 0.7)
    changed = load_config(CONFIG, [*SIZES, "model.rpn.low_quality_iou=0.2"])
    said = r"low_quality_iou \(was 0\.0, now 0\.2\).* give the config .*quickstart/config\.yaml"
    with pytest.raises(ConfigError, match=said):
        settle_config(changed, saved, Path("x"), sets(shards))


def test_a_phase_may_not_be_added_to_a_run(shards: ShardSet):
    config = load_config(CONFIG, SIZES)
    extra = {**config.phases, "more": config.phases["finetune"]}
    config = dataclasses.replace(config, phases=extra)
    with pytest.raises(ConfigError, match="pretrain, finetune, more"):
        settle_config(config, saved_by(*SIZES), Path("x"), sets(shards))


def test_lengths_in_images_and_passes_become_steps_and_drops_with_them(shards: ShardSet):
    config = load_config(
        CONFIG,
        [
            "phases.pretrain.steps=null",
            "phases.finetune.steps=null",
            "phases.pretrain.images=4_000",
            "phases.pretrain.images_per_step=32",
            "phases.finetune.images_per_step=4",
            "phases.finetune.images_per_gpu=1",
            "phases.finetune.passes=12",
            "phases.finetune.drops=[8,-1.5]",
        ],
    )
    settled = settle_config(config, None, None, sets(shards))
    pretrain, finetune = settled.phases["pretrain"], settled.phases["finetune"]
    assert (pretrain.steps, pretrain.images, pretrain.drops) == (125, None, None)
    num_images = int((shards.index["num_boxes"] > 0).sum())
    steps_per_pass = math.ceil(num_images / 4)
    assert finetune.steps == 12 * steps_per_pass
    assert finetune.drops == [8 * steps_per_pass, round(10.5 * steps_per_pass)]
    # The resolved config repeats the run, whatever becomes of the data.
    assert (
        settle_config(parse_config(dump_config(settled), "x"), None, None, sets(shards)) == settled
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "checkpoint.at=[pretrain-501]",
            r"^checkpoint\.at: found pretrain-501, .*pretrain has 500\)",
        ),
        ("log.profile.steps=[500,501]", r"^log\.profile\.steps: found \[500, 501\], .*most 500\."),
        ("checkpoint.at=[pretrain-500]", ""),
        ("log.profile.steps=[499,500]", ""),
    ],
)
def test_steps_are_checked_once_the_length_of_a_phase_in_images_is_known(word: str, said: str):
    # 4000 images in steps of 8
    length = ["phases.pretrain.steps=null", "phases.pretrain.images=4_000"]
    sizes = ["phases.pretrain.images_per_step=8", "phases.pretrain.images_per_gpu=2"]
    config = load_config(CONFIG, [*length, *sizes, SIZES[1], word])
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        assert settle_config(config, None, None).phases["pretrain"].steps == 500


def test_the_last_60k_and_20k_steps_stay_whatever_the_length_and_the_batch(shards: ShardSet):
    # Paper 1, 2x: 180k steps of 16 images, drops at 120k and 160k; with 64 images a quarter.
    words = [
        "phases.finetune.steps=null",
        "phases.finetune.images=2_880_000",
        "phases.finetune.drops=[-960_000,-320_000]",
        "phases.finetune.images_per_gpu=1",
        "phases.pretrain.images_per_gpu=1",
        "phases.pretrain.images_per_step=8",
    ]
    for images_per_step, steps, drops in (
        (16, 180_000, [120_000, 160_000]),
        (8, 360_000, [240_000, 320_000]),
    ):
        config = load_config(CONFIG, [*words, f"phases.finetune.images_per_step={images_per_step}"])
        phase = settle_config(config, None, None, sets(shards)).phases["finetune"]
        assert (phase.steps, phase.drops) == (steps, drops)


def test_a_length_that_turns_out_shorter_than_its_warm_up_is_refused(shards: ShardSet):
    config = load_config(
        CONFIG,
        [
            "phases.pretrain.steps=null",
            "phases.pretrain.passes=5",
            "phases.pretrain.images_per_gpu=1",
            "phases.pretrain.images_per_step=8",
        ],
    )
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.warmup_steps: found 50, .* 10 steps"):
        settle_config(config, None, None, sets(shards))


def test_weights_of_a_later_phase_are_fetched_before_the_first_step(shards: ShardSet, monkeypatch):
    def fail(name: str, pretrained: bool) -> None:
        raise OSError(f"no network for {name}")

    monkeypatch.setattr(timm, "create_model", fail)
    sizes = [
        f"phases.{name}.images_per_{what}=2"
        for name in ("pretrain", "finetune")
        for what in ("gpu", "step")
    ]
    config = load_config(
        CONFIG, [*sizes, "model.backbone=resnet18", "phases.finetune.start_from.source=timm"]
    )
    expected = r"^phases\.finetune\.start_from: timm could not download resnet18\.tv_in1k \(no net"
    with pytest.raises(ValueError, match=expected):
        check_phases(config, sets(shards), None)


TRUNK = [
    *SIZES,
    "phases.pretrain.steps=60",
    "phases.pretrain.schedule=step",
    "output=trunk",
    "phases.pretrain.drops=[50]",
    "phases.pretrain.warmup_steps=40",
]


def trunk_at(step: int) -> Checkpoint:
    """A checkpoint of a trunk of 60 steps that drops after 50."""
    saved = saved_by(*TRUNK)
    saved.run["run"]["step"] = step
    return saved


@pytest.mark.parametrize(
    ("step", "override", "said"),
    [
        (55, "phases.pretrain.drops=[50,58]", None),
        (40, "phases.pretrain.decay_factor=0.5", None),
        (40, "phases.pretrain.steps=51", None),
        (51, "phases.pretrain.drops=[49]", r"phases\.pretrain\.drops: up to step 51"),
        (55, "phases.pretrain.decay_factor=0.5", r"phases\.pretrain\.drops: up to step 55"),
        (55, "phases.pretrain.steps=51", r"phases\.pretrain\.steps: found 51, .* step 55"),
        (40, "phases.pretrain.lr=0.5", r"phases\.pretrain\.lr"),
        (40, "resume=auto", "started with other options: phases.pretrain.steps"),
    ],
)
def test_a_fork_may_change_the_end_of_a_schedule_and_nothing_before_it(
    shards: ShardSet, step: int, override: str, said: str | None
):
    steps = "phases.pretrain.steps=70"
    config = load_config(CONFIG, [*TRUNK, steps, "output=fork", "resume=trunk/x", override])
    if said is None:
        assert settle_config(config, trunk_at(step), Path("x"), sets(shards)) == config
    else:
        with pytest.raises(ConfigError, match=said):
            settle_config(config, trunk_at(step), Path("x"), sets(shards))


def test_a_fork_leaves_the_best_behind_and_ends_its_phase_with_an_evaluation(
    shards: ShardSet, tmp_path: Path
):
    saved = trunk_at(40)
    saved.run["run"] |= {"seen": {"images": 7}, "best_ap": 0.5, "best_checkpoint": "pretrain-30"}
    for steps, is_due in ((40, True), (45, False)):
        words = [f"phases.pretrain.steps={steps}", f"output={tmp_path}/{steps}", "resume=trunk/x"]
        config = unchecked(CONFIG, [*TRUNK, *words, "log.tensorboard=false"])
        state, metrics = begin(config, RunDir(Path(config.output)), sets(shards), saved)
        metrics.close()
        assert state.needs_evaluation is is_due
        assert state.best_ap is state.best_checkpoint is None
        assert (state.step, state.seen.images) == (40, 7)


def stream_of(shards: ShardSet, config: RunConfig, **more: int) -> TrainStream:
    """The stream of ``pretrain`` on one rank."""
    ranks = {"rank": 0, "world_size": 1}
    phase = config.phases["pretrain"]
    return TrainStream(
        shards, config.data, phase, name="pretrain", with_masks=False, seed=0, **ranks, **more
    )


def at_step(shards: ShardSet, step: int, ranks: int, *overrides: str):
    """Config, checkpoint and state of a run in ``pretrain``."""
    config = load_config(CONFIG, overrides)
    stream = stream_of(shards, config)
    state = RunState("pretrain", step, stream=stream.state(), ranks=ranks)
    return Checkpoint(run={"config": dump_config(config)}), state, stream


SMALL = ["data.train.keep_empty=true", "phases.pretrain.images_per_gpu=2"]


def test_other_ranks_change_the_accumulation_and_are_reported(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
):
    overrides = [*SMALL, "phases.pretrain.images_per_step=16"]
    saved, state, _ = at_step(shards, 3, 2, *overrides)
    with caplog.at_level("INFO", "bigdet"):
        note_changes(load_config(CONFIG, overrides), sets(shards), saved, state)
    (line,) = caplog.messages
    assert line.startswith("4 ranks instead of 2: each runs 2 micro-batches of 2 per step instead")
    assert "instead of 4; 16 images per step as before" in line
    assert (state.ranks, state.stream_shift) == (4, 0)


def test_another_batch_leaves_the_pass_and_shows_each_image_once_from_then_on(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
):
    # 16 images. At 4 per step a pass has 4 steps: step 6 is in the middle of the second one. At 8
    # per step a pass has 2 steps, so the third pass begins after its step 4, two steps earlier.
    saved, state, _ = at_step(shards, 6, 4, *SMALL, "phases.pretrain.images_per_step=4")
    changed = [*SMALL, "phases.pretrain.images_per_step=8", "change_batch=true"]
    with pytest.raises(ConfigError, match=r"reference_images_per_step, to 4 if lr is"):
        note_changes(load_config(CONFIG, changed), sets(shards), saved, copy.deepcopy(state))
    config = load_config(CONFIG, [*changed, "phases.pretrain.reference_images_per_step=4"])
    with caplog.at_level("INFO", "bigdet"):
        note_changes(config, sets(shards), saved, state)
    (line,) = caplog.messages
    assert "step 6: 8 images per step instead of 4" in line
    assert "lr 0.002 instead of 0.001; pass 3 begins, the last 2 steps of the pass before" in line
    assert state.stream_shift == 4 - 6
    stream = stream_of(shards, config, first_step=state.step + state.stream_shift)
    stream.check_state(state.stream)
    ids = [i for step in (5, 6) for lane in range(4) for i in stream.group_ids(step, lane)]
    assert sorted(ids) == sorted(shards.index["image_id"])


def test_another_batch_must_be_asked_for():
    sizes = ["phases.pretrain.images_per_step=64", "phases.finetune.images_per_step=32"]
    with pytest.raises(ConfigError, match=r"images_per_step \(was 32, now 64\)") as caught:
        settle_config(load_config(CONFIG, sizes), saved_by(*SIZES), Path("x"))
    assert "with change_batch=true also phases.pretrain.images_per_step," in str(caught.value)
    asked = load_config(CONFIG, [*sizes, "change_batch=true", "phases.pretrain.steps=900"])
    assert settle_config(asked, saved_by(*SIZES), Path("x")) == asked
    asked = load_config(CONFIG, [*sizes, "change_batch=true", "phases.pretrain.lr=3"])
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.lr"):
        settle_config(asked, saved_by(*SIZES), Path("x"))


def test_a_change_of_the_batch_needs_the_steps_of_the_present_phase_only():
    in_passes = ["steps=null", "passes=12", "warmup_steps=0"]
    sizes = ["phases.pretrain.images_per_step=64", SIZES[1], "change_batch=true"]
    asked = load_config(CONFIG, [*sizes, *(f"phases.finetune.{word}" for word in in_passes)])
    assert settle_config(asked, saved_by(*SIZES), Path("x")) == asked
    asked = load_config(CONFIG, [*sizes, *(f"phases.pretrain.{word}" for word in in_passes)])
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.steps: not set, but with change_ba"):
        settle_config(asked, saved_by(*SIZES), Path("x"))
